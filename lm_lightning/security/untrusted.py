"""Untrusted input: checks names, paths and classes in files that other people have made.

A checkpoint, model folder, index or run folder is data: opening it must neither run code nor read or write files
outside of its folder. SECURITY.md describes the full trust model.
"""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_lightning import features
from lm_lightning.console import printable
from lm_lightning.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# C0 and C1 control characters, line and paragraph separators, direction overrides, lone surrogates
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul"} | {f"{device}{n}" for device in ("com", "lpt") for n in range(1, 10)}


def plain_name(name: Any, what: str) -> str:
    """Returns `name` if it can be the name of a file or folder in a folder, on every operating system.

    Args:
        name: The name, of any type.
        what: Where it comes from, such as `--name`, for the message.

    Raises:
        UserError: If it is empty, a path, `.` or `..`, or has characters that are not allowed in file names.
    """
    bad = (
        not isinstance(name, str)
        or name.strip(" .") == ""
        or re.search(r'[/\\:<>"|?*]', name) is not None
        or _UNPRINTABLE.search(name) is not None
        or name.partition(".")[0].lower() in _WINDOWS_DEVICES
        or len(os.fsencode(name)) > 200
    )
    if bad:
        raise UserError(
            f"{what} is {printable(repr(name))[:200]}, which cannot be the name of a file or folder: use letters, "
            "digits, '-', '_' and '.', without slashes"
        )
    return name


def inside(folder: Path, name: Any, what: str) -> Path:
    """Returns the path of a relative name in `folder`, and checks that it does not lead out of the folder.

    Args:
        folder: An existing folder.
        name: Relative path with `/` between its parts, of any type.
        what: The file that contains the name, for the message.

    Raises:
        UserError: If the name is absolute, has `..`, or passes through a symbolic link that leads elsewhere.
    """
    parts = name.split("/") if isinstance(name, str) else [name]
    for part in parts:
        plain_name(part, f"a name in {what}")
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{what} names {printable(name)}, a link that leads out of {folder}: remove it")
    return path


def refuse_links(run: Path) -> None:
    """Refuses a run folder with symbolic links that lead out of it, as writing to such a link changes its target.

    A link that W&B creates to its own log is accepted, since neither W&B nor this project writes to it.

    Raises:
        UserError: Names the first such link and its target.
    """
    root = run.resolve()
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if path.relative_to(root).match("wandb/*run-*/logs/debug-core.log"):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(
                    f"{printable(str(path))} is a link to {printable(os.readlink(path))}, outside of the run folder, "
                    "which would be changed: remove the link, or replace it by a copy of its target"
                )


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        UserError: If it cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error, 200)
        raise UserError(f"{printable(str(file))} cannot be read: it is damaged, remove it ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{printable(str(file))} cannot be read: it is damaged, remove it (not a JSON object)")
    return content


def network_class(name: Any) -> "type[PreTrainedModel]":
    """The class of `transformers`, or of this project, that a file names.

    Args:
        name: The name, such as `GPT2LMHeadModel`, of any type.

    Raises:
        UserError: If there is no network of that name.
    """
    import transformers

    if isinstance(name, str) and name in (own := features.networks()):
        return features.resolve(own[name])
    found = None
    if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
        found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UserError(
            f"transformers {transformers.__version__} has no network class {printable(str(name))[:100]}, which this "
            "checkpoint or model folder names: it is damaged, from another version, or not from lm_lightning"
        )
    return found


def refuse_expanding_zip(file: zipfile.ZipFile, what: Path) -> None:
    """Refuses an archive with compressed members, as `torch.save` never compresses."""
    for info in file.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > info.compress_size:
            raise UserError(f"{what} is not a checkpoint: it has compressed parts, which torch.save never writes")
