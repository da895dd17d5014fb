"""Compression: folders that load again to the same outputs, of the sizes that were asked for, and a measured table."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from conftest import needs, paragraphs
from forks import python
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from lm_lightning.compression import calibration, evaluation, formats, measures, recipes, results, structure, table
from lm_lightning.compression.folder import load
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import by_rows, linear_layers

SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
TOKENS = torch.arange(5, 29).view(2, 12)


traced = pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="torch 2.9 cannot trace networks of transformers with sizes that change"
)


def write(folder: Path, kind: str, **sizes: int) -> Path:
    """Writes a small network with its tokenizer."""
    family, algorithm = ("bert", "wordpiece") if kind == "bert" else ("gpt", "bpe")
    tokenizer = train(Tokenizer(algorithm=algorithm, vocab_size=300), iter(paragraphs(50)), family)
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    network = auto.from_config(AutoConfig.for_model(kind, vocab_size=300, **SIZES[kind] | sizes))
    with torch.no_grad():
        for parameter in network.parameters():  # biases are zero at first
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small networks of two blocks."""
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in SIZES}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same of four blocks."""
    name = {"gpt2": "n_layer"}
    return {
        kind: write(tmp_path_factory.mktemp(kind), kind, **{name.get(kind, "num_hidden_layers"): 4}) for kind in SIZES
    }


@pytest.fixture(scope="module")
def traced_networks() -> dict[str, bytes]:
    """ONNX files by what was traced."""
    return {}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement generates fewer tokens."""
    monkeypatch.setattr(measures, "NEW_TOKENS", 4)


