"""Sentence pairs: sentences of the shards in, two segments that may follow each other out.

As in BERT (Devlin et al., 2019, arXiv:1810.04805), segment B follows A in its document in half of the pairs, and comes
from another document in the others, and the two together fill the block as far as the documents reach.
"""

import numpy as np

from lm_lightning.data.shards import Split
from lm_lightning.errors import UserError

NEXT, RANDOM = 0, 1  # labels, as BERT has them


class SentencePairs:
    """Pairs of one length from one split.

    Args:
        split: Tokens with documents and sentences.
        room: Tokens of both segments together, at most.
        name: Name of the split, for messages.
    """

    def __init__(self, split: Split, room: int, name: str) -> None:
        self.split, self.room = split, room
        if len(split.documents) < 2:
            raise UserError(
                f"next-sentence pairs need two documents or more, but the {name} split has {len(split.documents)}: "
                "take another data.corpus.document, give more text, or switch data.next_sentence off"
            )
        # first sentence of each document, and an end
        self.first: np.ndarray = np.append(np.searchsorted(split.sentences, split.documents), len(split.sentences))
        self.usable = np.flatnonzero(np.diff(self.first) > 1)  # documents in which a sentence has a successor
        if len(self.usable) == 0:
            raise UserError(
                f"next-sentence pairs need documents of two sentences or more, and the {name} split has none: take "
                "data.corpus.document file or paragraph, or switch data.next_sentence off"
            )

    def __len__(self) -> int:
        return -(-len(self.split.tokens) // self.room)

    def pair(self, sample: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """The tokens of segments A and B, at least one each, and `NEXT` or `RANDOM`.

        Args:
            sample: Where A is: about at token `sample * room`.
            generator: Decides the rest.
        """
        begin = int(np.searchsorted(self.split.sentences, sample * self.room))
        document = int(np.searchsorted(self.first, begin, side="right")) - 1
        next_usable = int(np.searchsorted(self.usable, document))
        document = int(self.usable[min(next_usable, len(self.usable) - 1)])
        first, last = int(self.first[document]), int(self.first[document + 1])  # sentences of the document
        begin = min(max(begin, first), last - 2)  # the last sentence has no successor
        stop = begin + 2  # of the sentences that fill the room
        while stop < last and self.token(stop) - self.token(begin) < self.room:
            stop += 1
        middle = int(generator.integers(begin + 1, stop))  # where B begins, if it follows
        label = NEXT if generator.random() < 0.5 else RANDOM
        b_begin, b_last = middle, last
        if label == RANDOM:  # any sentence but those of the document
            b_begin = int(generator.integers(len(self.split.sentences) - (last - first)))
            b_begin += last - first if b_begin >= first else 0
            b_last = int(self.first[np.searchsorted(self.first, b_begin, side="right")])

        # Shortened to the room at A's beginning and B's end, so that true pairs stay neighbours.
        a_start, a_stop = self.token(begin), self.token(middle)
        b_start, b_stop = self.token(b_begin), self.token(b_last)
        a_start = max(a_start, a_stop - max(self.room // 2, self.room - (b_stop - b_start)))
        b_stop = min(b_stop, b_start + self.room - (a_stop - a_start))
        tokens = self.split.tokens
        return tokens[a_start:a_stop].astype(np.int64), tokens[b_start:b_stop].astype(np.int64), label

    def token(self, sentence: int) -> int:
        """Where a sentence starts in the tokens; one past the last is their end."""
        return int(self.split.sentences[sentence]) if sentence < len(self.split.sentences) else len(self.split.tokens)
