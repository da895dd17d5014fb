"""Tables as users of the recipes for fine-tuning have them."""

import csv
import json
import random

from clauses import sentences
from conftest import paragraphs


def write(name: str, rows: list[dict]) -> None:
    """A table in the current folder."""
    with open(name, "w", newline="", encoding="utf-8") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def labelled(recipe: str, number: int, seed: int) -> list[dict]:
    """Rows as a user of a recipe has them, the columns of what is to be predicted last."""
    draw, texts = random.Random(seed), paragraphs(number, seed)
    if recipe in ("tagging.yaml", "roles.yaml", "parsing.yaml"):
        names = {"tagging.yaml": ["words", "labels"], "roles.yaml": ["words", "frames"]}
        columns = names.get(recipe, ["form", "head", "deprel"])
        return [{name: row[name] for name in columns} for row in sentences(number, seed)]
    if recipe == "questions.yaml":
        words = [text.split() for text in texts]
        answers = [[{"text": w[1], "answer_start": len(w[0]) + 1}] for w in words]
        return [
            {"id": str(i), "context": text, "question": f"Who is in {i}?", "answers": answer}
            for i, (text, answer) in enumerate(zip(texts, answers))
        ]
    if recipe == "search.yaml":
        return [{"text": text, "pair": text[::-1]} for text in texts]
    if recipe in ("similarity.yaml", "embedding.yaml"):
        return [{"text": text, "pair": draw.choice(texts), "label": draw.randint(0, 5)} for text in texts]
    if recipe == "entailment.yaml":
        return [{"text": text, "pair": text[: 20 * (i % 2 + 1)], "label": "yn"[i % 2]} for i, text in enumerate(texts)]
    return [{"text": text, "label": str(len(text) % 2 + 1)} for text in texts]
