"""A made-up language whose names, parts of speech, arguments and trees follow from the words."""

import json
import random
from pathlib import Path

import yaml

from lm_lightning.data.tokenizer import Tokenizer, train

FIRST, LAST, PLACES = ["anna", "boris", "clara", "deniz"], ["smith", "okafor"], ["lagos", "oslo", "lima"]
VERBS, THINGS = ["sees", "helps", "finds", "likes"], ["house", "river", "letter"]


def sentence(draw: random.Random) -> dict:
    """One or two clauses: somebody does something to something or somebody, perhaps somewhere."""
    words: list[str] = []
    columns: dict[str, list] = {"labels": [], "upos": [], "head": [], "deprel": []}
    frames: list[dict] = []

    def add(word: str, label: str, tag: str, head: int, relation: str) -> None:
        words.append(word)
        for column, value in zip(columns.values(), (label, tag, head, relation)):
            column.append(value)

    def thing(head: int, relation: str) -> list[int]:
        start = len(words)
        if draw.random() < 0.5:
            first, last = draw.choice(FIRST), draw.choice(LAST) if draw.random() < 0.5 else None
            add(first, "B-PER", "PROPN", head, relation)
            if last:
                add(last, "I-PER", "PROPN", start + 1, "flat:name")
        else:
            add("the", "O", "DET", start + 2, "det")
            add(draw.choice(THINGS), "O", "NOUN", head, relation)
        return [start, len(words) - 1]

    root = 0
    for clause in range(draw.choice([1, 1, 2])):
        if clause:
            add("and", "O", "CCONJ", 0, "cc")
        begin = len(words)
        subject = thing(0, "nsubj")
        verb = len(words)
        add(draw.choice(VERBS), "O", "VERB", root, "conj" if clause else "root")
        for word in range(begin, verb):
            if columns["head"][word] == 0:
                columns["head"][word] = verb + 1
        if clause:
            columns["head"][begin - 1] = verb + 1
        root = root or verb + 1
        spans = [[*subject, "ARG0"], [verb, verb, "V"], [*thing(verb + 1, "obj"), "ARG1"]]
        if draw.random() < 0.4:
            start = len(words)
            add("in", "O", "ADP", start + 2, "case")
            add(draw.choice(PLACES), "B-LOC", "PROPN", verb + 1, "obl")
            spans.append([start, start + 1, "ARGM-LOC"])
        frames.append({"predicate": verb, "spans": spans})
    return {"words": words, "form": words, **columns, "frames": frames}


def sentences(number: int, seed: int) -> list[dict]:
    """As many rows with all columns."""
    draw = random.Random(seed)
    return [sentence(draw) for _ in range(number)]


def write(path: Path, rows: list[dict]) -> Path:
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(folder: Path, model: str, data: str, monitor: str) -> Path:
    """The YAML of a tiny BERT that learns the language after some forty steps."""
    texts = (" ".join(row["words"]) for row in sentences(300, 0))
    train(Tokenizer(algorithm="wordpiece", vocab_size=90, lowercase=True), texts, "bert").save_pretrained(
        folder / "tok"
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    splits = {"train": 300, "validation": 50, "test": 45}
    tables = {
        split: str(write(folder / f"{split}.jsonl", sentences(number, seed)))
        for seed, (split, number) in enumerate(splits.items())
    }
    content = {
        "model": {
            "class_path": model,
            "init_args": {
                "network": {"model_type": "bert", "max_position_embeddings": 64, **sizes},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}},
                "schedule": {"warmup_steps": 5, "shape": "constant"},
            },
        },
        "data": {
            "class_path": data,
            "init_args": {"tables": tables, "tokenizer": {"path": str(folder / "tok")}, "max_length": 60},
        },
        "best": {"monitor": monitor},
        "trainer": {
            **{"max_steps": 60, "val_check_interval": 30, "check_val_every_n_epoch": None, "log_every_n_steps": 1},
            **{"accelerator": "cpu", "precision": "32-true"},
        },
        "runs_dir": str(folder / "runs"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
