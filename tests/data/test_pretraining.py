"""Blocks: every token is a target as often as it should be, and knows its document."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lm_lightning.data import shards
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.order import PADDING
from lm_lightning.data.pretraining import Blocks, PretrainingData, collate
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError

T = 8
LENGTHS = [9, 10, 16, 17, 18, 24, 25, 100]  # tokens of a split; 9 is the least for a block of 8
SEEDS = [None, 0, 1]  # None: evaluation


def split(length, documents=(0,), dtype="uint16"):
    """A split whose tokens are their own places."""
    return shards.Split(np.arange(length).astype(dtype), np.array(documents), length, 1.0)


def blocks(length, seed=None, documents=(0,), mask_documents=False):
    return Blocks(split(length, documents), T, mask_documents, seed)


def targets(items):
    """All targets of some items, in order."""
    return torch.cat([item["targets"][item["targets"] != -100] for item in items]).tolist()


def data(tmp_path, text="one two three\n" * 20, **options):
    """Data of a text, set up for fitting, of which the validation split is the same text."""
    for file in (tmp_path / "train.txt", tmp_path / "validation.txt"):
        if not file.exists() or file.read_text() != text:  # writing it again would make it another corpus
            file.write_text(text)
    corpus = Corpus([str(tmp_path / "train.txt")], [str(tmp_path / "validation.txt")], document="line")
    corpus.test_fraction = 0
    options = {"block_size": T, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), **options}
    result = PretrainingData(corpus, Tokenizer(algorithm="bytes", vocab_size=300), **options)
    result.trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        limit_val_batches=1.0,
        is_global_zero=True,
        strategy=SimpleNamespace(distributed_sampler_kwargs={"rank": 0, "num_replicas": 1}),
        accumulate_grad_batches=3,
        overfit_batches=0.0,
    )
    return result


# Targets


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_target_is_the_next_token_also_at_the_bound_of_a_block(seed, length):
    for item in map(blocks(length, seed).__getitem__, range(len(blocks(length, seed)))):
        assert item["input_ids"].shape == item["targets"].shape == (T,)
        assert item["input_ids"].dtype == item["targets"].dtype == torch.int64
        counted = item["targets"] != -100
        assert (item["targets"][counted] == item["input_ids"][counted] + 1).all()
        assert (item["input_ids"].diff() == 1).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_an_epoch_of_training_predicts_each_token_of_its_full_blocks_once(length):
    training = blocks(length, seed=0)
    assert len(training) == (length - 1) // T
    for epoch in range(3):
        items = [training[position] for position in range(epoch * len(training), (epoch + 1) * len(training))]
        assert sorted(targets(items)) == list(range(1, len(training) * T + 1))
        assert sorted(item["id"] for item in items) == list(range(len(training)))


def test_training_shuffles_by_seed_and_epoch():
    orders = set()
    for training in (blocks(401, seed=0), blocks(401, seed=1)):
        ids = [training[position]["id"] for position in range(100)]
        orders |= {tuple(ids[:50]), tuple(ids[50:])}
    assert len(orders) == 4 and tuple(range(50)) not in orders


@pytest.mark.parametrize("length", LENGTHS)
def test_evaluation_predicts_each_token_but_the_first_once(length):
    evaluation = blocks(length)
    items = [evaluation[position] for position in range(len(evaluation))]
    assert targets(items) == list(range(1, length))
    assert [item["id"] for item in items] == list(range(len(evaluation)))


@pytest.mark.parametrize("mask_documents", [False, True])
def test_padding_has_the_shape_of_a_block_and_no_targets(mask_documents):
    evaluation = blocks(20, mask_documents=mask_documents)
    padding, block = evaluation[PADDING], evaluation[0]
    assert (padding["targets"] == -100).all() and padding["id"] == PADDING
    assert padding["input_ids"].max() < 20
    assert padding.keys() == block.keys()
    assert collate([block, padding])["targets"].shape == (2, T)
    assert targets([block]) == list(range(1, T + 1)), "making padding changed a block"


def test_changing_an_item_does_not_change_the_split():
    evaluation = blocks(20)
    for item in (evaluation[0], evaluation[2]):
        item["input_ids"].zero_()
        item["targets"].zero_()
    assert (evaluation.split.tokens == np.arange(20)).all()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_large_ids_stay_positive(dtype):
    tokens = np.full(T + 1, np.iinfo(dtype).max, dtype)
    item = Blocks(shards.Split(tokens, np.array([0]), 0, 1.0), T, False, None)[0]
    assert (item["input_ids"] == np.iinfo(dtype).max).all() and (item["targets"] == np.iinfo(dtype).max).all()


# Documents


def naive_positions(start, documents):
    """Count up, from 0 at the start of the block and of every document."""
    positions, position = [], 0
    for token in range(start, start + T):
        position = 0 if token in documents else position
        positions.append(position)
        position += 1
    return positions


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "documents", [(0,), (0, 8), (0, 1), (0, 3, 4, 5, 15, 16, 17, 23), (0, 7, 9, 36), tuple(range(37))]
)
def test_positions_start_again_at_each_document(seed, documents):
    some = blocks(37, seed, documents, mask_documents=True)
    for item in map(some.__getitem__, range(len(some))):
        assert item["position_ids"].dtype == torch.int64
        assert item["position_ids"].tolist() == naive_positions(item["input_ids"][0].item(), documents)


def test_without_masks_there_are_no_positions():
    assert "position_ids" not in blocks(20)[0]


def test_positions_start_again_after_each_end_of_a_real_corpus(tmp_path):
    fitting = data(tmp_path, text="a\nbcd\nefghijklmnop\nq\n", mask_documents=True)
    fitting.setup("fit")
    end = fitting.tokenizer.eos_token_id
    for name in ("train", "validation"):
        some = fitting.samples(name)
        for item in map(some.__getitem__, range(len(some))):
            after_end = (item["input_ids"][:-1] == end).nonzero().flatten() + 1
            assert (item["position_ids"] == 0).nonzero().flatten().tolist() == [0, *after_end.tolist()]


# Too little text


def test_a_split_must_have_a_block_and_one_more_token():
    shards.require_full_block(split(T + 1), "train", T, "")
    with pytest.raises(UserError, match="train split has 2 documents with 8 tokens.* needs 9: do this"):
        shards.require_full_block(split(T, documents=(0, 3)), "train", T, "do this")


@pytest.mark.parametrize("stage, name", [("fit", "train"), ("validate", "validation"), ("test", "test")])
def test_a_stage_whose_split_is_too_short_is_refused(tmp_path, stage, name):
    counts = "0 documents with 0 tokens" if name == "test" else "2 documents with 7 tokens"
    with pytest.raises(UserError, match=f"the {name} split has {counts}, but one block needs 9: .*data.block_size"):
        data(tmp_path, text="abc\nde\n").setup(stage)


def test_a_stage_needs_its_own_splits_only(tmp_path):
    fitting = data(tmp_path)
    (tmp_path / "validation.txt").write_text("a")
    with pytest.raises(UserError, match="the validation split has 1 documents with 2 tokens"):
        fitting.setup("fit")
    fitting.trainer.limit_val_batches = 0
    fitting.setup("fit")


# Loading


def same(first, second):
    """Whether two lists of batches are equal."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and a["id"] == b["id"] and all(torch.equal(a[key], b[key]) for key in a if key != "id")
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", ["train", "val"])
def test_workers_load_the_same_batches(tmp_path, name):
    loaded = []
    for num_workers in (0, 2):
        fitting = data(tmp_path, num_workers=num_workers, mask_documents=True)
        fitting.setup("fit")
        fitting.consumed = 30
        loader = getattr(fitting, f"{name}_dataloader")()
        loaded.append(list(loader))
        assert len(loaded[-1]) == len(loader) > 3
    assert same(*loaded)


