"""Python processes that start at once: forks of two processes that have imported the libraries already.

Most of a command's time is the import of torch, lightning and transformers (5 s). `python("lm_lightning")` gives the
path of an executable which takes the place of `sys.executable` for `-m lm_lightning ...`, torchrun, `processes.py` and
`kill.py`, and `python("transformers")` one for `-c CODE` of a script that must not have imported anything of this
project. Whatever else they are called with, and wherever an environment variable differs that a library may read when
it is imported, they start a real Python. So they do on all but Linux, and where there is a GPU: no driver survives a
fork.

`python forks.py FOLDER` is the server, which ends when its standard input is closed.
"""

import atexit
import contextlib
import functools
import gc
import importlib.util
import marshal
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Optional

# What a process reads of its environment when it runs, not when it is imported
RUNTIME = ("SLURM_", "WANDB_", "MASTER_", "NODE_RANK", "LOCAL_", "RANK", "WORLD_SIZE", "GROUP_", "PL_")
RUNTIME += ("ROLE_", "TORCHELASTIC_", "TORCH_NCCL_")
RUNTIME += ("LM_LIGHTNING_", "PYTEST_", "PYTHONPATH", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
RUNTIME += ("PWD", "OLDPWD", "SHLVL", "COLUMNS", "LINES", "TERM", "_")
RUNTIME += ("PYTHONIOENCODING", "OPENBLAS_NUM_THREADS")
LOG_LEVELS = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # set by a command before it imports torch
RUNTIME += tuple(LOG_LEVELS)
# Imported by a `fit` anyway, after the command line is read
MODULES = {
    "transformers": ["torch", "transformers", "transformers.models.gpt2.modeling_gpt2"]
    + ["transformers.models.bert.modeling_bert"],
    "lm_lightning": [
        "lm_lightning.cli.app",
        "lm_lightning.generation.generate",  # fork: gpt
        "lm_lightning.reports.report",  # fork: reports
        "bitsandbytes",  # fork: compression
        "torch.utils.tensorboard",
        "torch.distributed.checkpoint",
    ],
}
ENVIRONMENT = dict(os.environ)  # before a library adds to it
LOCK = threading.Lock()
CLIENT = """#!{python} -ISB
import marshal, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = marshal.dumps((sys.argv[1:], os.getcwd(), dict(os.environ)))
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    if server.recv(1) != b"y":
        os.execv({python!r}, [{python!r}, *sys.argv[1:]])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    status = int.from_bytes(server.recv(4) or bytes([0, 0, 0, 70]), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def start() -> Optional[tuple[Path, int]]:
    """Starts the server of this process, where anything can be forked.

    Returns:
        The folder of its executables and its process number.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available() or " " in sys.executable:
        return None
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, __file__, folder],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ
            | LOG_LEVELS
            | {"OPENBLAS_NUM_THREADS": "1"},  # else numpy starts threads, which are not forked
        )
    atexit.register(server.communicate)
    while not all((folder / f"{name}.socket").exists() for name in MODULES):
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.02)
    return folder, server.pid


def python(parent: str) -> str:
    """The path of an executable to start instead of `sys.executable`.

    Args:
        parent: What its processes are forked from, `lm_lightning` or `transformers`.
    """
    with LOCK:
        started = start()
    return sys.executable if started is None else str(started[0] / parent)


def server() -> Optional[int]:
    """The process number of the server, whose descendants are all that it has forked."""
    with LOCK:
        started = start()
    return started and started[1]


# The server


