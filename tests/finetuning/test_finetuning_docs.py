"""The commands about fine-tuning in docs/, for each recipe there with the files of its users."""

import re

import pytest
from conftest import ROOT
from reading import Reader, under
from tables import labelled, write

TABLE = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8").partition("| predicts |")[2].partition("\n\n")[0]
RECIPES = sorted(set(re.findall(r"`(\w+\.yaml)`", TABLE)))


@pytest.mark.slow
@under("docs/finetuning.md", "Fine-tuning tasks")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, reader: Reader, typed: list[list[str]]):
    splits = {"train": 48, "dev": 16, "new": 7}
    rows = {name: labelled(recipe, number, seed) for seed, (name, number) in enumerate(splits.items())}
    known = {"questions.yaml": 3, "entailment.yaml": 2, "similarity.yaml": 2, "embedding.yaml": 2}.get(recipe, 1)
    if recipe != "roles.yaml":  # whose frames name the predicates
        rows["new"] = [dict(list(row.items())[:known]) for row in rows["new"]]
    for name in splits:
        write(f"{name}.jsonl", rows[name])
    reader.known["configs/RECIPE.yaml"] = f"configs/{recipe}"
    reader.type_all(typed)
    assert len(reader.predictions()) == sum(len(row.get("frames", [None])) for row in rows["new"])
    reader.validate()
