"""Finds the best legal sequence of labels for the scores of each word."""

import torch
from torch import Tensor

from lm_lightning.tasks.tagging.data import OUTSIDE, PREFIXES, parts


def legal(labels: list[str], scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which labels of a scheme for spans may follow each other.

    Args:
        labels: Names of the labels.
        scheme: `bio` or `bioes`.

    Returns:
        Scores that are 0 if legal and -inf if not: of each label as the first one, (L,) float32; of each pair of
        successive labels, (L, L); of each label as the last one, (L,).
    """
    closed = "E" in PREFIXES[scheme]  # whether spans must end with E- or S-

    def may_follow(before: str, after: str) -> bool:
        (prefix, kind), (next_prefix, next_kind) = parts(before), parts(after)
        inside = next_prefix in ("I", "E")
        if inside:
            return kind == next_kind and prefix in ("B", "I")
        return not (closed and prefix in ("B", "I"))

    allowed = torch.tensor([[may_follow(before, after) for after in labels] for before in labels])
    first = torch.tensor([may_follow(OUTSIDE, label) for label in labels])
    last = torch.tensor([may_follow(label, OUTSIDE) for label in labels])
    scores = [torch.zeros(x.shape).masked_fill(~x, -torch.inf) for x in (first, allowed, last)]
    return scores[0], scores[1], scores[2]


def decode(scores: Tensor, lengths: Tensor, rules: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The sequences of labels with the highest sums of scores, by Viterbi's algorithm.

    Args:
        scores: (B, W, L) float32.
        lengths: Number of words of each sentence, (B,) int64, 1 or more.
        rules: See `legal`.

    Returns:
        (B, W) int64; -100 after the end of a sentence.
    """
    first, following, last = (rule.to(scores.device) for rule in rules)
    best = scores[:, 0] + first  # score of the best sequence that ends with each label
    before = []
    for word in range(1, scores.shape[1]):
        longer, origin = (best.unsqueeze(2) + following).max(1)
        inside = (word < lengths).unsqueeze(1)
        best = torch.where(inside, longer + scores[:, word], best)
        before.append(origin)
    label = (best + last).argmax(1)
    labels = [label]
    for word in range(scores.shape[1] - 1, 0, -1):
        label = torch.where(word < lengths, before[word - 1].gather(1, label.unsqueeze(1)).squeeze(1), label)
        labels.append(label)
    best = torch.stack(labels[::-1], 1)
    return best.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= lengths.unsqueeze(1), -100)
