"""Pretrained networks: the language of the target, and encoders joined with decoders."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import evaluation
from test_seq2seq import BART, make_recipe, metrics, pairs
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from lm_lightning.data.tokenizer import Tokenizer, train


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


# Network, tokenizer, language of sources and targets
LANGUAGES = {
    "mbart": ("mbart", transformers.MBartTokenizer, "de_DE", "en_XX"),
    "mbart50": ("mbart", transformers.MBart50Tokenizer, "de_DE", "en_XX"),
    "nllb": ("m2m_100", transformers.NllbTokenizer, "deu_Latn", "eng_Latn"),
}


def multilingual(folder: Path, kind: str) -> Path:
    """A network as it comes from elsewhere, from the second language into the first."""
    model_type, tokenizer_class, source, target = LANGUAGES[kind]
    words = sorted({word for pair in pairs(300, 0) for text in pair for word in text.split()})
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{word}" for word in words), "▁"]
    pieces += sorted({character for word in words for character in word})
    vocab = {piece: i for i, piece in enumerate(pieces)} if kind == "nllb" else [(piece, -1.0) for piece in pieces]
    options = {"merges": []} if kind == "nllb" else {}
    tokenizer = tokenizer_class(vocab=vocab, src_lang=target, tgt_lang=source, **options)
    tokenizer.save_pretrained(folder)
    sizes = {name: value for name, value in BART.items() if name != "model_type"}
    sizes |= {} if kind == "mbart" else {"decoder_start_token_id": 2}
    config = AutoConfig.for_model(model_type, **sizes, vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", LANGUAGES)
def test_languages_are_those_of_the_data_in_training_and_export(fit, tmp_path: Path, kind: str):
    base = multilingual(tmp_path / "base", kind)
    source, target = LANGUAGES[kind][2:]
    flags = ("--model.network", "null", "--model.pretrained", base, "--data.tokenizer.path", base)
    run = fit(*flags, "--data.source_language", source, "--data.target_language", target)
    network = AutoModelForSeq2SeqLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    language = tokenizer.convert_tokens_to_ids(target)
    inputs = tokenizer([text for text, _ in pairs(3, 1)], return_tensors="pt", padding=True)
    assert tokenizer.convert_tokens_to_ids(source) in inputs["input_ids"][0]
    if kind != "mbart":
        assert network.generation_config.forced_bos_token_id == language
    written = network.generate(**inputs)
    started = [language] if kind == "mbart" else [tokenizer.eos_token_id, language]
    assert all(row[: len(started)] == started for row in written.tolist())
    # the loss is that of transformers, which shifts the labels of the tokenizer itself
    total, count = 0.0, 0
    for text, correct in pairs(40, 1):
        row = tokenizer(text, text_target=correct, return_tensors="pt")
        labels = row.pop("labels")
        if kind == "mbart":  # its targets end with the language, with which the decoder begins
            shifted = torch.cat([labels[:, -1:], labels[:, :-1]], 1)
            labels = labels.clone()
            labels[:, -1] = -100
        else:
            shifted = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), labels[:, :-1]], 1)
        with torch.no_grad():
            logits = network(**row, decoder_input_ids=shifted).logits
        total += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += int((labels != -100).sum())
    best = json.loads((run / "model" / "training.json").read_text())["step"]
    losses = dict(zip((4, 8), metrics(run, "val/loss")))
    assert losses[best] == pytest.approx(total / count, rel=1e-4)


def test_unknown_language_is_refused(refused, recipe: Path, tmp_path: Path):
    base = multilingual(tmp_path / "base", "mbart")
    flags = ("--model.network", "null", "--model.pretrained", base, "--data.target_language", "xx_XX")
    message = refused("fit", "--config", recipe, *flags)
    assert "data.target_language is 'xx_XX', which the tokenizer does not have: choose one of" in message
    assert "de_DE" in message


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT and a GPT that have the same tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    texts = [text for pair in pairs(200, 0) for text in pair]
    tokenizer = train(Tokenizer(algorithm="wordpiece", vocab_size=120), iter(texts), "bert")
    other = train(Tokenizer(algorithm="wordpiece", vocab_size=60), iter(texts), "bert")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "hidden_size": 48}
    bert = AutoConfig.for_model("bert", **sizes, vocab_size=len(tokenizer), max_position_embeddings=128)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 128, "eos_token_id": 3, "bos_token_id": None}
    gpt = AutoConfig.for_model("gpt2", **sizes, vocab_size=len(tokenizer))
    transformers.AutoModelForMaskedLM.from_config(bert).save_pretrained(folder / "bert")
    transformers.AutoModelForCausalLM.from_config(gpt).save_pretrained(folder / "gpt")
    for name, own in {"bert": tokenizer, "gpt": tokenizer, "other": other}.items():
        own.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("decoder", ["gpt", "bert"])
@pytest.mark.slow
def test_encoder_and_decoder_are_joined(fit, cli, parts: Path, tmp_path: Path, decoder: str):
    flags = ("--model.network", "null", "--model.pretrained", parts / "bert", "--model.decoder", parts / decoder)
    run = fit(*flags, "--trainer.max_steps", 4)
    network = AutoModelForSeq2SeqLM.from_pretrained(run / "model")
    assert type(network).__name__ == "EncoderDecoderModel"
    encoder = transformers.AutoModel.from_pretrained(parts / "bert")
    name = "encoder.layer.0.intermediate.dense.weight"
    moved = (network.encoder.get_parameter(name) - encoder.get_parameter(name)).abs().max()
    assert 0 < moved < 0.05  # trained from the pretrained weights
    sources = [source for source, _ in pairs(5, 3)]
    (tmp_path / "new").write_text("\n".join(sources))
    cli("predict", run, "--data.parallel.predict", tmp_path / "new")
    texts = [json.loads(line)["text"] for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    inputs = tokenizer(sources, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert tokenizer.batch_decode(network.generate(**inputs), skip_special_tokens=True) == texts


def test_decoder_with_another_tokenizer_is_refused(refused, recipe: Path, parts: Path):
    flags = ("--model.network", "null", "--model.pretrained", parts / "bert", "--model.decoder", parts / "other")
    assert "has another tokenizer than" in refused("fit", "--config", recipe, *flags)