class Job:
    """What a forked process runs."""

    def __init__(self, connection: socket.socket) -> None:
        size, self.files, *_ = socket.recv_fds(connection, 8, 3)
        request = b""
        while len(request) < int.from_bytes(size, "big"):
            if not (part := connection.recv(2**20)):
                break
            request += part
        self.arguments, self.folder, self.environment = marshal.loads(request)
        self.unbuffered = self.arguments[0] == "-u"  # as torchrun starts its processes
        self.arguments = self.arguments[self.unbuffered :]

    def runs_in(self, parent: str) -> bool:
        """Whether a fork does what a real start would do."""
        keys = {k for k in self.environment.keys() | ENVIRONMENT.keys() if not k.startswith(RUNTIME)}
        if differ := sorted(key for key in keys if self.environment.get(key) != ENVIRONMENT.get(key)):
            print(f"a real start: {self.arguments[:3]} with another {differ}", flush=True)
            return False
        kind, what = self.arguments[0], "".join(self.arguments[1:2])
        if parent == "transformers":
            return kind == "-c"
        return (kind == "-m" and what.startswith(("lm_lightning", "torch.distributed.run"))) or kind.endswith(
            ("/processes.py", "/kill.py")
        )

    def enter(self, parent: str) -> None:
        """Becomes a process like one that was just started."""
        os.setsid()
        os.chdir(self.folder)
        for number, file in enumerate(self.files):
            os.dup2(file, number)
            os.close(file)
        encoding, _, errors = self.environment.get("PYTHONIOENCODING", "").partition(":")
        sys.stdout = open(1, "w", -1, encoding or None, errors or None, closefd=False)  # noqa: SIM115
        if self.unbuffered:
            sys.stdout.reconfigure(line_buffering=True)
        sys.stderr = open(2, "w", 1, encoding or None, "backslashreplace", closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(self.environment)
        os.environ.pop("_", None)
        own = [path for path in self.environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
        script = self.arguments[0].endswith(".py")
        sys.path[:0] = [str(Path(self.arguments[0]).parent) if script else self.folder, *own]
        if parent == "lm_lightning":  # so that what it starts itself is quick as well
            sys.executable = str(Path(sys.argv[1]) / parent)
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        if "torch" in sys.modules and "OMP_NUM_THREADS" in self.environment:
            sys.modules["torch"].set_num_threads(int(self.environment["OMP_NUM_THREADS"]))

    def run(self) -> None:
        """Runs what a real process would, and ends without the interpreter's freeing of all that was imported."""
        try:
            self.execute()
        except SystemExit as ended:
            if ended.code is not None and not isinstance(ended.code, int):
                print(ended.code, file=sys.stderr)
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        else:
            status = 0
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def execute(self) -> None:
        kind, what = (*self.arguments, "")[:2]
        if kind == "-m":
            sys.argv = [what, *self.arguments[2:]]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *self.arguments[2:]]
            module = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), vars(module))
        else:
            sys.argv = self.arguments
            runpy.run_path(kind, run_name="__main__")


def watch(connection: socket.socket, child: int) -> None:
    """Passes signals to a process and its status to the client; if the client is gone, kills what it had started."""
    end = os.pidfd_open(child)
    while True:
        ready, *_ = select.select([connection, end], [], [])
        if connection in ready:
            try:
                data = connection.recv(16)
            except ConnectionError:
                data = b""
            for number in data:
                os.kill(child, number)
            if not data:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                os.kill(child, signal.SIGKILL)  # which may not have a group yet
                return
        if end in ready:
            with contextlib.suppress(ConnectionError):
                connection.sendall(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]).to_bytes(4, "big", signed=True))
            return


def serve(folder: Path, parent: str) -> Job:
    """Forks for each client, and returns in the forked processes."""
    for name in MODULES[parent]:
        if importlib.util.find_spec(name) is None:  # a feature that was removed
            continue
        importlib.import_module(name)
    os.fsync = lambda file: None  # no test cuts the power
    if parent == "lm_lightning":
        torch.set_num_threads(1)  # more threads would not be forked
        importlib.import_module("lm_lightning.callbacks.throughput").cpu_flops(torch.float32, 1)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread that another module has started would not be forked"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / f"{parent}.partial"))
    listener.listen(64)
    client = folder / parent
    client.write_text(CLIENT.format(python=sys.executable, address=str(folder / f"{parent}.socket")))
    client.chmod(0o755)
    gc.collect()
    gc.freeze()  # else a collection in a forked process would write to all pages of what is imported here
    (folder / f"{parent}.partial").rename(folder / f"{parent}.socket")
    while True:
        ready, *_ = select.select([listener, 0], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in ready:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        connection, _ = listener.accept()
        try:
            job = Job(connection)
        except (OSError, EOFError, ValueError):  # its client was killed
            connection.close()
            continue
        if not job.runs_in(parent):
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"n")
        elif not os.fork():
            listener.close()
            child = os.fork()
            if not child:
                connection.close()
                job.enter(parent)
                return job
            for file in job.files:
                os.close(file)
            with contextlib.suppress(ConnectionError):  # then the next line notices it, too
                connection.sendall(b"y")
            watch(connection, child)
            os._exit(0)
        for file in job.files:
            os.close(file)
        connection.close()


if __name__ == "__main__":
    sys.path.pop(0)
    folder = Path(sys.argv[1])
    import torch
    import transformers  # noqa: F401

    parent = "lm_lightning" if os.fork() else "transformers"
    serve(folder, parent).run()
