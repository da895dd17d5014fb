"""Sentence embeddings: learns to embed texts that belong together, or that are similar, near each other."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lm_lightning import files
from lm_lightning.compat.lightning import restart_workers
from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.finetuning.metrics import correlations
from lm_lightning.models.metrics import Mode
from lm_lightning.models.module import LanguageModule
from lm_lightning.tasks.embedding import modules as embedding
from lm_lightning.tasks.embedding.export import SentenceTransformersFiles
from lm_lightning.tasks.embedding.mining import Mining, mine
from lm_lightning.tasks.embedding.modules import Pooling
from lm_lightning.tasks.embedding.retrieval import Judgments
from lm_lightning.tasks.embedding.retrieval import split as split_texts


class Embeddings(NamedTuple):
    """Embeddings of an evaluation: `rows`, (B,), and the embeddings of their first and second texts, (B, D) each."""

    rows: Tensor
    first: Tensor
    second: Tensor


class SentenceEncoder(LanguageModule):
    """A network of `transformers` whose states are pooled into one embedding of length 1.

    If texts have pairs, the network learns that a text is nearer to its own pair than to all other candidates of the
    batch (the pairs of the other rows, and all hard negatives), by the cross entropy of the cosine similarities (van
    den Oord et al., 2018). Other correct answers are not candidates. If there are scores, it learns that the cosine
    similarity equals the score.

    A batch consists of the texts that are embedded together: the `data.batch_size` rows of a micro-batch; with
    `gather_across_devices`, those of all processes. More micro-batches per optimizer step do not add candidates; to
    get more, increase `data.batch_size`, with `mini_batch_size` if there is not enough memory. The loss of an
    evaluation uses the candidates of the full split, so that it does not depend on the batches; it is higher than the
    training loss, which has fewer candidates.

    Args:
        pooling: `mean` of the tokens, or the first token, `cls`. Default: the setting in the folder of `pretrained`,
            otherwise mean.
        scale: Factor of the cosine similarities in the cross entropy, the inverse of its temperature.
        gather_across_devices: Whether the candidates are those of all processes, instead of those of each process.
        mini_batch_size: Number of texts that are embedded at once. Their activations are recomputed in the backward
            pass, one mini-batch after the other, so that a batch of any size needs the memory of only one mini-batch
            (gradient caching, Gao et al., 2021). Default: the full batch.
        mining: Hard negatives that are searched between epochs with the network itself.
        options: Options of all models, see `LanguageModule`.
    """

    auto_class = transformers.AutoModel
    unused = ("pooler.",)

    @staticmethod
    def main_metric(data: Any) -> str:
        options, retrieval = data.get("columns") or {}, data.get("retrieval") or {}
        return "spearman" if options.get("score") and not retrieval.get("validation") else "ndcg_10"

    def __init__(
        self,
        pooling: Optional[Pooling] = None,
        scale: float = 20.0,
        gather_across_devices: bool = False,
        mini_batch_size: Optional[int] = None,
        mining: Mining = Mining(),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not scale > 0:
            raise UserError(f"model.scale is {scale}, but must be more than 0")
        if mini_batch_size is not None and mini_batch_size < 1:
            raise UserError(f"model.mini_batch_size is {mini_batch_size}, but must be 1 or more")
        self.pooling: Pooling = pooling or "mean"
        self.pooling_given, self.scale = pooling is not None, scale
        self.gather_across_devices, self.mini_batch_size = gather_across_devices, mini_batch_size
        self.seen: list[Embeddings] = []
        mining.check()
        self.mining = mining
        self.mined: Optional[dict[str, Any]] = None  # `epoch` at whose start the hard negatives were searched, `rows`

    # Network

    def network_made(self) -> None:
        pooler = getattr(self.network, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)  # its output is not used
        if self.pretrained is not None and not self.pooling_given:
            self.pooling = embedding.pooling_of(self.pretrained_folder()) or "mean"
        if self.mining.every_n_epochs and self.trainer.datamodule.columns.score is not None:
            raise UserError("model.mining is for pairs that belong together: omit it, or data.columns.score")

    def extra_files(self) -> SentenceTransformersFiles:
        data, size = self.trainer.datamodule, self.network.config.hidden_size
        prompts = data.prompts
        return SentenceTransformersFiles(self.pooling, size, data.block_size, prompts.query, prompts.document)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"pooling": self.pooling, "mined": self.mined}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("pooling", self.pooling)
        if self.pooling_given and saved != self.pooling:
            raise UserError(
                f"model.pooling is {self.pooling}, but the checkpoint was made with {saved}: omit model.pooling"
            )
        self.pooling = saved
        self.mined = checkpoint.get("mined")

    # Hard negatives

    def on_train_start(self) -> None:
        super().on_train_start()
        self.update_negatives()  # as Lightning omits the next hook if it resumes in the middle of an epoch

    def on_train_epoch_start(self) -> None:
        self.update_negatives()

    def update_negatives(self) -> None:
        """Searches hard negatives, if they are due and the checkpoint does not have them."""
        if not self.mining.every_n_epochs:
            return
        data, due = self.trainer.datamodule, self.mining.due(self.trainer.current_epoch)
        examples, mined = data.examples["train"], None
        if due is not None:
            if self.mined is None or self.mined["epoch"] != due:
                self.mined = {"epoch": due, "rows": mine(self, examples, self.mining)}
            mined = self.mined["rows"]
        if mined is not examples.mined:
            examples.mined = mined
            if mined is not None:
                examples.texts()  # once, before the workers get copies
            if data.num_workers:
                restart_workers(self.trainer)

    # Steps

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of tokens, (B, T) int64 with their mask: (B, D) float32."""
        return embedding.pool(self.network(input_ids=ids, attention_mask=mask)[0], mask, self.pooling)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The same, in mini-batches if gradients are required and `mini_batch_size` is set.

        Activation checkpointing of each mini-batch implements gradient caching: the backward pass has the gradient of
        the loss for all embeddings before it recomputes the first mini-batch, with the same random numbers.
        """
        if self.mini_batch_size is None or not torch.is_grad_enabled():
            return self.pooled(ids, mask)
        chunks = zip(ids.split(self.mini_batch_size), mask.split(self.mini_batch_size))
        return torch.cat([checkpoint(self.pooled, *chunk, use_reentrant=False) for chunk in chunks])

    def both(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Embeddings of the first texts and of the candidates of a batch, (B, D) and (C, D) float32."""
        first = self.embed(batch["input_ids"], batch["attention_mask"])
        return first, self.embed(batch["candidate_ids"], batch["candidate_mask"])

    def losses(self, batch: dict, first: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses of rows with targets, and the number of these rows."""
        targets = batch["targets"]
        with torch.autocast(self.device.type, enabled=False):  # the 8 bits of bf16 are too few for cosine similarities
            if targets.is_floating_point():
                counts = ~targets.isnan()
                cosines = (first * candidates).sum(-1)
                return ((cosines - targets.nan_to_num()).square() * counts).sum(), counts.sum()
            counts, offset, keys = targets != -100, 0, batch["candidate_keys"]
            roles = len(keys) // len(targets)
            owners = torch.cat([batch["keys"], torch.zeros_like(keys[len(targets) :])])  # 0 for negatives
            offered = counts.repeat(roles)
            if self.gather_across_devices and self.training and self.trainer.world_size > 1:
                offset = self.global_rank * len(keys)
                candidates = self.all_gather(candidates, sync_grads=True).flatten(0, 1)
                keys, owners, offered = (self.all_gather(t).flatten() for t in (keys, owners, offered))
            own = offset + torch.arange(len(targets), device=self.device)
            allowed = select_candidates(batch["keys"], own, keys, owners, offered)
            cosines = (self.scale * first @ candidates.T).masked_fill(~allowed, -torch.inf)
            return F.cross_entropy(cosines, own.where(counts, -100), ignore_index=-100, reduction="sum"), counts.sum()

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over targets, and their number.

        Batches are described at `collate_pairs`.
        """
        return self.losses(batch, *self.both(batch))

    # Evaluation

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        rows = torch.tensor(batch["id"], device=self.device)
        if "candidate_ids" not in batch:  # a search
            alone = self.embed(batch["input_ids"], batch["attention_mask"])
            self.seen.append(Embeddings(rows, alone, alone))
            self.val_loss.update(alone.new_zeros(()), alone.new_zeros(()))  # no rows: a search has no loss
            return
        first, candidates = self.both(batch)
        if batch["targets"].is_floating_point():  # otherwise it is computed at the end, over all candidates
            self.val_loss.update(*self.losses(batch, first, candidates))
        self.seen.append(Embeddings(rows, first, candidates[: len(rows)]))

    def gather_embeddings(self) -> Embeddings:
        """The embeddings of all processes, each row once, in the order of the rows."""
        own = [torch.cat(parts) for parts in zip(*self.seen)]
        self.seen = []
        gathered = [self.all_gather(part) for part in own]
        rows, *vectors = [all_ if self.trainer.world_size == 1 else all_.flatten(0, 1) for all_ in gathered]
        found, inverse = rows.unique(return_inverse=True)
        place = torch.empty_like(found).scatter_(0, inverse, torch.arange(len(rows), device=rows.device))
        place = place[found != PADDING]
        return Embeddings(rows[place], *(part[place] for part in vectors))

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        data = self.trainer.datamodule
        names = ("ndcg_10", "mrr_10", "recall_100") if "validation" in data.judged else ("spearman", "pearson")
        modes: dict[str, Optional[Mode]] = {"loss": "min"} if not getattr(data.retrieval, "validation", None) else {}
        return modes | dict.fromkeys(names, "max")

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds the correlation of cosine similarities and scores, or metrics of how well correct answers are found."""
        data, seen = self.trainer.datamodule, self.gather_embeddings()
        if split in data.judged:
            found = ranking(seen, data.judged[split])
            examples = data.examples[split].rows
            if len(examples[0]["lengths"]) > 1:  # pairs, not queries and documents
                found = {"loss": self.full_split_loss(seen, examples)} | found
            return found
        scores = torch.stack([data.examples[split].rows[row]["targets"] for row in seen.rows.tolist()])
        return {"loss": loss} | correlations((seen.first * seen.second).sum(-1), scores.to(self.device))

    def full_split_loss(self, seen: Embeddings, examples: list[dict]) -> Tensor:
        """The mean loss of the rows, each compared with the pairs of all rows, () float32.

        As in a batch, equal texts are one candidate, and the other correct answers of a text are not candidates.

        Args:
            seen: Embeddings of the rows that were evaluated.
            examples: The rows of the split.
        """
        texts, pairs = zip(*(map(tuple, split_texts(examples[row])[:2]) for row in seen.rows.tolist()))
        numbers: dict[tuple, int] = {}  # number of each candidate
        places: list[int] = []  # row number of each candidate
        answers: dict[tuple, set[int]] = {}
        for place, (text, pair) in enumerate(zip(texts, pairs)):
            if pair not in numbers:
                numbers[pair] = len(places)
                places.append(place)
            answers.setdefault(text, set()).add(numbers[pair])
        candidates, total = seen.second[places].float(), 0.0
        for start in range(0, len(texts), 256):
            chunk = range(start, min(start + 256, len(texts)))
            cosines = self.scale * seen.first[start : chunk.stop].float() @ candidates.T
            own = torch.tensor([numbers[pairs[row]] for row in chunk], device=self.device)
            for line, row in enumerate(chunk):
                excluded = (answers[texts[row]] | {numbers.get(texts[row])}) - {numbers[pairs[row]], None}
                cosines[line, list(excluded)] = -torch.inf
            total += float(F.cross_entropy(cosines, own, reduction="sum"))
        return torch.tensor(total / len(texts), device=self.device)

    # Prediction

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """For each row: its number, `id`, and its `text`. The embeddings are written to the index at the end."""
        rows = torch.tensor(batch["id"], device=self.device)
        alone = self.embed(batch["input_ids"], batch["attention_mask"])
        self.seen.append(Embeddings(rows, alone, alone[:, :0]))
        texts = self.trainer.datamodule.answered
        return [{"id": row, "text": texts[row]["text"]} for row in batch["id"]]

    def on_predict_epoch_end(self) -> None:
        """Writes `index/` in the run folder.

        It contains `embeddings.npy`, (rows, D) float32, in the order of the rows; `rows.jsonl` with their `id` and
        `text`; `index.json`, which names the model; and, if a checkpoint was used, its model.
        """
        seen, folder = self.gather_embeddings(), Path(self.trainer.default_root_dir) / "index"
        of_checkpoint = self.trainer.ckpt_path is not None
        if self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "index.json").unlink(missing_ok=True)  # written last: an index with it is complete
        if of_checkpoint and (exported := self.exporter().model()) is not None:  # (in the first process)
            exported.write(folder / "model")
        if not self.trainer.is_global_zero:
            return
        data = self.trainer.datamodule
        with files.replacing(folder / "embeddings.npy", "wb") as file:
            np.save(file, seen.first.float().cpu().numpy())
        lines = (json.dumps(data.answered[row], ensure_ascii=False) + "\n" for row in seen.rows.tolist())
        files.write_text(folder / "rows.jsonl", "".join(lines))
        model = "model" if of_checkpoint else self.pretrained_folder()
        if not of_checkpoint and Path(model).is_dir():
            model, own = str(Path(model).resolve()), folder.resolve()
            evaluations = own.parents[1]
            if evaluations.name == "evaluations" and Path(model).is_relative_to(evaluations.parent):
                model = Path(os.path.relpath(model, own)).as_posix()  # relative, as the run may be moved
        about = {"model": model, "pooling": self.pooling, "max_length": data.block_size, "prompt": data.prompts.query}
        files.write_text(folder / "index.json", json.dumps(about, indent=2))
        print(f"index: {folder}, {len(seen.rows):,} rows")


def select_candidates(texts: Tensor, own: Tensor, keys: Tensor, owners: Tensor, offered: Tensor) -> Tensor:
    """Selects the candidates with which each text is compared: all except the text's other correct answers.

    Equal candidates count once.

    Args:
        texts: Keys of the texts, (B,) int64; equal texts have equal keys.
        own: Index of each text's pair among the candidates, (B,) int64.
        keys: Keys of the candidates, (C,) int64.
        owners: Key of the text to which each candidate belongs as its pair; 0 for hard negatives, (C,) int64.
        offered: Whether each candidate belongs to a row that is not padding, (C,) bool.

    Returns:
        (B, C) bool.
    """
    same = keys == keys[own].unsqueeze(1)
    other_answer = owners == texts.unsqueeze(1)
    itself = keys == texts.unsqueeze(1)
    order = torch.arange(len(keys), device=keys.device)
    repeated = ((keys == keys.unsqueeze(1)) & (order < order.unsqueeze(1)) & offered).any(1)
    allowed = offered & ~repeated & ~same & ~other_answer & ~itself
    return allowed.scatter(1, own.unsqueeze(1), True)


def ranking(seen: Embeddings, judged: Judgments, most: int = 100) -> dict[str, Tensor]:
    """Metrics of how well correct answers are found among all documents, each a mean over the queries, () float32.

    Args:
        seen: Embeddings of all rows; rows that a limited evaluation has not read are omitted.
        judged: The correct answers.
        most: Number of best documents that are considered.

    Returns:
        `ndcg_10`, the discounted cumulative gain of the first ten documents, divided by the maximum (Järvelin and
        Kekäläinen, 2002; with linear gains, as in trec_eval); `mrr_10`, the inverse rank of the first correct answer, 0
        if it is not among the first ten; `recall_100`, the fraction of the correct answers among the first hundred.
    """
    place = {row: i for i, row in enumerate(seen.rows.tolist())}
    documents = [row for row in judged.documents if row in place]
    column = {row: i for i, row in enumerate(documents)}
    excluded = judged.excluded or [None] * len(judged.queries)
    asked = [
        (place[row], relevant, -1 if own is None else column.get(own, -1))
        for row, relevant, own in zip(judged.queries, judged.relevant, excluded)
        if row in place
    ]
    names = ("ndcg_10", "mrr_10", "recall_100")
    if not documents or not asked:
        return {name: seen.first.new_zeros(()) for name in names}
    searched = seen.second[[place[row] for row in documents]]
    discounts = 1 / torch.log2(torch.arange(10) + 2.0)
    sums = dict.fromkeys(names, 0.0)
    for start in range(0, len(asked), 256):
        part = asked[start : start + 256]
        cosines = seen.first[[query for query, _, _ in part]] @ searched.T
        for row, (_, _, own) in enumerate(part):
            if own >= 0:
                cosines[row, own] = -torch.inf
        # Padding changes the last digits of the equal similarities of equal texts; their order must not depend on it.
        best = cosines.round(decimals=6).topk(min(most, len(documents))).indices.tolist()
        for (_, relevant, own), ranks in zip(part, best):
            gains = torch.tensor([0.0 if i == own else relevant.get(documents[i], 0.0) for i in ranks])
            ideal = torch.tensor(sorted(relevant.values(), reverse=True)[:10])
            sums["ndcg_10"] += float(gains[:10] @ discounts[: len(gains)] / (ideal @ discounts[: len(ideal)]))
            hits = gains.nonzero().flatten().tolist()
            sums["mrr_10"] += 1 / (hits[0] + 1) if hits and hits[0] < 10 else 0.0
            sums["recall_100"] += len(hits) / len(relevant)
    return {name: seen.first.new_tensor(total / len(asked)) for name, total in sums.items()}
