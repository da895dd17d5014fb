"""MaskedLM: its losses are those of transformers, its head runs at the targets only, its exports load anywhere."""

import copy
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import evaluation
from forks import python

from lm_lightning.tasks.masked_lm.model import MaskedLM

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NETWORKS = {
    "bert": {"model_type": "bert", **SIZES},
    "roberta": {"model_type": "roberta", **SIZES},
    "modernbert": {"model_type": "modernbert", **SIZES},
    "distilbert": {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "electra": {"model_type": "electra", **SIZES, "embedding_size": 16},
}


@pytest.fixture(scope="module")
def tokenizer():
    from conftest import paragraphs

    from lm_lightning.data.tokenizer import Tokenizer, train

    return train(Tokenizer(algorithm="wordpiece", vocab_size=300), iter(paragraphs(100)), "bert")


def made(model: MaskedLM, tokenizer, next_sentence: bool = False) -> MaskedLM:
    """A model with its network, as if in a trainer with this tokenizer."""
    prepared = SimpleNamespace(frequencies=lambda: np.arange(len(tokenizer)))
    data = SimpleNamespace(
        tokenizer=tokenizer, block_size=16, tokens_per_batch=1, next_sentence=next_sentence, prepared=prepared
    )
    model._trainer = SimpleNamespace(
        strategy=None,
        datamodule=data,
        is_global_zero=True,
        progress_bar_callback=None,
        state=SimpleNamespace(fn="fit"),
    )
    torch.manual_seed(0)
    model.configure_model()
    return model.eval()


def batch(tokenizer, pairs: bool = False) -> tuple[dict, torch.Tensor]:
    """A batch as MaskedData makes it, and the same targets as labels of transformers."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, len(tokenizer), (4, 16), generator=generator)
    positions = torch.stack([torch.randperm(15, generator=generator)[:3] + 1 for _ in range(4)])
    targets = tokens.gather(1, positions)
    labels = torch.full_like(tokens, -100).scatter(1, positions, targets)
    targets[0, 2] = -100
    labels[0, positions[0, 2]] = -100
    result = {"input_ids": tokens.scatter(1, positions, tokenizer.mask_token_id), "positions": positions}
    result |= {"targets": targets, "attention_mask": torch.ones_like(tokens)}
    if pairs:
        result["token_type_ids"] = (torch.arange(16) > 7).long().expand(4, -1)
        result["next_sentence"] = torch.tensor([0, 1, 1, 0])
    return result, labels


def unpadded(model: MaskedLM, tokenizer) -> torch.nn.Module:
    network = copy.deepcopy(model.network)
    network.resize_token_embeddings(len(tokenizer))
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_is_that_of_transformers(name: str, tokenizer):
    model = made(MaskedLM(network=NETWORKS[name]), tokenizer)
    assert model.has_linear_head
    given, labels = batch(tokenizer)
    expected = unpadded(model, tokenizer)(given["input_ids"], attention_mask=given["attention_mask"], labels=labels)
    loss, count = model.loss(given)
    assert count == 11
    assert (loss / count).item() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_both_losses_are_those_of_bert(tokenizer):
    model = made(MaskedLM(network=NETWORKS["bert"]), tokenizer, next_sentence=True)
    assert type(model.network).__name__ == "BertForPreTraining"
    given, labels = batch(tokenizer, pairs=True)
    given["targets"][0, 2] = labels[0, given["positions"][0, 2]] = 7  # all blocks are full
    expected = unpadded(model, tokenizer)(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        token_type_ids=given["token_type_ids"],
        labels=labels,
        next_sentence_label=given["next_sentence"],
    )
    loss, count = model.loss(given)
    assert (loss / count).item() == pytest.approx(expected.loss.item(), abs=1e-5)
    sums = model.losses(given)
    right = (expected.seq_relationship_logits.argmax(-1) == given["next_sentence"]).sum()
    assert sums["next_right"] == right and sums["pairs"] == 4


def test_gradients_are_those_of_transformers(tokenizer):
    model = made(MaskedLM(network=NETWORKS["bert"]), tokenizer)
    given, labels = batch(tokenizer)
    reference = copy.deepcopy(model.network)
    logits = reference(given["input_ids"], attention_mask=given["attention_mask"]).logits[..., : len(tokenizer)]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model.loss(given)[0].backward()
    for (name, ours), theirs in zip(model.network.named_parameters(), reference.parameters()):
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


def test_the_head_runs_at_the_targets_only(tokenizer):
    model = made(MaskedLM(network=NETWORKS["bert"]), tokenizer)
    seen = []
    model.network.cls.predictions.transform.register_forward_hook(lambda m, args, output: seen.append(output.shape))
    model.loss(batch(tokenizer)[0])
    assert seen == [(4, 3, 32)]


def test_no_target_gives_no_loss_and_no_nan(tokenizer):
    model = made(MaskedLM(network=NETWORKS["bert"]), tokenizer)
    given, _ = batch(tokenizer)
    given["targets"].fill_(-100)
    loss, count = model.loss(given)
    loss.backward()
    assert loss == 0 and count == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_new_head_starts_at_the_frequencies(tokenizer):
    given, _ = batch(tokenizer)
    model = made(MaskedLM(network=NETWORKS["bert"]), tokenizer)
    plain = made(MaskedLM(network=NETWORKS["bert"], unigram_start=False), tokenizer)
    frequencies = torch.arange(len(tokenizer)) + 1.0
    logits = model.network(given["input_ids"]).logits[..., : len(tokenizer)]
    assert torch.allclose(logits.softmax(-1).mean((0, 1)), frequencies / frequencies.sum(), atol=2e-3)
    assert not plain.network.cls.predictions.bias.any()


@pytest.fixture
def bert(tmp_path: Path, corpus_file: Path, cache_dir: Path) -> Path:
    """A recipe of a tiny BERT."""
    content = {
        "model": {
            "class_path": "MaskedLM",
            "init_args": {"network": NETWORKS["bert"], "schedule": {"warmup_steps": 2}},
        },
        "data": {
            "class_path": "MaskedData",
            "init_args": {
                "corpus": {"paths": [str(corpus_file)]},
                "tokenizer": {"algorithm": "wordpiece", "vocab_size": 300},
                "next_sentence": True,
                "block_size": 32,
                "batch_size": 4,
                "cache_dir": str(cache_dir),
            },
        },
        "trainer": {"max_steps": 10, "val_check_interval": 5, "check_val_every_n_epoch": None, "limit_val_batches": 2}
        | {"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1},
        "runs_dir": str(tmp_path / "runs"),
    }
    file = tmp_path / "bert.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def trained(cli, *args: object) -> Path:
    out = cli("fit", *args)
    return Path(out.split("run folder: ")[1].splitlines()[0])


@pytest.mark.slow
def test_resumed_run_ends_in_the_same_bits(cli, bert: Path):
    from test_fit import metrics, same, weights

    whole = trained(cli, "--config", bert, "--name", "whole")
    stop = json.dumps([{"class_path": "test_fit.Stop", "init_args": {"step": 7}}])
    with pytest.raises(RuntimeError, match="power failure"):
        trained(cli, "--config", bert, "--name", "cut", "--trainer.callbacks", stop)
    cut = trained(cli, "--config", bert, "--name", "cut", "--ckpt_path", "last", "--data.num_workers", 2)
    assert same(weights(whole), weights(cut)) and metrics(whole) == metrics(cut)


@pytest.mark.slow
def test_export_loads_as_both_classes_in_a_fresh_process_and_predict_fills_masks(cli, bert: Path):
    run = trained(cli, "--config", bert)
    script = (
        "import json, sys, torch, transformers\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('the old [MASK] watched the river', return_tensors='pt')\n"
        "pretraining = transformers.BertForPreTraining.from_pretrained(sys.argv[1]).eval()(**ids)\n"
        "masked = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1]).eval()(**ids)\n"
        "assert torch.allclose(pretraining.prediction_logits, masked.logits, atol=1e-6)\n"
        "place = ids['input_ids'][0].tolist().index(tokenizer.mask_token_id)\n"
        "best = masked.logits[0, place].softmax(-1).topk(3)\n"
        "print(json.dumps([tokenizer.convert_ids_to_tokens(best.indices.tolist()), best.values.tolist()]))\n"
    )
    result = subprocess.run([python("transformers"), "-c", script, run / "model"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tokens, probabilities = json.loads(result.stdout)
    text = "the old [MASK] watched the river"
    cli("predict", "--config", bert, "--ckpt_path", "best", "--data.texts", text, "--model.top_k", 3)
    (row,) = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    assert [c["token"] for c in row["masks"][0]] == tokens
    assert [c["probability"] for c in row["masks"][0]] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.slow
def test_continued_pretraining_says_which_weights_are_new(cli, bert: Path, capsys, tmp_path: Path):
    from transformers import AutoModel

    run = trained(cli, "--config", bert)
    AutoModel.from_pretrained(run / "model").save_pretrained(tmp_path / "body")  # without heads
    (run / "tokenizer" / "tokenizer.json").rename(tmp_path / "body" / "tokenizer.json")
    (run / "tokenizer" / "tokenizer_config.json").rename(tmp_path / "body" / "tokenizer_config.json")
    out = cli(
        *("fit", "--config", bert, "--model.network", "null", "--model.pretrained", tmp_path / "body"),
        *("--data.tokenizer", json.dumps({"path": str(tmp_path / "body")}), "--data.next_sentence", "false"),
    )
    assert "has no weights for" in out and "cls.predictions.transform.dense.weight" in out


def test_networks_without_a_head_for_next_sentences_are_refused(cli, bert: Path):
    from lm_lightning.errors import UserError

    with pytest.raises(UserError, match="no head for next-sentence prediction"):
        trained(cli, "--config", bert, "--model.network", json.dumps(NETWORKS["roberta"]))
