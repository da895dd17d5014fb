"""Files that are added to an exported sentence encoder so that sentence-transformers can load it."""

from dataclasses import dataclass
from typing import Any

from lm_lightning.models.export import ExtraFiles
from lm_lightning.tasks.embedding.modules import Pooling


@dataclass
class SentenceTransformersFiles(ExtraFiles):
    """The files that sentence-transformers reads in addition to those of a network.

    Args:
        pooling: How states are pooled.
        size: Size of an embedding.
        max_length: Maximum number of tokens of a text; longer texts are truncated.
        query: Text before queries.
        document: Text before documents.
    """

    pooling: Pooling
    size: int
    max_length: int
    query: str = ""
    document: str = ""

    def files(self) -> dict[str, Any]:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        return {
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(kinds.items())
            ],
            "1_Pooling/config.json": {
                "word_embedding_dimension": self.size,
                "pooling_mode_cls_token": self.pooling == "cls",
                "pooling_mode_mean_tokens": self.pooling == "mean",
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
            },
            "sentence_bert_config.json": {"max_seq_length": self.max_length, "do_lower_case": False},
            "config_sentence_transformers.json": {
                "similarity_fn_name": "cosine",
                "prompts": {"query": self.query, "document": self.document},
                "default_prompt_name": None,
            },
        }
