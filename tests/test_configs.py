"""Every recipe under configs/ is run, with its own classes and options, but less data, few steps, a small network."""

from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 48, "n_head": 2},
    "llama": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    | {"num_key_value_heads": 3},
    "bert": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64},
    "modernbert": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64},
}


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.yaml")), ids=lambda file: file.stem)
def test_recipe_trains_and_exports(file: Path, cli, tmp_path: Path, cache_dir: Path, corpus_file: Path):
    recipe = yaml.safe_load(file.read_text())
    # a recipe's own tokenizer may be one of the Hub, which tests do without
    tokenizer = '{"path": null, "algorithm": "%s", "vocab_size": 400}' % (
        "wordpiece" if recipe["data"]["class_path"] == "MaskedData" else "bpe"
    )
    network = recipe["model"]["init_args"]["network"]
    flags = [f"--model.network.{key}={value}" for key, value in SMALL[network["model_type"]].items()]
    out = cli(
        *("fit", "--config", file, *flags, "--runs_dir", tmp_path, "--data.cache_dir", cache_dir),
        *("--data.corpus.paths", corpus_file, "--data.corpus.validation_fraction", 0.1, "--data.block_size", 64),
        *("--data.tokenizer", tokenizer, "--data.batch_size", 2, "--trainer.max_steps", 4),
        *("--model.schedule.warmup_steps", 1, "--trainer.val_check_interval", 2, "--trainer.limit_val_batches", 1),
        *("--trainer.accumulate_grad_batches", 2, "--model.compile", "false", "--trainer.accelerator", "cpu"),
    )
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    assert run.parent.name == file.stem
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert (run / "model" / "model.safetensors").is_file()
