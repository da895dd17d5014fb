"""A network, a text and a tokenizer, on which this project and a peer are trained in the same way."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import harness
import yaml


@dataclass
class Workload:
    """What is trained.

    Args:
        task: `gpt` or `bert`, whose recipe in `configs/` is used.
        text: Text file. Default: the built-in corpus.
        held_out: Share of its paragraphs, at its end, that is not trained on.
        tokenizer: Folder of a tokenizer. Default: one of 4096 tokens is trained on the text.
        layers: Number of layers of the network.
        hidden: Hidden size of the network, a multiple of 64, as heads have 64 units; or less than 64.
        network: Settings of another network, instead of `layers` and `hidden`, such as `{model_type: llama, ...}`.
        length: Tokens of a block.
        batch: Blocks of a step.
    """

    task: Literal["gpt", "bert"] = "gpt"
    text: Optional[str] = None
    held_out: float = 0.05
    tokenizer: Optional[str] = None
    layers: int = 4
    hidden: int = 256
    network: dict[str, Any] = field(default_factory=dict)
    length: int = 256
    batch: int = 16

    def prepare(self, folder: Path) -> "Prepared":
        """Writes the text, the tokenizer and the configs into a folder."""
        from lm_lightning.data import tokenizer as tokenizers

        paragraphs = self.paragraphs(folder)
        size = max(1, round(len(paragraphs) * self.held_out))
        for name, part in (("train", paragraphs[:-size]), ("held_out", paragraphs[-size:])):
            (folder / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")
        if self.tokenizer is None:
            algorithm: Any = "bpe" if self.task == "gpt" else "wordpiece"
            options = tokenizers.Tokenizer(algorithm=algorithm, lowercase=self.task == "bert")
            tokenizer = tokenizers.train(options, iter(paragraphs[:-size]), self.task)
            tokenizer.split_special_tokens = False
        else:
            tokenizer = tokenizers.load(self.tokenizer)
            if tokenizer.pad_token is None:  # the peer's collator needs one
                tokenizer.pad_token = tokenizer.eos_token
        tokenizers.save(tokenizer, folder / "tokenizer")
        network = self.network or self.sizes()
        vocabulary = {"vocab_size": tokenizers.vocabulary(tokenizer)}
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (folder / "network.json").write_text(json.dumps(network | vocabulary | tokens), encoding="utf-8")
        data: dict[str, Any] = {
            "corpus": {"paths": [str(folder / "train.txt")], "validation_fraction": 0.0, "test_fraction": 0.0},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "block_size": self.length,
            "batch_size": self.batch,
            "cache_dir": str(folder / "cache"),
        }
        if self.task == "bert":
            data["next_sentence"] = False
        config = {
            "model": {"init_args": {"network": network}},
            "data": {"init_args": data},
            "trainer": {"limit_val_batches": 0, "enable_progress_bar": False},
            "runs_dir": str(folder / "runs"),
        }
        (folder / "workload.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return Prepared(self, folder)

    def paragraphs(self, folder: Path) -> list[str]:
        """The paragraphs of the text, each in a line."""
        from lm_lightning.data import builtin

        if self.text is None:
            texts = [text for _, text in builtin.documents(folder / "cache")]
        else:
            texts = [Path(self.text).read_text(encoding="utf-8")]
        found = [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)]
        return [paragraph for paragraph in found if paragraph]

    def sizes(self) -> dict[str, Any]:
        """Settings of the network, without dropout."""
        heads = max(1, self.hidden // 64)
        if self.task == "gpt":
            sizes = {"model_type": "gpt2", "n_layer": self.layers, "n_embd": self.hidden, "n_head": heads}
            return sizes | {"n_positions": self.length, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"model_type": "bert", "num_hidden_layers": self.layers, "hidden_size": self.hidden}
        sizes |= {"num_attention_heads": heads, "intermediate_size": 4 * self.hidden}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return sizes | dropout | {"max_position_embeddings": self.length}


@dataclass
class Prepared:
    """A workload whose files are in a folder."""

    work: Workload
    folder: Path

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of an optimizer step."""
        return self.work.batch * self.work.length

    def fit(self, steps: int, warmup: int, options: str = "", probe: str = "Probe", seed: int = 0) -> dict[str, Any]:
        """Trains with this project's `fit`.

        Args:
            steps: Optimizer steps.
            warmup: Steps that are not measured.
            options: More flags of `fit`.
            probe: The callback of `probe.py` that measures.
            seed: Seed of the run.

        Returns:
            What the callback has written; `run`, the run folder.
        """
        file = self.folder / "probe.json"
        words = ["-m", "lm_lightning", "fit", "--config", str(harness.ROOT / "configs" / f"{self.work.task}.yaml")]
        words += ["--config", str(self.folder / "workload.yaml"), "--trainer.max_steps", str(steps)]
        words += ["--seed_everything", str(seed), *shlex.split(options)]
        words += [f"--trainer.callbacks+=probe.{probe}", "--trainer.callbacks.path", str(file)]
        words += ["--trainer.callbacks.warmup", str(warmup)]
        output = harness.run(words)
        found = re.search(r"^run folder: (.*)$", output, re.M)
        return json.loads(file.read_text(encoding="utf-8")) | {"run": found[1] if found else None}

    def peer(self, script: str, steps: int, warmup: int, options: str = "", seed: int = 0) -> dict[str, Any]:
        """Trains with the script of a peer, which has the options below and prints a line of JSON.

        Args:
            script: Path of the script.
            steps: Optimizer steps, which its learning rate schedule must know.
            warmup: Steps that are not measured.
            options: More options of the script.
            seed: Seed of the run.

        Returns:
            `tokens_per_s`, `peak_mib`, `seconds`, and `run`, the folder of the network.
        """
        out = self.folder / "peer"
        words = [script, "clm" if self.work.task == "gpt" else "mlm", "--config", str(self.folder / "network.json")]
        words += ["--tokenizer", str(self.folder / "tokenizer"), "--train", str(self.folder / "train.txt")]
        words += ["--out", str(out), "--length", str(self.work.length), "--batch", str(self.work.batch)]
        words += ["--steps", str(steps), "--warmup", str(warmup), "--seed", str(seed), *shlex.split(options)]
        return harness.last_json(harness.run(words)) | {"run": str(out)}
