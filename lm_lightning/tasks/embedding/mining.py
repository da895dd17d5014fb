"""Hard negatives that the network finds itself: wrong passages that it ranks near a text.

All passages, the pairs of the training rows, are embedded and searched again after some epochs, since what is hard
changes (ANCE: Xiong et al., Approximate Nearest Neighbor Negative Contrastive Learning, 2021). Passages that are nearly
as similar as the correct one are omitted, as they often are correct answers that are not marked (NV-Retriever: Moreira
et al., Improving Text Embedding Models with Positive-aware Hard-negative Mining, 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lm_lightning.data.order import PADDING, SequentialBatches, sequence_key
from lm_lightning.errors import UserError
from lm_lightning.finetuning.examples import Examples
from lm_lightning.tasks.embedding.retrieval import split

DEPTH = 100  # passages that are considered for a text, in addition to those that are skipped
SCORES = 1 << 24  # similarities that are computed at once
NONE = -1  # in place of a mined negative


@dataclass
class Mining:
    """Hard negatives that the model finds among the pairs of all training rows.

    Args:
        every_n_epochs: Number of epochs after which they are searched again. 0: they are not searched.
        first_epoch: First epoch, counted from 0, that has them; the network must already rank passages usefully.
        negatives: Number of hard negatives of each row. Rows for which there are fewer are trained with fewer.
        skip: Number of the nearest wrong passages of each text that are not used.
        margin: A passage is used if its cosine similarity to the text is lower than that of the correct one by this
            share.
    """

    every_n_epochs: int = 0
    first_epoch: int = 1
    negatives: int = 1
    skip: int = 0
    margin: float = 0.05

    def check(self) -> None:
        """Refuses invalid options."""
        for name, least in {"every_n_epochs": 0, "first_epoch": 0, "negatives": 1, "skip": 0, "margin": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"model.mining.{name} is {getattr(self, name)}, but must be {least} or more")

    def due(self, epoch: int) -> Optional[int]:
        """The epoch at whose start the hard negatives of an epoch are searched; None if it has none."""
        if not self.every_n_epochs or epoch < self.first_epoch:
            return None
        return epoch - (epoch - self.first_epoch) % self.every_n_epochs


class Distinct:
    """The distinct texts among the first or second texts of rows.

    Args:
        rows: The rows.
        place: 0 for first texts, 1 for second ones.

    Attributes:
        rows: For each distinct text, the first row that has it, (texts,) int64.
        lengths: Their numbers of tokens, (texts,) int64.
        number: For each row, the number of its text, (rows,) int64.
        keys: Keys of the texts, see `sequence_key`.
    """

    def __init__(self, rows: Sequence[dict], place: int) -> None:
        self.keys: dict[int, int] = {}
        first, lengths, number = list[int](), list[int](), list[int]()
        for row, example in enumerate(rows):
            tokens = split(example)[place]
            found = self.keys.setdefault(sequence_key(tokens), len(first))
            if found == len(first):
                first.append(row)
                lengths.append(len(tokens))
            number.append(found)
        self.rows, self.lengths, self.number = (np.array(values, np.int64) for values in (first, lengths, number))


class PairExamples(Examples):
    """Tokenized pairs.

    Attributes:
        mined: For each distinct first text, the rows whose second texts are its hard negatives, or `NONE`, (texts,
            negatives) int64; None if there are none.
    """

    mined: Optional[Tensor] = None
    distinct: Optional[tuple[Distinct, Distinct]] = None

    def texts(self) -> tuple[Distinct, Distinct]:
        """The distinct first texts and the distinct second texts."""
        if self.distinct is None:
            self.distinct = Distinct(self.rows, 0), Distinct(self.rows, 1)
        return self.distinct

    def __getitem__(self, position: int) -> dict:
        item = super().__getitem__(position)
        if self.mined is None or item["id"] == PADDING:
            return item
        ids, lengths = list(item["input_ids"]), list(item["lengths"])
        for row in self.mined[self.texts()[0].number[item["id"]]].tolist():
            # The row's own pair takes the place of a missing negative, and does not count as another candidate.
            tokens = split(item if row == NONE else self.rows[row])[1]
            ids += tokens
            lengths.append(len(tokens))
        return item | {"input_ids": ids, "lengths": lengths}


@torch.no_grad()
def mine(module: Any, examples: PairExamples, options: Mining) -> Tensor:
    """Searches hard negatives; all processes call it, and each does a part.

    Args:
        module: The `SentenceEncoder`.
        examples: The training rows.
        options: The options.

    Returns:
        `mined` of `PairExamples`, on the CPU; the same in all processes.
    """
    data, network = module.trainer.datamodule, module.network
    texts, passages = examples.texts()
    training = network.training
    network.eval()
    queries = embeddings(module, examples, texts, 0, "embed texts")
    documents = embeddings(module, examples, passages, 1, "embed passages")
    network.train(training)
    answers: list[set[int]] = [set() for _ in texts.rows]
    for text, passage in zip(texts.number.tolist(), passages.number.tolist()):
        answers[text].add(passage)
    same = [passages.keys.get(key) for key in texts.keys]  # passages that are equal to the text
    size = max(1, SCORES // len(passages.rows))
    batches = SequentialBatches(len(texts.rows), size, data.replica, data.replicas)
    parts, places = list[Tensor](), list[int]()
    for part in progress(module, batches, "search"):
        rows = [max(row, 0) for row in part]
        cosines = (queries[rows] @ documents.T).round(decimals=6)
        own = [(line, passage) for line, row in enumerate(rows) for passage in answers[row]]
        lines, columns = torch.tensor(own, device=cosines.device).T
        limit = cosines.new_full((len(rows),), torch.inf).scatter_reduce(0, lines, cosines[lines, columns], "amin")
        own += [(line, same[row]) for line, row in enumerate(rows) if same[row] is not None]
        cosines[tuple(torch.tensor(own, device=cosines.device).T)] = -torch.inf
        parts.append(select(cosines, limit - options.margin * limit.abs(), options))
        places += part
    found = gathered(module, torch.cat(parts), places, len(texts.rows)).cpu()
    rows_of = torch.from_numpy(passages.rows)
    missing = int((found[:, -1] == NONE).sum())
    module.print(
        f"hard negatives: {int((found != NONE).sum()):,} found for {len(found):,} texts among {len(rows_of):,} passages"
        + (f"; {missing:,} texts have fewer than {options.negatives}" if missing else "")
    )
    return torch.where(found == NONE, NONE, rows_of[found.clamp(min=0)])


def select(cosines: Tensor, limit: Tensor, options: Mining) -> Tensor:
    """The nearest passages below the limits.

    Args:
        cosines: Similarities of texts and passages, -inf for those that are no negatives: (B, P).
        limit: Highest similarity of a negative, (B,).
        options: How many are used and skipped.

    Returns:
        Numbers of passages, `NONE` where there are no more, (B, negatives) int64.
    """
    values, best = cosines.topk(min(options.skip + options.negatives + DEPTH, cosines.shape[1]))
    usable = (values < limit.unsqueeze(1)) & values.isfinite()
    usable[:, : options.skip] = False
    places = torch.arange(best.shape[1], device=best.device).where(usable, best.shape[1])
    places = torch.nn.functional.pad(places, (0, options.negatives), value=best.shape[1]).sort(1).values
    places = places[:, : options.negatives]
    return best.gather(1, places.clamp(max=best.shape[1] - 1)).where(places < best.shape[1], NONE)


def embeddings(module: Any, examples: PairExamples, texts: Distinct, place: int, title: str) -> Tensor:
    """The embeddings of distinct texts, (texts, D) float32, on the device of the module."""
    data, trainer = module.trainer.datamodule, module.trainer
    longest_first = np.argsort(-texts.lengths, kind="stable")
    batches = SequentialBatches(len(texts.rows), data.batch_size, data.replica, data.replicas)
    found, places = list[Tensor](), list[int]()
    for part in progress(module, batches, title):
        chosen = longest_first[part]  # (for padding, the last one)
        tokens = [split(examples.rows[int(row)])[place] for row in texts.rows[chosen]]
        batch = data.tokenizer.pad({"input_ids": tokens}, padding_side="right", return_tensors="pt").to(module.device)
        with trainer.precision_plugin.forward_context():
            found.append(module.embed(batch["input_ids"], batch["attention_mask"]).float())
        places += [PADDING if position == PADDING else int(row) for position, row in zip(part, chosen)]
    return gathered(module, torch.cat(found), places, len(texts.rows))


def gathered(module: Any, values: Tensor, places: list[int], size: int) -> Tensor:
    """Joins the rows of all processes in their order.

    Args:
        module: The module.
        values: Rows of this process, (N, D).
        places: Place of each in the result, or `PADDING`.
        size: Number of rows of the result.
    """
    rows = module.all_gather(torch.tensor(places, device=values.device)).flatten()
    values = module.all_gather(values).flatten(0, -2)
    result = values.new_zeros(size, values.shape[-1])
    result[rows[rows != PADDING]] = values[rows != PADDING]
    return result


def progress(module: Any, batches: SequentialBatches, title: str) -> Any:
    """Shows the progress of a pass over batches, in the first process."""
    return tqdm(batches, desc=title, leave=False, disable=None if module.trainer.is_global_zero else True)
