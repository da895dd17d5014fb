"""Sentence pairs: combines sentences of the shards to pairs of segments for next-sentence prediction.

As in BERT (Devlin et al., 2019, arXiv:1810.04805), segment B follows segment A in half of the pairs, and is from
another document in the other half. Together, the segments fill the block if the documents are long enough.
"""

import numpy as np

from lm_lightning.data.shards import Split
from lm_lightning.errors import UserError

NEXT, RANDOM = 0, 1  # labels, as in BERT


class SentencePairs:
    """Pairs of segments from a split.

    Args:
        split: Tokens with documents and sentences.
        room: Maximum number of tokens of both segments together.
        name: Name of the split, for messages.
    """

    def __init__(self, split: Split, room: int, name: str) -> None:
        self.split, self.room = split, room
        if len(split.documents) < 2:
            raise UserError(
                f"next-sentence pairs need two documents or more, but the {name} split has {len(split.documents)}: "
                "use another data.corpus.document, give more text, or set data.next_sentence to false"
            )
        # The first sentence of each document, and the end of the last one
        self.first: np.ndarray = np.append(np.searchsorted(split.sentences, split.documents), len(split.sentences))
        self.usable = np.flatnonzero(np.diff(self.first) > 1)  # documents with two sentences or more
        if len(self.usable) == 0:
            raise UserError(
                f"next-sentence pairs need documents of two sentences or more, but the {name} split has none: use "
                "data.corpus.document file or paragraph, or set data.next_sentence to false"
            )

    def __len__(self) -> int:
        return -(-len(self.split.tokens) // self.room)

    def pair(self, sample: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """The tokens of segments A and B, at least one each, and `NEXT` or `RANDOM`.

        Args:
            sample: Determines the position of A, which is near token `sample * room`.
            generator: Random generator that determines the rest.
        """
        begin = int(np.searchsorted(self.split.sentences, sample * self.room))
        document = int(np.searchsorted(self.first, begin, side="right")) - 1
        next_usable = int(np.searchsorted(self.usable, document))
        document = int(self.usable[min(next_usable, len(self.usable) - 1)])
        first, last = int(self.first[document]), int(self.first[document + 1])  # sentences of the document
        begin = min(max(begin, first), last - 2)  # the last sentence has no successor
        stop = begin + 2  # end of the sentences that fill the room
        while stop < last and self.token(stop) - self.token(begin) < self.room:
            stop += 1
        middle = int(generator.integers(begin + 1, stop))  # first sentence of B, if it follows A
        label = NEXT if generator.random() < 0.5 else RANDOM
        b_begin, b_last = middle, last
        if label == RANDOM:  # any sentence of another document
            b_begin = int(generator.integers(len(self.split.sentences) - (last - first)))
            b_begin += last - first if b_begin >= first else 0
            b_last = int(self.first[np.searchsorted(self.first, b_begin, side="right")])

        # If necessary, A is shortened at its beginning and B at its end, so that B still directly follows A.
        a_start, a_stop = self.token(begin), self.token(middle)
        b_start, b_stop = self.token(b_begin), self.token(b_last)
        a_start = max(a_start, a_stop - max(self.room // 2, self.room - (b_stop - b_start)))
        b_stop = min(b_stop, b_start + self.room - (a_stop - a_start))
        tokens = self.split.tokens
        return tokens[a_start:a_stop].astype(np.int64), tokens[b_start:b_stop].astype(np.int64), label

    def token(self, sentence: int) -> int:
        """Index of the first token of a sentence; for the number of sentences, the end of the tokens."""
        return int(self.split.sentences[sentence]) if sentence < len(self.split.sentences) else len(self.split.tokens)
