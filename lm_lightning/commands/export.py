"""`export`: a checkpoint in, a folder that plain `transformers` loads out, checked."""

import json
from pathlib import Path
from typing import Any, Optional

from lm_lightning import files
from lm_lightning import run as runs
from lm_lightning.checkpoints.loading import CheckpointFolder, find_checkpoint, load_checkpoint
from lm_lightning.compat.transformers import hide_load_report
from lm_lightning.errors import UserError
from lm_lightning.run import find_run
from lm_lightning.security import untrusted


def export(
    run: str, checkpoint: Optional[str] = None, output: Optional[str] = None, max_shard_size: Optional[str] = None
) -> None:
    """Makes a `from_pretrained` folder of a checkpoint and checks that it reloads to the same logits.

    An adapter is merged into its base, which is loaded from where it came from; without an `output`, it is written to
    `adapter/` of the run folder, too.

    Args:
        run: Run folder.
        checkpoint: `last`, `best` or another name in the run's `checkpoints/`, or the path of a checkpoint file.
            Default: what the end of the training exports: the best one, if one is monitored and the run was not told
            `--export last`, else the last.
        output: Folder to write, which may not exist. Default: `model/` in the run folder, which is replaced.
        max_shard_size: Largest file of weights, such as `5GB`; larger ones are written in parts. Default: that of
            `transformers`.
    """
    run = str(find_run(run))
    if output is None:
        untrusted.refuse_links(Path(run))
    checkpoints = Path(run) / "checkpoints"
    folder_of_run = CheckpointFolder(checkpoints)
    file, _ = folder_of_run.exported() if checkpoint is None else find_checkpoint(checkpoint, checkpoints)
    saved = load_checkpoint(file, verified=True)
    about = {"checkpoint": file.stem, "step": saved["global_step"]} | score(saved, file)
    if output is not None and Path(output).exists():
        raise UserError(f"the output folder {output} exists already: remove it or name another one")
    folder, adapter = Path(output or Path(run) / "model"), files.temporary(Path(run) / "adapter")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = files.temporary(folder)
        place.mkdir()
        place.rmdir()
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}): name another --output") from error
    files.remove_stale(Path(run), "adapter")
    try:
        with files.replacing_folder(folder) as partial:
            write(saved, Path(run) / "tokenizer", partial, max_shard_size, None if output else adapter)
            files.write_text(partial / runs.TRAINING, json.dumps(about, indent=2))
        if adapter.exists():
            files.sync_tree(adapter)
            files.put(adapter, Path(run) / "adapter")
    finally:
        files.remove(adapter)
    print(f"checkpoint: {file}, {runs.describe_weights(about)}")
    print(folder)


def score(saved: dict[str, Any], file: Path) -> dict[str, Any]:
    """Metric and score of a checkpoint that was the best when it was saved."""
    for state in saved.get("callbacks", {}).values():
        if not isinstance(state, dict) or state.get("best_model_score") is None:
            continue
        monitor, path = state.get("monitor"), state.get("best_model_path")
        if isinstance(monitor, str) and isinstance(path, str) and Path(path).name == file.name:
            return {"metric": monitor, "score": float(state["best_model_score"])}
    return {}


def write(saved: dict, *arguments: Any) -> None:
    """Calls `write_checked`; what a damaged or forged checkpoint makes it stumble over becomes a UserError."""
    try:
        write_checked(saved, *arguments)
    except UserError:
        raise
    except Exception as error:  # classes of transformers raise anything for settings that make no sense
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            "the checkpoint cannot be exported, as its description and weights do not fit together "
            f"({type(error).__name__}: {reason}): it is damaged, or was changed"
        ) from error


def write_checked(
    saved: dict,
    tokenizer: Path,
    folder: Path,
    max_shard_size: Optional[str] = None,
    adapter: Optional[Path] = None,
) -> None:
    """Writes network and tokenizer into `folder` and refuses it if it does not give the checkpoint's logits.

    What an adapter has trained is written by itself, too, if a folder for it is given.
    """
    import torch

    from lm_lightning.compression.structure import shrink
    from lm_lightning.models import adapter as adapters
    from lm_lightning.models.export import save_network

    hide_load_report()
    description = saved["network"]
    network_class = untrusted.network_class(description["class"])
    config = network_class.config_class.from_dict(description["config"])
    weights = {k.removeprefix("network."): w for k, w in saved["state_dict"].items() if k.startswith("network.")}
    if "adapter" in saved:
        own_adapter, network, weights = adapters.restore(saved)
        if adapter is not None:
            own_adapter.save(network, weights, saved["adapter"], description, adapter)
        weights = own_adapter.merge(network, weights)
    save_network(description, weights, folder, max_shard_size)
    for state in saved.get("callbacks", {}).values():
        if "kept" in state:  # of StructuredPruning
            shrink(folder, state["kind"], state["kept"])
    if saved.get("tokenizer", "") is not None:  # else the data has none
        write_tokenizer(saved, tokenizer, folder)

    tokens = torch.arange(min(16, config.vocab_size)).unsqueeze(0)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        after = network_class.from_pretrained(folder).eval()(**inputs)[0]
        config.vocab_size = description["rows"]
        network = network_class(config).eval()
        network.load_state_dict({key: weights[key] for key in network.state_dict()})  # without a head of ours
        before = network(**inputs)[0][..., : after.shape[-1]]
    difference = (before - after).abs().max().item()
    if not difference < 1e-5:
        raise UserError(
            f"the exported model's outputs differ from the checkpoint's by {difference:.2g}: nothing is exported"
        )


def write_tokenizer(saved: dict, tokenizer: Path, folder: Path) -> None:
    """Writes the tokenizer of a run, in a folder, beside its network.

    Raises:
        UserError: If it is not that of the checkpoint, or would be loaded as another one.
    """
    from lm_lightning.data import tokenizer as tokenizers

    own = tokenizers.load(str(tokenizer))
    if saved.get("tokenizer", tokenizers.fingerprint(own)) != tokenizers.fingerprint(own):
        raise UserError(f"the checkpoint was made with another tokenizer than {tokenizer}: nothing is exported")
    tokenizers.save(own, folder)
    if tokenizers.fingerprint(tokenizers.load(str(folder))) != tokenizers.fingerprint(own):
        raise UserError("the exported tokenizer is not loaded as it was saved: nothing is exported")


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli import command

    command.run(export)
