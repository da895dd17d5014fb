"""Mixtures: the corpora have their shares at any time, each in its own order, whatever loads and resumes it."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import needs
from processes import Runs

from lm_lightning.data.interleaving import LARGEST, Interleaving, Stage, cycle, whole_numbers
from lm_lightning.data.mixture import MixedCorpus, MixtureStage
from lm_lightning.data.order import PADDING
from lm_lightning.data.pretraining import PretrainingData
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError

T = 8  # tokens of a block

# The order


@pytest.mark.parametrize("counts", [(7, 3), (1, 1, 1), (1, 99), (0, 2, 3), (5, 1, 1, 1, 1, 1, 1), (997, 512, 301, 13)])
def test_shares_are_exact_to_less_than_a_sample_at_any_time(counts: tuple):
    found = cycle(counts)
    positions, used = np.arange(1, sum(counts) + 1), sum(map(bool, counts))
    for corpus, count in enumerate(counts):
        so_far = np.cumsum(found.corpora == corpus)
        assert so_far[-1] == count
        assert abs(so_far - positions * count / sum(counts)).max() <= 1 - 1 / (2 * used - 2) + 1e-9


def test_weights_are_exact_where_a_short_cycle_has_them():
    assert whole_numbers([0.7, 0.3]) == (7, 3) and whole_numbers([2, 0, 4]) == (1, 0, 2)
    rounded = whole_numbers([1e-9, 2**0.5, 3**0.5])
    assert rounded[0] == 1 and sum(rounded) == LARGEST
    assert rounded[1] / rounded[2] == pytest.approx((2 / 3) ** 0.5, rel=1e-4)


def test_place_in_each_corpus_is_known_without_reading_what_was_before():
    order = Interleaving([Stage(0, (7, 3)), Stage(25, (1, 1)), Stage(60, (0, 1))])
    seen = [0, 0]
    for position in range(100):
        assert order.counts(position) == seen
        corpus, own = order.locate(position)
        assert own == seen[corpus]
        seen[corpus] += 1


# Samples


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Two corpora, each with a validation split that is the same text; with 130 and 350 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    for name, lines in (("small", 10), ("big", 30)):
        (folder / f"{name}.txt").write_text("".join(f"{name} line {i}\n" for i in range(lines)))
    return folder


def data(texts: Path, weights: tuple = (None, None), **options) -> PretrainingData:
    corpora = {}
    for name, weight in zip(("small", "big"), weights):
        file = [str(texts / f"{name}.txt")]
        (copy := texts / f"{name}.validation.txt").write_text((texts / f"{name}.txt").read_text())
        corpora[name] = MixedCorpus(file, [str(copy)], document="line", test_fraction=0, weight=weight)
    options = {"block_size": T, "batch_size": 2, "cache_dir": str(texts / "cache"), **options}
    result = PretrainingData(tokenizer=Tokenizer(algorithm="bytes", vocab_size=300), corpora=corpora, **options)
    result.trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        limit_val_batches=1.0,
        limit_train_batches=1.0,
        is_global_zero=True,
        strategy=SimpleNamespace(distributed_sampler_kwargs={"rank": 0, "num_replicas": 1}),
        accumulate_grad_batches=1,
        overfit_batches=0.0,
        max_steps=100,
        max_epochs=-1,
        global_step=0,
    )
    result.setup("fit")
    return result


def read(fitting: PretrainingData, positions: range) -> list[int]:
    samples = fitting.samples("train")
    return [samples[position]["id"] for position in positions]


def corpus_of(fitting: PretrainingData, sample: int) -> str:
    return "small" if sample >= fitting.samples("train").first_ids[1] else "big"


def test_each_corpus_repeats_its_own_shuffled_epochs(texts: Path):
    fitting = data(texts, (3, 1))
    sizes = {name: len(fitting.corpus_samples("train", name)) for name in ("small", "big")}
    ids = read(fitting, range(8 * sizes["small"]))
    small = [sample for sample in ids if corpus_of(fitting, sample) == "small"]
    epochs = [small[start : start + sizes["small"]] for start in range(0, len(small), sizes["small"])]
    assert len(small) == 6 * sizes["small"] and len({tuple(epoch) for epoch in epochs}) == 6
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == sizes["small"] for epoch in epochs)
    seen = fitting.samples("train").seen(len(ids))
    assert seen["small"] == {"tokens": len(small) * T, "epochs": 6.0, "share": 0.75}
    alone = {sample: fitting.samples("train").parts[1].split.tokens for sample in small}
    for sample in small[:5]:  # the number of a sample says where it is in its corpus
        start = (sample - fitting.samples("train").first_ids[1]) * T
        item = next(i for p in range(len(ids)) if (i := fitting.samples("train")[p])["id"] == sample)
        assert item["input_ids"].tolist() == alone[sample][start : start + T].tolist()


@pytest.mark.parametrize(("temperature", "ratio"), [(None, 350 / 130), (2, (350 / 130) ** 0.5), (1e6, 1)])
def test_temperature_makes_shares_more_equal(texts: Path, temperature, ratio: float):
    fitting = data(texts, temperature=temperature)
    share = {name: used["share"] for name, used in fitting.samples("train").seen(LARGEST).items()}
    assert share["big"] / share["small"] == pytest.approx(ratio, rel=1e-3)


def test_stages_change_the_shares_at_their_steps(texts: Path):
    stages = [MixtureStage(10, {"big": 1}), MixtureStage(0.5, {"small": 1})]
    fitting = data(texts, (1, 1), stages=stages)
    names = [corpus_of(fitting, sample) for sample in read(fitting, range(200))]
    assert names[:20].count("big") == 10 and set(names[20:100]) == {"big"} and set(names[100:]) == {"small"}


def test_stages_that_begin_at_the_same_step_of_a_short_run_do_not_stop_it(texts: Path):
    fitting = data(texts, (1, 1), stages=[MixtureStage(0.7, {"big": 1}), MixtureStage(0.8, {"small": 1})])
    fitting.trainer.max_steps = 1
    assert {corpus_of(fitting, sample) for sample in read(fitting, range(2, 20))} == {"small"}


def test_workers_and_micro_batches_load_the_same_samples(texts: Path):
    whole = [sample for batch in data(texts, (3, 1)).train_dataloader() for sample in batch["id"]]
    parts = []
    for rank in (0, 1):
        fitting = data(texts, (3, 1), batch_size=1, num_workers=1)
        fitting.trainer.strategy.distributed_sampler_kwargs = {"rank": rank, "num_replicas": 2}
        parts.append([sample for batch in fitting.train_dataloader() for sample in batch["id"]])
    assert [sample for pair in zip(*parts, strict=True) for sample in pair] == whole


def test_past_of_a_resumed_run_is_kept_when_batch_size_length_and_weights_change(texts: Path):
    stages = [MixtureStage(0.5, {"small": 1}), MixtureStage(0.8, {"big": 1})]
    first = data(texts, (1, 1), stages=stages)
    first.train_dataloader()
    first.consumed = first.trainer.global_step = 60
    first.consumed *= 2
    state = json.loads(json.dumps(first.state_dict()))

    def resumed(**options) -> PretrainingData:
        fitting = data(texts, **{"weights": (1, 1), "stages": stages} | options)
        fitting.load_state_dict(state)
        return fitting

    assert read(resumed(), range(120, 200)) == read(first, range(120, 200))
    other = resumed(batch_size=1)  # the last stage begins at step 80; the first 60 steps had two samples
    assert read(other, range(120, 140)) == read(first, range(120, 140))
    assert {corpus_of(other, sample) for sample in read(other, range(140, 150))} == {"big"}
    other = resumed(stages=[MixtureStage(0, {"big": 1})], weights=(None, None))
    seen = other.samples("train").seen(140)
    assert (seen["big"]["tokens"], seen["small"]["tokens"]) == (70 * T, 70 * T)


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_together_evaluate_each_token_once_in_batches_of_one_corpus(texts: Path, world_size: int):
    fitting = data(texts, batch_size=4)
    ids, count, order = [], 0, []
    for rank in range(world_size):
        fitting.trainer.strategy.distributed_sampler_kwargs = {"rank": rank, "num_replicas": world_size}
        batches = list(fitting.val_dataloader())
        order.append([batch["corpus"][0] for batch in batches])
        for batch in batches:
            assert batch["input_ids"].shape == (4, T) and len(set(batch["corpus"])) == 1
            ids += [sample for sample in batch["id"] if sample != PADDING]
            count += (batch["targets"] != -100).sum().item()
    assert order[0][:2] == ["big", "small"] and all(other == order[0] for other in order)
    assert len(set(ids)) == len(ids) == len(fitting.samples("validation"))
    assert count == sum(len(size.tokens) - 1 for size in fitting.corpus_sizes["validation"].values())
    assert count == len(fitting.splits["validation"].tokens) - 1


# Impossible options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1, None)}, "data.corpora.small has a weight, but data.corpora.big has none"),
        ({"weights": (1, -1)}, "the weight of big is -1, but must be 0 or more"),
        ({"weights": (float("nan"), 1)}, "the weight of small is nan"),
        ({"weights": (0, 0)}, "all weights are 0"),
        ({"weights": (1, 1), "temperature": 2.0}, "data.temperature is given: omit one"),
        ({"temperature": 0.01}, "data.temperature is 0.01, but must be 0.1 or more"),
        (
            {"stages": [MixtureStage(5, {"huge": 1})]},
            "data.stages.0 has a weight for 'huge', but the corpora are big, s",
        ),
        ({"stages": [MixtureStage(5, {"big": 0})]}, "data.stages.0: all weights are 0"),
        ({"stages": [MixtureStage(5)]}, "data.stages.0 needs weights or a temperature"),
        ({"stages": [MixtureStage(1.5, {"big": 1})]}, "data.stages.0.start is 1.5, but must be a number of optimizer"),
        ({"stages": [MixtureStage(9, {"big": 1}), MixtureStage(9, {"big": 2})]}, "starts at 9 before one at 9: sort"),
        ({"stages": [MixtureStage(60, {"big": 1}), MixtureStage(0.5, {"big": 2})]}, "starts at 60 before one at 50"),
        ({"weights": (1, 1), "stages": [MixtureStage(0, {"big": 1})]}, "would have no effect"),
        ({"block_size": 10**4}, r"the train \(big\) split has 30 documents .* lower --data.block_size"),
    ],
)
def test_impossible_mixtures_are_refused(texts: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        data(texts, **options).samples("train")


def test_options_of_a_mixture_need_one():
    with pytest.raises(UserError, match=r"are for a mixture: give data.corpora"):
        PretrainingData(temperature=2.0)
    with pytest.raises(UserError, match="data.corpora has no corpora"):
        PretrainingData(corpora={})
    with pytest.raises(UserError, match=r"names of corpora must be letters"):
        PretrainingData(corpora={"a/b": MixedCorpus()})


# Runs


@pytest.fixture
def mixed(recipe: Path, tmp_path: Path) -> Path:
    """The tiny recipe with two corpora, whose shares change after half of the training."""
    content = yaml.safe_load(recipe.read_text())
    options = content["data"]["init_args"]
    (tmp_path / "code.txt").write_text("\n\n".join(f"Number {i}. Its square is {i * i}." for i in range(400)))
    corpora = {"code": {"paths": [str(tmp_path / "code.txt")]}, "prose": options.pop("corpus")}
    options["corpora"] = {name: own | {"weight": 1.0} for name, own in corpora.items()}
    options["stages"] = [{"start": 0.5, "weights": {"code": 0.75, "prose": 0.25}}]
    content["trainer"] |= {"limit_val_batches": 4}
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def logged(run: Path) -> list[dict[str, float]]:
    clock = ("tokens_per_second", "seconds", "mfu", "memory")
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(v) for name, v in row.items() if v and not name.endswith(clock)} for row in rows]


@pytest.mark.slow
def test_run_counts_each_corpus_and_resumes_in_its_stage(mixed: Path, fit, cli):
    run = fit("--trainer.limit_val_batches", "1.0")
    rows = logged(run)
    last = [row for row in rows if "train/loss" in row][-1]
    assert [last[f"corpora/code/{name}"] for name in ("tokens", "share")] == [25 * 32, 0.625]
    assert {"val/code/loss", "val/prose/bits_per_byte"} <= {name for row in rows for name in row}
    final = [row for row in rows if "val/loss" in row][-1]
    description = json.loads((run / "data.json").read_text())
    assert description["used"]["prose"]["tokens"] == 15 * 32
    assert description["stages"][1] == {"start": 0.5, "shares": {"code": 0.75, "prose": 0.25}}
    targets = {name: own["splits"]["validation"]["tokens"] - 1 for name, own in description["corpora"].items()}
    mean = sum(final[f"val/{name}/loss"] * number for name, number in targets.items()) / sum(targets.values())
    assert final["val/loss"] == pytest.approx(mean, rel=1e-5)

    out = cli("validate", run, "--ckpt_path", "last")
    assert "val/code/bits_per_byte" in out

    with pytest.raises(RuntimeError, match="power failure"):
        fit(
            *("--name", "part", "--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 4),
            *("--last.every_n_train_steps", 3, "--trainer.limit_val_batches", "1.0"),
        )
    part = fit("--name", "part", "--ckpt_path", "last", "--trainer.limit_val_batches", "1.0")
    assert logged(part) == rows


@pytest.mark.slow
def test_two_processes_do_what_one_does(mixed: Path, tmp_path: Path):
    runs = Runs(tmp_path)
    command = ("fit", "--config", mixed, *(f"--model.network.{name}_pdrop=0" for name in ("resid", "embd", "attn")))
    two = ("--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.batch_size", 2)
    runs({"one": command, "shared": (*command, *two)})
    assert not runs.error("one") + runs.error("shared")
    for ours, theirs in zip(logged(tmp_path / "one"), logged(tmp_path / "shared"), strict=True):
        norms = [row.pop("train/gradient_norm", 0.0) for row in (ours, theirs)]  # rounding has more effect on these
        assert norms[0] == pytest.approx(norms[1], abs=1e-3)
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-5)


@pytest.mark.slow
@needs("tasks.masked_lm")
def test_bert_trains_on_pairs_of_a_mixture(mixed: Path, masked: tuple, cli):
    pytest.importorskip("sentencex")
    out = cli("fit", "--config", mixed, *masked, "--data.next_sentence", "true")
    rows = logged(Path(out.split("run folder: ")[1].splitlines()[0]))
    assert {"val/code/loss", "val/prose/loss", "corpora/code/epochs"} <= {name for row in rows for name in row}
