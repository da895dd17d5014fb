"""Preemption: upon a signal, saves a checkpoint between two optimizer steps and exits."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Optional

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.compat import lightning as compat

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Preemption(Callback):
    """Ends a training run upon SIGTERM, SIGUSR1 or Ctrl-C (SIGINT), so that it can be resumed exactly.

    The current optimizer step, with all its micro-batches, is finished, and `checkpoints/last.ckpt` is written. A
    validation is interrupted; the resumed run repeats it. The exit status is 128 plus the number of the signal, as in
    shells: 143, 138 or 130. A second signal ends the run at once, without a checkpoint.

    Any process of a run may receive the signal. The processes exchange it on the CPU, in the background, without
    waiting for devices; two steps later, all of them know of it in the same step.

    Under SLURM with Lightning's automatic requeueing, SLURM's signal (SIGUSR1) also requeues the job. Its command
    should have `--ckpt_path last` if SLURM_RESTART_COUNT is set.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal that this process has received
        self.owner = 0  # ID of this process; forked processes inherit the handlers
        self.group: Any = None  # process group of all processes, on CPUs
        # The signal that the processes have received, and the operation that exchanges it
        self.votes, self.vote = torch.zeros(1, dtype=torch.int64), None

    # Signals

    def listen(self, trainer: Trainer) -> None:
        """Replaces Lightning's signal handlers; at the end, Lightning restores the original ones."""
        if self.owner == os.getpid():
            return
        self.owner, self.launcher = os.getpid(), trainer.strategy.launcher
        for number in SIGNALS:
            signal.signal(number, self.on_signal)
        if trainer.world_size > 1 and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")
            compat.disable_signal_broadcast(trainer)

    def on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self.owner:  # a data loader's worker; its parent handles Ctrl-C
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif self.received:
            for child in getattr(self.launcher, "procs", []):
                child.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            self.received = number
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing and saving this step; signal again to quit now\n".encode())

    def agreed(self) -> int:
        """The signal that all processes know of, 0 if none; the n-th call returns the same in all processes."""
        if self.group is None:
            return self.received
        if self.vote is not None:
            self.vote.wait()
        answer = int(self.votes)
        self.votes = torch.tensor([self.received])
        self.vote = dist.all_reduce(self.votes, dist.ReduceOp.MAX, self.group, async_op=True)
        return answer

    # Hooks

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        # The previous step is complete, including its logging and validation.
        if batch_idx % trainer.accumulate_grad_batches == 0 and (number := self.agreed()):
            self.stop(trainer, pl_module, number)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.state.fn == "fit" and (number := self.agreed()):
            self.stop(trainer, pl_module, number)

    # End

    def stop(self, trainer: Trainer, pl_module: LightningModule, number: int) -> None:
        """Saves a checkpoint, prints how to resume, and exits."""
        if self.vote is not None:
            self.vote.wait()
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        step, saved = trainer.global_step, trainer.global_step > pl_module.resumed_at
        if saved:
            trainer.save_checkpoint(last)
            trainer.strategy.checkpoint_io.teardown()  # waits for pending writes in the background
        environment = compat.cluster_environment(trainer)
        requeued = trainer.is_global_zero and isinstance(environment, SLURMEnvironment) and requeue(environment, number)
        for child in getattr(self.launcher, "procs", []):  # they do not save anything and exit earlier
            child.wait(60)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            sys.exit(0)  # with another status, Lightning would kill the first process, which sets the exit status
        remedy = "resume with the same command and --ckpt_path last"
        if step >= pl_module.total_steps():
            remedy += ", which finishes the validation and writes model/"
        if not saved:
            remedy = "nothing new to save, resume with the same command"
        name = signal.Signals(number).name
        pl_module.print(
            f"stopped by {name} at step {step}"
            + (f", saved in {last}" if saved else "")
            + (": the job is requeued" if requeued else f": {remedy}")
        )
        sys.exit(128 + number)


def requeue(environment: SLURMEnvironment, number: int) -> bool:
    """Requeues this SLURM job, if requeueing is enabled and this is the signal for it; returns whether it did."""
    if not environment.auto_requeue or number != environment.requeue_signal:
        return False
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return subprocess.run(["scontrol", "requeue", job]).returncode == 0
