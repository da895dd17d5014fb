"""The reference network of preference tuning: log-probabilities of answers by the network as it was before training.

With an adapter, it is the frozen base. Otherwise, training computes the log-probabilities of all pairs once, before the
first step, and checkpoints keep them. An evaluation loads the network that the exported folder names.
"""

import dataclasses
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from torch import Tensor

from lm_lightning.data.order import PADDING, SequentialBatches
from lm_lightning.errors import UserError
from lm_lightning.finetuning.examples import Examples
from lm_lightning.models.export import ExtraFiles
from lm_lightning.run import pretrained_name
from lm_lightning.security.untrusted import read_json

FILE = "preference.json"
REMEDY = "give it with --model.reference FOLDER_HUB_NAME_OR_RUN"


@dataclasses.dataclass
class PreferenceFiles(ExtraFiles):
    """Names the reference network beside the exported one, so that evaluations use the same.

    Args:
        reference: Folder or Hub name; empty if the initial network was a new one.
    """

    reference: str

    def files(self) -> dict[str, Any]:
        return {FILE: {"reference": self.reference}}


def absolute(name: str) -> str:
    """The absolute path of a folder; names of the Hub stay as they are, and so does an empty one."""
    return str(Path(name).expanduser().absolute()) if name and Path(name).expanduser().exists() else name


def named_in(folder: str) -> Optional[str]:
    """The reference of an exported network; None if its folder names none.

    Raises:
        UserError: If its file is damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    name = read_json(file).get("reference")
    if not isinstance(name, str):
        raise UserError(f"{file} is damaged, as it does not name a reference network: {REMEDY}")
    return name


def load(module: Any, name: str) -> transformers.PreTrainedModel:
    """Loads the reference network, on the device of the module, without gradients.

    Args:
        module: The `PreferenceTuning`, whose network and tokenizer it must fit.
        name: Folder, run or Hub name; empty if it is unknown.
    """
    if not name:
        raise UserError(
            f"the reference network was a new one with random weights, which do not exist any more: {REMEDY}"
        )
    builder = dataclasses.replace(module.builder(), adapter=None)
    try:
        network, new = builder.load(pretrained_name(name), training=False)
    except UserError as error:
        raise UserError(f"the reference network cannot be loaded: {error}; {REMEDY}") from error
    if new:
        raise UserError(f"{name} has no weights for {', '.join(new[:5])}, so it cannot be the reference: {REMEDY}")
    module.print(f"reference: {name}")
    network.config.pad_token_id = None
    return network.to(module.trainer.strategy.root_device).eval().requires_grad_(False)


@torch.no_grad()
def compute(module: Any, split: str, network: Optional[transformers.PreTrainedModel] = None) -> Tensor:
    """The log-probabilities of both answers of each row of a split; all processes call it, each computes a part.

    Args:
        module: The `PreferenceTuning`.
        split: Name of the split.
        network: The reference network. Default: that of the module, as it is now.

    Returns:
        (rows, 2) float32 on the CPU.
    """
    data, trainer = module.trainer.datamodule, module.trainer
    examples = Examples(data.examples[split].rows, None)
    module.print(f"{split}: computing the reference's log-probabilities of {len(examples):,} rows")
    own, places = network or module.network, list[int]()
    found = list[Tensor]()
    training = own.training
    own.eval()
    for places_of_batch in SequentialBatches(len(examples), data.batch_size, data.replica, data.replicas):
        batch = data.collate([examples[place] for place in places_of_batch])
        moved = trainer.strategy.batch_to_device(batch, module.device)
        with trainer.precision_plugin.forward_context():
            log_probs, _ = module.answer_log_probs(moved, own)
        places += batch["id"]
        found.append(log_probs)
    own.train(training)
    rows = module.all_gather(torch.tensor(places, device=module.device)).flatten()
    values = module.all_gather(torch.cat(found)).reshape(-1, 2)
    result = values.new_zeros(len(examples), 2)
    result[rows[rows != PADDING]] = values[rows != PADDING]
    return result.cpu()


def refuse_other(saved: Any, own: str) -> None:
    """Refuses a checkpoint whose log-probabilities are those of another reference than this run's.

    Args:
        saved: The name of the checkpoint's reference; None if it has none.
        own: That of this run's.
    """
    if saved is not None and saved != own:
        raise UserError(
            f"the checkpoint has the log-probabilities of the reference {saved or 'with random weights'}, but this "
            f"run's is {own or 'a new network'}: resume with the same, or start a new run from the weights with "
            "--model.pretrained RUN/model"
        )


def saved_values(saved: Any, split: str, keys: Tensor) -> Tensor:
    """The log-probabilities in a checkpoint, for the rows of a split.

    Args:
        saved: What the checkpoint has: by split, `keys` of the rows and their `log_probs`.
        split: Name of the split.
        keys: Keys of the rows, (rows,) int64.

    Returns:
        (rows, 2) float32.

    Raises:
        UserError: If the checkpoint does not have all rows.
    """
    known: dict[int, Tensor] = {}
    try:
        for part in (saved or {}).values():
            known |= dict(zip(part["keys"].tolist(), part["log_probs"].float().view(-1, 2), strict=True))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint is damaged: its reference cannot be read ({error})") from error
    missing = sum(key not in known for key in keys.tolist())
    if missing:
        raise UserError(
            f"the checkpoint does not have the reference's log-probabilities of {missing:,} rows of the {split} split: "
            "resume with the same rows, or start a new run from the weights with --model.pretrained RUN/model"
        )
    return torch.stack([known[key] for key in keys.tolist()])
