"""The features that `fork.py` can omit from a project."""

from dataclasses import dataclass

PACKAGE = "lm_lightning"


@dataclass(frozen=True)
class Feature:
    """A feature, which can be omitted from a project.

    Attributes:
        package: Name of its package within `lm_lightning`; its tests are in the folder of `tests/` with the same path.
        summary: What it does, for `--list`.
        files: Patterns of other files that are useless without it.
        extras: Optional dependencies in `pyproject.toml` that nothing else needs.
        needed_by: Features that need it. It is kept if at least one of these is kept.
        choosable: Whether it can also be kept by its own name.
    """

    package: str
    summary: str
    files: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    needed_by: tuple[str, ...] = ()
    choosable: bool = True


TASKS = ("classification", "tagging", "parsing", "questions", "embedding", "seq2seq", "instruction", "preference")
FEATURES = {
    "gpt": Feature(
        "generation",
        "text generation and chat (GPTs can be trained without it)",
        ("scripts/bench/generation.py",),
        extras=("scores",),
        needed_by=("seq2seq", "instruction", "preference"),
    ),
    "baselines": Feature(
        "baselines",
        "recurrent, convolutional and n-gram language models",
        (
            "configs/lstm.yaml",
            "configs/cnn.yaml",
            "configs/ngram.yaml",
            "docs/baselines.md",
            "docs/images/baselines*",
            "scripts/plot_baselines.py",
        ),
    ),
    "bert": Feature("tasks.masked_lm", "pretraining of BERTs", ("configs/bert*", "configs/modernbert*"), ("bert",)),
    "classification": Feature(
        "tasks.classification",
        "labels or numbers of texts and pairs",
        ("configs/sentiment*", "configs/entailment*", "configs/similarity*"),
    ),
    "tagging": Feature("tasks.tagging", "names, parts of speech, roles", ("configs/tagging*", "configs/roles*")),
    "parsing": Feature("tasks.parsing", "dependency trees", ("configs/parsing*",)),
    "questions": Feature("tasks.questions", "answers in texts", ("configs/questions*",)),
    "embedding": Feature(
        "tasks.embedding",
        "embeddings and semantic search",
        ("configs/embedding*", "configs/search.yaml", "docs/search.md"),
        ("search",),
    ),
    "seq2seq": Feature(
        "tasks.seq2seq",
        "translation, summarization",
        ("configs/translation.yaml", "configs/summarization.yaml", "docs/seq2seq.md"),
    ),
    "instruction": Feature("tasks.instruction", "instruction tuning, chat", ("configs/chat*", "docs/chat.md")),
    "preference": Feature(
        "tasks.preference",
        "DPO, SimPO and ORPO from pairs of answers",
        ("configs/preference*", "docs/preference.md"),
    ),
    "finetuning": Feature(
        "finetuning",
        "tables of labelled rows",
        ("docs/finetuning.md", "examples/rating*", "tests/tables.py", "tests/clauses.py"),
        needed_by=TASKS,
        choosable=False,
    ),
    "lora": Feature("lora", "LoRA and QLoRA", ("docs/lora.md", "configs/chat_lora.yaml"), ("lora",)),
    "compression": Feature(
        "compression", "quantization, pruning, distillation", ("docs/compression.md",), ("compress",)
    ),
    "cuda": Feature("cuda", "kernels of Liger and 8-bit floating point on NVIDIA GPUs", extras=("cuda",)),
    "filters": Feature(
        "filters",
        "filters of corpora: duplicates, quality, language",
        ("configs/filters/", "docs/filters.md"),
        ("filters",),
    ),
    "diagnostics": Feature("diagnostics", "samples behind spikes of the loss, histograms of gradients"),
    "linear_layers": Feature(
        "linear_layers",
        "linear layers of networks",
        needed_by=("lora", "compression", "cuda"),
        choosable=False,
    ),
    "tuning": Feature(
        "tuning",
        "search of hyperparameters, comparison of strategies",
        ("configs/tuning/", "docs/tuning.md"),
        ("tune",),
    ),
    "reports": Feature("reports", "HTML pages of runs", ("docs/images/report.png",)),
    "tracking": Feature("tracking", "Weights & Biases", ("configs/tracking/",), ("wandb",)),
    "sharding": Feature("sharding", "FSDP2 and tensor parallelism, sharded checkpoints", ("configs/strategy/",)),
    "xla": Feature("xla", "TPUs", ("scripts/test_xla.sh",), ("tpu",)),
    "profiling": Feature("profiling", "profiles of training steps"),
}
CHOICES = [name for name, feature in FEATURES.items() if feature.choosable]
TEMPLATE_ONLY = ("scripts/fork.py", "scripts/fork_features.py", "tests/test_fork.py", "docs/forking.md", "CHANGELOG.md")
