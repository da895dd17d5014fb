"""What `lm_lightning.lora.compat` uses of peft, bitsandbytes and transformers is there."""

from pathlib import Path

import bitsandbytes
import peft
import safetensors.torch
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from lm_lightning.lora import compat

SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 64, "vocab_size": 8, "n_positions": 8}


def gpt() -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES))


def test_the_tensors_of_an_adapter_have_these_names(tmp_path: Path):
    name = "transformer.h.0.attn.c_attn"
    settings = peft.LoraConfig(r=2, target_modules=[name], fan_in_fan_out=True)
    network = peft.inject_adapter_in_model(settings, gpt())
    weights = network.state_dict()
    a, b = compat.matrices(name, weights)
    assert a.shape == (2, 64) and b.shape == (192, 2)
    assert f"{compat.BASE_LAYER.format(name)}.weight" in weights
    assert sum(map(compat.is_matrix, weights)) == 2

    peft.get_peft_model(gpt(), settings).save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {compat.name_in_files(compat.MATRIX.format(name, matrix)) for matrix in "AB"} == saved.keys()


def test_quantized_layers_can_be_read(tmp_path: Path):
    full = gpt()
    full.save_pretrained(tmp_path)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    layer = network.transformer.h[0].attn.c_attn
    assert compat.original_class(layer) is Conv1D
    assert compat.original_class(full.transformer.h[0].attn.c_attn) is None
    weight = full.transformer.h[0].attn.c_attn.weight.T
    torch.testing.assert_close(compat.dequantized(layer), weight.detach(), atol=0.02, rtol=0)


def test_quantized_layers_know_whether_they_repack_their_weights():
    layer = bitsandbytes.nn.Linear4bit(64, 64)
    layer.support_avx512bf16_for_cpu = True
    compat.keep_trainable(torch.nn.Sequential(layer))
    assert hasattr(bitsandbytes.nn.Linear4bit(64, 64), "support_avx512bf16_for_cpu")
    assert layer.support_avx512bf16_for_cpu is False


@torch.no_grad()
def test_adapted_layers_can_be_disabled():
    tokens, full = torch.arange(8).unsqueeze(0), gpt().eval()
    before = full(tokens).logits
    settings = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True, init_lora_weights=False)
    network = peft.inject_adapter_in_model(settings, full)
    layers = [module for module in network.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    adapted, trained = network(tokens).logits, [p.requires_grad for p in network.parameters()]
    compat.set_disabled(layers, True)
    assert torch.equal(network(tokens).logits, before) and not torch.allclose(adapted, before, atol=1e-3)
    assert [p.requires_grad for p in network.parameters()] == trained
    compat.set_disabled(layers, False)
    assert torch.equal(network(tokens).logits, adapted)