@pytest.fixture(autouse=True)
def trace_once(traced_networks: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """To trace a network takes seconds: the file of one with the same layers and weights is written again."""
    write = formats.Onnx.write

    def remember(self: formats.Onnx, program: torch.nn.Module, inputs: dict, outputs: list[str], target: Path) -> None:
        parts = hashlib.sha256(repr((program, inputs, outputs)).encode())
        for name, tensor in program.state_dict().items():
            parts.update(name.encode() + tensor.numpy().tobytes())
        key = parts.hexdigest()
        if key in traced_networks:
            (target / formats.ONNX).write_bytes(traced_networks[key])
        else:
            write(self, program, inputs, outputs, target)
            traced_networks[key] = (target / formats.ONNX).read_bytes()

    monkeypatch.setattr(formats.Onnx, "write", remember)


@torch.no_grad()
def outputs(folder: Path) -> torch.Tensor:
    return load(folder)(TOKENS)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("recipe", ["int8", "int8-weights", "float8-weights", "bnb-int8", "nf4", "fp4"])
def test_quantized_model_is_small_and_loads_in_plain_transformers(folders, kind: str, recipe: str, tmp_path: Path):
    target = tmp_path / "target"
    if kind == "gpt2" and recipe.startswith(("int8", "float8")):  # torchao passes by Conv1D without a word
        with pytest.raises(UserError, match="skips 8 of 8 linear layers of GPT2LMHeadModel.*Conv1D"):
            recipes.compress(folders[kind], recipe, target)
        return
    recipes.compress(folders[kind], recipe, target)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
auto = AutoModelForMaskedLM if sys.argv[2] == "bert" else AutoModelForCausalLM
network = auto.from_pretrained(sys.argv[1]).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(network(torch.arange(5, 29).view(2, 12))[0], sys.argv[3])
assert "lm_lightning" not in sys.modules
"""
    done = subprocess.run(
        [python("transformers"), "-c", code, target, kind, tmp_path / "outputs.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    again, own, whole = torch.load(tmp_path / "outputs.pt"), outputs(target), outputs(folders[kind])
    assert torch.allclose(again, own, atol=1e-4)
    assert 0 < (own - whole).abs().mean() < 0.3 * whole.std()

    def of_blocks(folder: Path) -> int:
        inside = [w for n, w in load_file(folder / "model.safetensors").items() if "layer" in n or ".h." in n]
        return sum(w.numel() * w.element_size() for w in inside if w.ndim > 1)

    share = of_blocks(target) / of_blocks(folders[kind])
    assert share <= (0.16 if recipe in ("nf4", "fp4") else 0.3), share
    with pytest.raises(UserError, match="is quantized already"):
        recipes.compress(target, recipe, tmp_path / "twice")


def test_quantized_model_is_not_trained(fit, folders, tmp_path: Path):
    recipes.compress(folders["llama"], "int8", tmp_path / "target")
    weights = ("--model.network", "null", "--model.pretrained", tmp_path / "target")
    with pytest.raises(UserError, match="is quantized, so it can be evaluated but not trained"):
        fit(*weights, "--data.tokenizer.path", tmp_path / "target")


@pytest.mark.parametrize("kind", SIZES)
def test_narrow_model_gives_the_outputs_of_the_masked_one(folders, kind: str, tmp_path: Path):
    recipes.compress(folders[kind], "width=0.5", tmp_path / "target")
    narrow, whole = load(tmp_path / "target"), load(folders[kind])
    key, width = structure.width_of(whole.config)
    assert getattr(narrow.config, key) == width // 2
    assert narrow.num_parameters() < whole.num_parameters()
    # The units that are gone, made zero in the whole network: those whose row into the next layer is not in the other.
    down = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "bert": "output.dense"}[kind]
    with torch.no_grad():
        kept = dict(narrow.named_modules())
        for name, layer in whole.named_modules():
            if name.endswith(down) and "attention" not in name:
                rows = layer.weight if kind == "gpt2" else layer.weight.T
                own = kept[name].weight if kind == "gpt2" else kept[name].weight.T
                gone = ~(rows[:, None] == own[None]).all(-1).any(1)
                assert gone.sum() == width // 2
                importance = rows.norm(dim=1)  # and of what comes in
                for up in {"gpt2": ["c_fc"], "llama": ["gate_proj", "up_proj"], "bert": ["intermediate.dense"]}[kind]:
                    end = down if kind == "bert" else down.rpartition(".")[2]
                    before = dict(whole.named_modules())[name.removesuffix(end) + up]
                    importance = importance * (before.weight.T if kind == "gpt2" else before.weight).norm(dim=1)
                assert importance[gone].max() <= importance[~gone].min()
                rows[gone] = 0
        assert torch.allclose(narrow(TOKENS)[0], whole(TOKENS)[0], atol=1e-5)


@pytest.mark.parametrize("kind", SIZES)
def test_shallow_model_has_the_named_blocks(deep, kind: str, tmp_path: Path):
    recipes.compress(deep[kind], "layers=0.5", tmp_path / "target")
    shallow, whole = load(tmp_path / "target"), load(deep[kind])
    from lm_lightning.networks import blocks

    assert shallow.config.num_hidden_layers == 2
    for own, other in zip(blocks(shallow), [blocks(whole)[0], blocks(whole)[3]]):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters()))


@pytest.mark.parametrize("kind", SIZES)
def test_sparse_models_have_as_many_zeros_as_were_asked_for(folders, kind: str, tmp_path: Path):
    recipes.compress(folders[kind], "sparse=0.7", tmp_path / "sparse")
    recipes.compress(folders[kind], "2:4", tmp_path / "two")
    for layer in linear_layers(AutoModel.from_pretrained(tmp_path / "sparse")).values():
        assert (layer.weight == 0).sum() == round(0.7 * layer.weight.numel())
    for layer in linear_layers(AutoModel.from_pretrained(tmp_path / "two")).values():
        assert ((by_rows(layer, layer.weight).unflatten(1, (-1, 4)) == 0).sum(2) == 2).all()


def test_heads_are_left_out_with_all_that_share_their_keys(tmp_path: Path):
    torch.manual_seed(0)
    sizes = SIZES["llama"] | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 300}
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
    whole.save_pretrained(tmp_path / "whole")
    recipes.compress(tmp_path / "whole", "heads=0.5", tmp_path / "target")
    narrow = load(tmp_path / "target")
    settings = ("num_attention_heads", "num_key_value_heads", "head_dim")
    assert [getattr(narrow.config, name) for name in settings] == [4, 2, 8]
    with torch.no_grad():
        for own, block in zip(narrow.model.layers, whole.model.layers):
            columns, kept = block.self_attn.o_proj.weight.T, own.self_attn.o_proj.weight.T
            gone = ~(columns[:, None] == kept[None]).all(-1).any(1)
            groups = gone.view(4, 16)  # two heads of eight, by their keys
            assert (groups.all(1) | ~groups.any(1)).all() and gone.sum() == 32
            columns[gone] = 0
        assert torch.allclose(narrow(TOKENS)[0], whole(TOKENS)[0], atol=1e-5)


@traced
@pytest.mark.slow
def test_program_runs_with_torch_alone(folders, tmp_path: Path):
    """In a fresh process, with other numbers of rows and tokens."""
    code = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
tokens = torch.arange(3, 30).view(3, 9)
torch.save(program(tokens, torch.zeros_like(tokens), torch.ones_like(tokens)), sys.argv[2])
assert "transformers" not in sys.modules
"""
    recipes.compress(folders["bert"], "layers=0.5+pt2", tmp_path / "target")
    recipes.compress(folders["bert"], "layers=0.5", tmp_path / "torch")
    command = [sys.executable, "-c", code, tmp_path / "target" / "model.pt2", tmp_path / "outputs.pt"]
    assert subprocess.run(command).returncode == 0
    tokens = torch.arange(3, 30).view(3, 9)
    with torch.no_grad():
        right = load(tmp_path / "torch")(tokens).logits
    (told,) = torch.load(tmp_path / "outputs.pt")
    assert torch.allclose(told, right, atol=1e-5)
    assert torch.allclose(formats.runner(tmp_path / "target")(input_ids=tokens)["logits"], right, atol=1e-5)
    for recipe in ("onnx", "pt2"):  # of a GPT
        recipes.compress(folders["gpt2"], recipe, tmp_path / recipe)
        told = formats.runner(tmp_path / recipe)(input_ids=tokens)["logits"]
        with torch.no_grad():
            assert torch.allclose(told, load(folders["gpt2"])(tokens).logits, atol=1e-4)


@traced
@pytest.mark.slow
def test_onnx_runs_with_onnxruntime_alone(folders, tmp_path: Path):
    code = """
import sys, numpy, onnxruntime
tokens = numpy.arange(3, 30).reshape(3, 9)
inputs = {"input_ids": tokens, "attention_mask": numpy.ones_like(tokens)}
for folder in sys.argv[1:]:
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    numpy.save(f"{folder}/outputs.npy", session.run(["logits"], inputs)[0])
assert "torch" not in sys.modules
"""
    with torch.no_grad():
        right = load(folders["llama"])(torch.arange(3, 30).view(3, 9)).logits
    tolerances = {"onnx": 1e-4, "onnx-int8": 0.3, "onnx-int8-blocks": 0.1, "onnx-int4": 1}
    for recipe in tolerances:
        recipes.compress(folders["llama"], recipe, tmp_path / recipe)
    command = [sys.executable, "-c", code, *(tmp_path / recipe for recipe in tolerances)]
    assert subprocess.run(command).returncode == 0
    for recipe, tolerance in tolerances.items():
        found = torch.from_numpy(numpy.load(tmp_path / recipe / "outputs.npy"))
        assert (found - right).abs().max() < tolerance * right.std(), recipe


@traced
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize(("recipe", "share"), [("onnx-int8-blocks", 0.3), ("onnx-int4", 0.16)])
@pytest.mark.slow
def test_blocks_of_onnx_are_of_all_layers(folders, kind: str, recipe: str, share: float, tmp_path: Path):
    recipes.compress(folders[kind], recipe, tmp_path / "target")
    layers = structure.linear_layers(load(folders[kind])).values()
    sizes = formats.quantized(tmp_path / "target" / "model.onnx")
    assert len(sizes) == len(layers)
    assert sum(sizes) <= share * sum(4 * layer.weight.numel() for layer in layers)
    told = formats.runner(tmp_path / "target")(input_ids=TOKENS)["logits"]
    with torch.no_grad():
        right = load(folders[kind])(TOKENS).logits
    assert 0 < (told - right).abs().mean() < 0.3 * right.std()


@traced
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.slow
def test_int8_of_onnx_is_of_the_blocks_and_not_of_the_head(folders, kind: str, tmp_path: Path):
    import onnx

    recipes.compress(folders[kind], "onnx-int8", tmp_path / "target")
    weights = onnx.load(tmp_path / "target" / "model.onnx").graph.initializer
    done = [tuple(own.dims) for own in weights if own.name.endswith("_quantized")]
    layers = structure.linear_layers(load(folders[kind]))
    assert sorted(done) == sorted(tuple(sorted_shape(layer)) for layer in layers.values())


def sorted_shape(layer: torch.nn.Module) -> tuple[int, int]:
    """(inputs, outputs), as ONNX has them."""
    return tuple(structure.by_rows(layer, layer.weight).T.shape)


@pytest.mark.slow
def test_calibration_measures_what_layers_are_given(fit, recipe: Path):
    """By the run's first training batches, as a plain loop over them tells."""
    run = fit()
    inputs = evaluation.calibrate(run / "config.yaml", run / "model", 3)
    network = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    from lm_lightning.cli.app import CLI

    class Batches(Callback):
        def on_validation_start(self, trainer, pl_module):
            trainer.datamodule.setup("fit")
            self.ids = [batch["input_ids"] for _, batch in zip(range(3), trainer.datamodule.train_dataloader())]

    batches = Batches()
    weights = ("--model.network", "null", "--model.pretrained", run, "--data.tokenizer.path", run / "model")
    CLI(["validate", "--config", str(recipe), *map(str, weights)], [batches])
    assert len(torch.stack(batches.ids).unique(dim=0)) == 3
    squares, changes = torch.zeros(32), torch.zeros(2)
    with torch.no_grad():
        for ids in batches.ids:
            states = network(ids, output_hidden_states=True).hidden_states
            squares += network.transformer.h[1].ln_1(states[1]).square().mean((0, 1)) / 3
            changes[0] += (1 - torch.cosine_similarity(states[0], states[1], dim=-1)).mean() / 3
    assert torch.allclose(inputs.norms["transformer.h.1.attn.c_attn"], squares.sqrt(), rtol=1e-3)
    assert inputs.changes[0] == pytest.approx(changes[0].item(), rel=1e-3) and len(inputs.changes) == 2


def test_recipes_go_by_what_layers_are_given(deep, tmp_path: Path):
    network = load(deep["gpt2"])
    draw = torch.Generator().manual_seed(0)
    norms = {
        name: 10 * torch.rand(structure.by_rows(layer, layer.weight).shape[1], generator=draw)
        for name, layer in structure.linear_layers(network).items()
    }
    known = lambda folder: calibration.Statistics(norms, [0.3, 0.1, 0.2, 0.05])  # noqa: E731
    for recipe in ("wanda=0.5", "wanda-2:4", "width=0.5", "layers=0.5"):
        recipes.compress(deep["gpt2"], recipe, tmp_path / recipe, known)
    for name, layer in structure.linear_layers(load(tmp_path / "wanda=0.5")).items():
        scores = dict(network.named_modules())[name].weight.abs() * norms[name][:, None]
        gone = layer.weight == 0
        assert (gone.sum(0) == len(gone) // 2).all()
        for column in range(0, gone.shape[1], 7):
            assert scores[gone[:, column], column].max() <= scores[~gone[:, column], column].min()
    for name, layer in structure.linear_layers(load(tmp_path / "wanda-2:4")).items():
        scores = (dict(network.named_modules())[name].weight.abs() * norms[name][:, None]).T.unflatten(1, (-1, 4))
        kept = scores.topk(2).indices.sort().values
        assert torch.equal((layer.weight.T.unflatten(1, (-1, 4)) != 0).nonzero()[:, 2].view_as(kept), kept)
    narrow = load(tmp_path / "width=0.5").transformer.h[2].mlp.c_proj.weight
    whole = network.transformer.h[2].mlp.c_proj.weight
    importance = whole.norm(dim=1) * norms["transformer.h.2.mlp.c_proj"]
    assert torch.equal(narrow, whole[importance.topk(128).indices.sort().values])
    shallow = load(tmp_path / "layers=0.5").transformer.h
    for own, number in zip(shallow, (0, 2)):
        assert torch.equal(own.mlp.c_fc.weight, network.transformer.h[number].mlp.c_fc.weight)
    with pytest.raises(UserError, match="need data to measure inputs: give a run folder, or --config"):
        recipes.compress(deep["gpt2"], "wanda", tmp_path / "none")


def test_sizes_that_a_recipe_cannot_handle_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=300, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tiny")
    with pytest.raises(
        UserError, match="feed-forward width of 16, which is also its hidden size.*omit the recipe width"
    ):
        recipes.compress(tmp_path / "tiny", "width=0.5", tmp_path / "target")
    functional = pytest.importorskip("bitsandbytes").functional
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)  # as on CPUs with bf16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="nf4 needs .* a multiple of 32 on this CPU.*q_proj of LlamaForCausalLM has 16"):
        recipes.compress(tmp_path / "tiny", "nf4", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_only_the_named_layers_are_compressed(folders, tmp_path: Path):
    for recipe in ("sparse", "nf4"):
        recipes.compress(folders["llama"], recipe, tmp_path / recipe, modules=["*mlp*"])
    for name, layer in structure.linear_layers(load(tmp_path / "sparse")).items():
        assert ((layer.weight == 0).sum() > 0) == ("mlp" in name)
    for name, layer in structure.linear_layers(load(tmp_path / "nf4")).items():
        assert (layer.weight.dtype == torch.uint8) == ("mlp" in name)
    with pytest.raises(UserError, match=r"\*none\* matches no linear layer"):
        recipes.compress(folders["llama"], "sparse", tmp_path / "none", modules=["*mlp*", "*none*"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU can compute them")
@pytest.mark.parametrize("recipe", ["float8", "int4-weights"])
def test_recipes_of_gpus_are_refused_elsewhere(folders, recipe: str, tmp_path: Path):
    with pytest.raises(UserError, match="needs a CUDA GPU: use int8 or nf4"):
        recipes.compress(folders["llama"], recipe, tmp_path / "target")


@traced
@pytest.mark.slow
def test_onnx_gives_the_outputs_of_the_network(folders, tmp_path: Path):
    for recipe, tolerance in (("onnx", 1e-4), ("width=0.5+onnx-int8", 0.3)):
        folder = tmp_path / recipe.replace("=", "-")
        recipes.compress(folders["bert"], recipe, folder)
        running = formats.runner(folder)
        recipes.compress(folders["bert"], "width=0.5", tmp_path / f"{recipe}.torch")
        whole = load(folders["bert"] if recipe == "onnx" else tmp_path / f"{recipe}.torch")
        for rows in (1, 2):  # any number of rows and tokens, with a mask and token types
            ids = TOKENS[:rows, : 6 * rows]
            inputs = {"input_ids": ids, "token_type_ids": ids % 2, "attention_mask": torch.ones_like(ids)}
            inputs["attention_mask"][0, -2:] = 0
            told = running(**inputs)["logits"]
            with torch.no_grad():
                right = whole(**inputs).logits
                other = whole(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
            assert (told - right).abs().max() < tolerance * right.std()
            assert (other - right).abs().max() > 1e-3  # so that the types matter
        assert (folder / "tokenizer.json").is_file() and not list(folder.glob("*.safetensors"))
        with pytest.raises(
            UserError, match="has the inputs input_ids, token_type_ids, attention_mask, but .* has position_ids"
        ):
            running(input_ids=TOKENS, position_ids=TOKENS)


def test_what_lies_beside_the_weights_is_kept(folders, tmp_path: Path):
    """The head of a parser, and the pooling of embeddings."""
    source = shutil.copytree(folders["bert"], tmp_path / "source")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]))
    save_file({"root": torch.ones(2)}, source / "head.safetensors")
    for recipe in ("sparse", "width=0.5+layers=0.5"):
        recipes.compress(source, recipe, tmp_path / "target")  # the second in the first one's place
        assert (tmp_path / "target" / "1_Pooling" / "config.json").is_file()
        assert torch.equal(load_file(tmp_path / "target" / "head.safetensors")["root"], torch.ones(2))
    assert load(tmp_path / "target").config.num_hidden_layers == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}  # nothing half done is left


@traced
@pytest.mark.parametrize(
    ("data", "model", "monitor"),
    [
        pytest.param("ParsingData", "Parser", "val/las", marks=needs("tasks.parsing")),
        pytest.param("TaggingData", "Tagging", "val/f1", marks=needs("tasks.tagging")),
    ],
)
@pytest.mark.slow
def test_tasks_keep_their_metrics(cli, tmp_path: Path, data: str, model: str, monitor: str):
    """Fewer bits, or another runtime, but the same network: also with a head that transformers has not."""
    from clauses import recipe as recipe_of

    recipe = recipe_of(tmp_path, model, data, monitor)
    flags = ("--model.network.num_hidden_layers=1", "--trainer.max_steps", 60, "--trainer.val_check_interval", 60)
    out = cli("fit", "--config", recipe, *flags)
    run = Path(next(line for line in out.splitlines() if line.startswith("run folder: ")).split(": ", 1)[1])
    cli("compress", run, "--recipe", "[onnx, sparse=0.01]", "--seconds", 0.05, "--tokens", 16)
    with open(run / "compressed" / "compression.csv", newline="") as file:
        none, onnx, sparse = csv.DictReader(file)
    assert float(none[monitor]) > 0.5
    assert float(onnx["loss"]) == pytest.approx(float(none["loss"]), abs=1e-4)
    assert float(onnx[monitor]) == pytest.approx(float(none[monitor]), abs=1e-6)
    assert float(sparse["loss"]) == pytest.approx(float(none["loss"]), abs=0.05)


@traced
@pytest.mark.slow
def test_masked_language_models_have_the_same_loss_in_onnx(fit, cli, masked: tuple):
    run = fit(*masked, "--model.network.num_hidden_layers=1", "--trainer.max_steps", 5)
    cli("compress", run, "--recipe", "onnx", "--seconds", 0.05, "--tokens", 16)
    with open(run / "compressed" / "compression.csv", newline="") as file:
        none, onnx = csv.DictReader(file)
    assert float(onnx["loss"]) == pytest.approx(float(none["loss"]), abs=1e-4)


@pytest.mark.slow
def test_table_is_of_what_was_measured(fit, cli, recipe: Path):
    run = fit("--model.network.n_positions", 64)
    other = fit("--seed_everything", 2)
    flags = ("--seconds", 0.05, "--tokens", 16, "--beside", f"[{other}]")
    out = cli("compress", run, "--recipe", "[sparse=0.5, 2:4, width=0.5]", *flags)
    with open(run / "compressed" / "compression.csv", newline="") as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["none", "sparse=0.5", "2:4", "width=0.5", str(other)]
    assert float(rows[str(other)]["loss"]) != float(rows["none"]["loss"])
    assert float(rows["none"]["layers"]) == 4 * 12 * 32 * 32 * 2 / 2**20
    assert float(rows["none"]["zeros"]) == 0 and float(rows["sparse=0.5"]["zeros"]) == pytest.approx(0.5, abs=1e-3)
    assert int(rows["width=0.5"]["parameters"]) < int(rows["none"]["parameters"])
    validation = cli(
        "validate",
        "--config",
        recipe,
        "--model.network",
        "null",
        "--model.pretrained",
        run / "model",
        "--data.tokenizer.path",
        run / "model",
    )
    (line,) = [line for line in validation.splitlines() if "val/loss" in line]
    assert float(rows["none"]["loss"]) == pytest.approx(float(line.split("│")[2]), abs=1e-4)
    assert float(rows["sparse=0.5"]["loss"]) != float(rows["none"]["loss"])
    assert (run / "compressed" / "compression.png").is_file()
    assert "| width=0.5 |" in out.replace("*", "")
    network = AutoModelForCausalLM.from_pretrained(run / "compressed" / "width-0.5")
    assert network.config.n_inner == 64


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int9", "there is no recipe 'int9': use one of int8, "),
        ("width=2", "needs a fraction between 0 and 1: width=0.5"),
        ("nf4=0.5", "nf4 has none"),
        ("width=", "width needs a fraction"),
        ("int8+width=0.5", "width follows a step whose result has no plain weights: put width first"),
    ],
)
def test_unknown_recipes_are_refused(cli, folders, recipe: str, message: str):
    with pytest.raises(UserError, match=message):
        cli("compress", folders["bert"], "--recipe", recipe)
    assert json.loads((folders["bert"] / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert not (folders["bert"] / "compressed").exists()


def test_folders_of_the_user_are_left_alone(cli, folders, tmp_path: Path):
    (tmp_path / "layers-0.5").mkdir()
    (tmp_path / "layers-0.5" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="layers-0.5 exists already: remove it, or give another --output"):
        cli("compress", folders["bert"], "--recipe", "[sparse, layers=0.5]", "--output", tmp_path)
    assert (tmp_path / "layers-0.5" / "mine.txt").is_file() and not (tmp_path / "sparse").exists()


@pytest.mark.slow
def test_folder_of_a_model_alone_gets_its_own_beside_it(cli, folders, tmp_path: Path):
    source = shutil.copytree(folders["gpt2"], tmp_path / "mine")
    for _ in range(2):  # the second in the place of the first
        out = cli("compress", source, "--recipe", "sparse", "--seconds", 0.05, "--tokens", 16)
    assert (tmp_path / "mine-compressed" / "sparse" / "model.safetensors").is_file()
    assert "| sparse |" in out.replace("*", "")


@pytest.mark.slow
def test_model_alone_is_measured_by_the_data_of_a_config(fit, cli, recipe: Path, tmp_path: Path):
    run = fit()
    source = shutil.copytree(run / "model", tmp_path / "alone")
    settings = yaml.safe_load(recipe.read_text())
    settings["data"]["init_args"]["tokenizer"] = {"path": str(source)}
    recipe.write_text(yaml.safe_dump(settings))
    flags = ("--seconds", 0.05, "--tokens", 16, "--calibration_batches", 2)
    with pytest.raises(UserError, match="there is no config nowhere.yaml"):
        cli("compress", source, "--config", "nowhere.yaml", "--recipe", "sparse")
    with pytest.raises(UserError, match=r"\*none\*, \*neither\* matches no linear layer"):
        cli("compress", source, "--modules", "[*none*, '*neither*']", "--recipe", "sparse")
    assert not (tmp_path / "alone-compressed" / "sparse").exists()
    cli("compress", source, "--config", recipe, "--recipe", "wanda=0.5", *flags)
    with open(tmp_path / "alone-compressed" / "compression.csv", newline="") as file:
        none, wanda = csv.DictReader(file)
    assert 0 < float(none["loss"]) != float(wanda["loss"]) > 0


def table_of(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "compression.csv", newline="", encoding="utf-8") as file:
        return {row["recipe"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_recipe_that_fails_is_a_row_and_the_others_are_finished(folders, cli, tmp_path: Path, monkeypatch):
    """As bnb-int8 does with a width that it cannot divide, in the pass that is measured."""
    real, output = measures.Bench.measure, tmp_path / "out"
    flags = ("--seconds", 0.05, "--tokens", 16, "--output", output)
    recipe = ("--recipe", "[sparse=0.5, width=0.5, layers=0.5]")

    def measure(self, recipe, *rest):
        if recipe == "width=0.5":
            raise RuntimeError("mat1 and mat2 | cannot be\nmultiplied")
        return real(self, recipe, *rest)

    monkeypatch.setattr(measures.Bench, "measure", measure)
    message = r"1 of 3 models failed .*try them again\): width=0.5: RuntimeError: mat1 and mat2 \| cannot be multiplied"
    with pytest.raises(UserError, match=message):
        cli("compress", folders["gpt2"], *recipe, *flags)
    before = table_of(output)
    assert list(before) == ["none", "sparse=0.5", "width=0.5", "layers=0.5"]
    assert before["width=0.5"]["error"].startswith("RuntimeError: mat1") and before["width=0.5"]["latency_1"] == ""
    assert float(before["layers=0.5"]["latency_1"]) > 0 and before["layers=0.5"]["error"] == ""
    lines = (output / "compression.md").read_text(encoding="utf-8").splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}) == 1

    monkeypatch.setattr(measures.Bench, "measure", real)  # only that one is done again
    out = cli("compress", folders["gpt2"], *recipe, *flags)
    assert "width=0.5: measured" in out and "sparse=0.5: measured" not in out
    after = table_of(output)
    assert after["layers=0.5"] == before["layers=0.5"] and float(after["width=0.5"]["latency_1"]) > 0
    with pytest.raises(UserError, match="sparse-0.5 exists already"):  # finished, so another would replace it
        cli("compress", folders["gpt2"], *recipe, *flags)


@pytest.mark.slow
def test_interrupted_compress_keeps_its_rows_and_does_what_is_missing(folders, cli, tmp_path: Path, monkeypatch):
    real = measures.Bench.measure
    source = shutil.copytree(folders["gpt2"], tmp_path / "mine")
    args = ("compress", source, "--recipe", "[sparse=0.5, layers=0.5]", "--seconds", 0.05)

    def measure(self, recipe, *rest):
        if recipe == "layers=0.5":
            raise KeyboardInterrupt
        return real(self, recipe, *rest)

    monkeypatch.setattr(measures.Bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        cli(*args, "--tokens", 16)
    before = table_of(tmp_path / "mine-compressed")
    assert list(before) == ["none", "sparse=0.5"] and float(before["sparse=0.5"]["latency_1"]) > 0
    monkeypatch.setattr(measures.Bench, "measure", real)
    out = cli(*args, "--tokens", 16)
    assert "sparse=0.5: measured" not in out and "none: measured" not in out and "layers=0.5: measured" in out
    after = table_of(tmp_path / "mine-compressed")["sparse=0.5"]
    assert after | {"pareto": ""} == before["sparse=0.5"] | {"pareto": ""}  # which depends on the other rows
    assert "sparse=0.5: measured" in cli(*args, "--tokens", 16)  # a finished one begins anew

    monkeypatch.setattr(measures.Bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        cli(*args, "--tokens", 16)
    monkeypatch.setattr(measures.Bench, "measure", real)
    assert "sparse=0.5: measured" in cli(*args, "--tokens", 8)  # with other options, so does an interrupted one


def test_rows_keep_their_names_in_the_table(tmp_path: Path):
    """The names of the models beside the recipes are paths, which may contain "nan"."""
    values = {"recipe": "none", "parameters": 1, **dict.fromkeys(measures.Measures._fields[2:], 1.0)}
    other = values | {"recipe": "runs/finance", "zeros": float("nan")}
    table.write([results.Row(own["recipe"], measures=own) for own in (values, other)], tmp_path)
    (line,) = [line for line in (tmp_path / "compression.md").read_text().splitlines() if "finance" in line]
    assert line.startswith("| **runs/finance** | 1 |  | 1.0 (1.00) |")


@pytest.mark.parametrize("flags", [("--tokens", 0), ("--calibration_batches", -1)], ids=["tokens", "batches"])
def test_invalid_numbers_are_refused(cli, folders, flags: tuple):
    with pytest.raises(UserError, match=f"{flags[0]} is {flags[1]}, but must be"):
        cli("compress", folders["bert"], *flags)
    assert not (folders["bert"] / "compressed").exists()


def test_timed_passes_have_no_more_tokens_than_positions(tmp_path: Path, capsys: pytest.CaptureFixture):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from lm_lightning.compression.measures import Bench

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=30, max_position_embeddings=20, pad_token_id=1, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    bench = Bench(tmp_path, 64, 0.01)
    assert bench.tokens == 18 and bench.measure("none", tmp_path, 1.0).latency_1 > 0
    assert "timed passes have 18 tokens instead of 64" in capsys.readouterr().out
