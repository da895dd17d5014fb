"""Loading by name: from a local folder, from the local Hub cache or from the Hub itself.

Without a network connection, `from_pretrained("gpt2")` retries for almost a minute before it fails. So each process
checks once whether the Hub answers: `from_pretrained(name, local_files_only=local_only(name))`.
"""

import contextlib
import functools
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from lm_lightning import features
from lm_lightning.compat.transformers import needs_remote_code
from lm_lightning.errors import UserError, one_line
from lm_lightning.security.trust import trust_remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TIMEOUT = 3.0  # seconds the Hub has to answer


def local_only(name: str) -> bool:
    """Whether `name` must be loaded from this machine: it is a path, or the Hub is disabled or does not answer."""
    from huggingface_hub import constants

    return os.path.isdir(name) or _is_path(name) or constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)


def explain(name: str, error: Exception) -> UserError:
    """Converts an error of `from_pretrained(name)` to one sentence that names the remedy."""
    from huggingface_hub import constants

    if not os.path.exists(name) and (_is_path(name) or ("/" in name and Path(name).parent.exists())):
        return UserError(f"the folder {name!r} does not exist")
    # An OSError means that nothing was found; any other error, that something was found but cannot be used.
    if isinstance(error, OSError) and not os.path.exists(name) and local_only(name):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return UserError(
            f"{name!r} is neither a local folder nor in the local Hub cache, and {why}: "
            "give a local folder, or try again with a network connection"
        )
    if needs_remote_code(error):
        return UserError(
            f"{name!r} is a model or tokenizer with its own Python code, which is not run by default: read that code, "
            "and if you trust it, add --trust_remote_code true to the command"
        )
    return UserError(f"{name!r} cannot be loaded: {one_line(error, 300)}")


def config(name: str) -> "PreTrainedConfig":
    """The config of a model folder or Hub name.

    Raises:
        UserError: If it has no config, the config is damaged, or it needs code that is not trusted.
    """
    from transformers import AutoConfig

    features.register_networks()
    try:
        return AutoConfig.from_pretrained(
            name, local_files_only=local_only(name), trust_remote_code=trust_remote_code()
        )
    except Exception as error:  # of damaged files, transformers raises anything
        raise explain(name, error) from error


def load(auto_class: Any, name: str, unused: tuple[str, ...] = (), **settings: Any) -> Any:
    """Calls `auto_class.from_pretrained`, but refuses weights that lack a part of the network, which would be random.

    Args:
        auto_class: A class of `transformers`, such as `AutoModel`.
        name: Folder or Hub name.
        unused: Prefixes of the names of tensors that may be missing because nothing uses them.
        settings: Other arguments of `from_pretrained`.

    Raises:
        UserError: If tensors are missing, or the model cannot be loaded.
    """
    from transformers.utils import logging as messages

    features.register_networks()
    settings |= {"local_files_only": local_only(name), "output_loading_info": True, "ignore_mismatched_sizes": True}
    verbosity = messages.get_verbosity()
    messages.set_verbosity_error()  # what is missing is reported below
    try:
        network, info = auto_class.from_pretrained(name, trust_remote_code=trust_remote_code(), **settings)
    except Exception as error:  # of damaged files, transformers raises anything
        raise explain(name, error) from error
    finally:
        messages.set_verbosity(verbosity)
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if missing := {key for key in missing if not key.startswith(unused)}:
        raise untrained(name, network, sorted(missing))
    return network


def untrained(name: str, network: Any, missing: list[str]) -> UserError:
    """The error for weights that lack some tensors of the network into which they were loaded."""
    made_of = ", ".join(network.config.architectures or []) or "model"
    tensors = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    return UserError(
        f"{name} (a {made_of}) has no weights for {len(missing)} tensors of {type(network).__name__} ({tensors}), "
        "which would be random: give a model that was trained for this task"
    )


def _is_path(name: str) -> bool:
    """Whether `name` can only be a path, since a Hub name is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or len(Path(name).parts) > 2


@functools.cache
def _answers(endpoint: str) -> bool:
    """Whether `endpoint` accepts a connection within `TIMEOUT`; assumed to be true behind a proxy."""
    url, answered = urlsplit(endpoint), threading.Event()
    if getproxies().keys() & {url.scheme, "all"}:
        return True

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), TIMEOUT).close()
            answered.set()

    # In a thread, as the lookup of the host name has no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return answered.is_set()
