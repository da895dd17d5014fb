"""`export`: converts a checkpoint to a folder that plain `transformers` can load, and checks it."""

from pathlib import Path
from typing import Any, Optional

from lm_lightning import files
from lm_lightning import run as runs
from lm_lightning.compat.transformers import hide_load_report
from lm_lightning.errors import UserError, one_line
from lm_lightning.security import untrusted


def export(
    run: str, checkpoint: Optional[str] = None, output: Optional[str] = None, max_shard_size: Optional[str] = None
) -> None:
    """Converts a checkpoint to a `from_pretrained` folder and checks that the folder gives the same logits.

    An adapter is merged into its base model, which is loaded from its original location. Without `output`, the adapter
    is also written by itself to `adapter/` in the run folder.

    Args:
        run: Run folder.
        checkpoint: `last`, `best` or another name in the run's `checkpoints/`, or the path of a checkpoint file.
            Default: the one that training exports at its end, which is the best one if a metric is monitored and
            `--export last` was not given, otherwise the last one.
        output: Folder to write, which must not exist. Default: `model/` in the run folder, which is replaced.
        max_shard_size: Maximum size of a weights file, such as `5GB`; larger weights are split into several files.
            Default: the one of `transformers`.
    """
    from lm_lightning.checkpoints.loading import CheckpointFolder, find_checkpoint, load_checkpoint

    folder_of_run = runs.find_run(run)
    if output is None:
        untrusted.refuse_links(folder_of_run)
    elif Path(output).exists():
        raise UserError(f"the output folder {output} exists already: remove it, or give another --output")
    checkpoints = folder_of_run / "checkpoints"
    file, _ = find_checkpoint(checkpoint, checkpoints) if checkpoint else CheckpointFolder(checkpoints).exported()
    saved = load_checkpoint(file, verified=True)  # including the tensors of a sharded checkpoint
    about = {"checkpoint": file.stem, "step": saved["global_step"]} | score(saved, file)
    folder = Path(output or folder_of_run / "model")
    if reason := files.unwritable(folder):
        raise UserError(f"cannot create the folder {folder} ({reason}): give another --output")
    adapter = None if output else folder_of_run / "adapter"
    try:
        write(saved, folder_of_run / "tokenizer", folder, about, adapter, max_shard_size)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    print(f"checkpoint: {file}, {runs.describe_weights(about)}")
    print(folder)


def score(saved: dict[str, Any], file: Path) -> dict[str, Any]:
    """Metric and score of a checkpoint that was the best one when it was saved; empty for others."""
    for state in saved.get("callbacks", {}).values():
        if not isinstance(state, dict) or state.get("best_model_score") is None:
            continue
        monitor, path = state.get("monitor"), state.get("best_model_path")
        if isinstance(monitor, str) and isinstance(path, str) and Path(path).name == file.name:
            return {"metric": monitor, "score": float(state["best_model_score"])}
    return {}


def write(
    saved: dict[str, Any],
    tokenizer: Path,
    folder: Path,
    about: Optional[dict[str, Any]] = None,
    adapter: Optional[Path] = None,
    max_shard_size: Optional[str] = None,
) -> None:
    """Writes and checks the model of a checkpoint.

    Args:
        saved: The checkpoint.
        tokenizer: Folder of its run's tokenizer.
        folder: Folder to write.
        about: Name, step and score of the checkpoint.
        adapter: Folder for its adapter; None to not write one.
        max_shard_size: See `export`.

    Raises:
        UserError: If the checkpoint is damaged or forged, or was trained with a different tokenizer.
    """
    from lm_lightning.models.export import changes_of, model_of

    hide_load_report()
    try:
        model = model_of(saved, own_tokenizer(saved, tokenizer))
        model.write(folder, about, changes_of(saved), adapter, max_shard_size, check=True)
    except UserError:
        raise
    except Exception as error:  # classes of transformers raise any type of error for invalid settings
        reason = one_line(error, 300)
        raise UserError(
            "the checkpoint cannot be exported, as its description does not match its weights "
            f"({type(error).__name__}: {reason}): the file is damaged or was changed"
        ) from error


def own_tokenizer(saved: dict[str, Any], folder: Path) -> Any:
    """The tokenizer of a checkpoint, None if its data has none.

    Raises:
        UserError: If the folder contains a different tokenizer.
    """
    from lm_lightning.data import tokenizer as tokenizers

    if saved.get("tokenizer", "") is None:
        return None
    own = tokenizers.load(str(folder))
    if saved.get("tokenizer", tokenizers.fingerprint(own)) != tokenizers.fingerprint(own):
        raise UserError(
            f"the checkpoint was not trained with the tokenizer in {folder}, so it cannot be exported: restore the "
            "tokenizer of its run"
        )
    return own


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli import command

    command.run(export)