def test_a_pass_starts_at_what_is_consumed_by_then(tmp_path):
    fitting = data(tmp_path)
    fitting.setup("fit")
    loader = fitting.train_dataloader()
    first = list(loader)
    fitting.consumed = 2 * len(first)
    second = list(loader)
    size = len(fitting.samples("train"))
    ids = [sample for batch in first + second for sample in batch["id"]]
    assert sorted(ids[:size]) == sorted(ids[size : 2 * size]) == list(range(size))
    fitting.consumed = 12  # two steps of 3 micro-batches of 2
    assert same(list(loader)[: len(first) - 6], first[6:])


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_together_evaluate_each_token_once(tmp_path, world_size):
    fitting = data(tmp_path, batch_size=4)
    fitting.setup("fit")
    ids, count = [], 0
    for rank in range(world_size):
        fitting.trainer.strategy.distributed_sampler_kwargs = {"rank": rank, "num_replicas": world_size}
        for batch in fitting.val_dataloader():
            assert batch["input_ids"].shape == (4, T)
            ids += [sample for sample in batch["id"] if sample != PADDING]
            count += (batch["targets"] != -100).sum().item()
    assert sorted(ids) == list(range(len(fitting.samples("validation"))))
    assert count == len(fitting.splits["validation"].tokens) - 1


# Resuming


def test_a_checkpoint_brings_back_the_place_in_the_stream(tmp_path):
    first, second = data(tmp_path), data(tmp_path, batch_size=1, num_workers=1)
    for fitting in (first, second):
        fitting.setup("fit")
    first.consumed = 12
    second.load_state_dict(first.state_dict())
    assert second.consumed == 12


@pytest.mark.parametrize("change", ["data.block_size", "corpus and tokenizer", "seed_everything"])
def test_a_checkpoint_of_another_stream_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    first = data(tmp_path)
    first.setup("fit")
    first.consumed = 12
    if change == "seed_everything":
        monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    text = "another text\n" * 20 if change == "corpus and tokenizer" else "one two three\n" * 20
    second = data(tmp_path, text, block_size=T + (change == "data.block_size"))
    second.setup("fit")
    with pytest.raises(UserError, match=f"made with {change} "):
        second.load_state_dict(first.state_dict())
    assert second.consumed == 0

    second.trainer.state.fn = "validate"  # weights may be measured on any data
    second.load_state_dict(first.state_dict())
