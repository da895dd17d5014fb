"""CausalLM: its loss is that of transformers, and an optimizer step is exact however it is split."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lm_lightning.models.gpt import CausalLM
from lm_lightning.optim import Schedule

NETWORKS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2},
    "llama": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2": {
        "model_type": "gemma2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }  # caps logits
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
    "opt": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gptj": {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 4},  # its head has a bias
}


class Sentences(LightningDataModule):
    """Sequences of unequal length, one a batch or all in one, right-padded."""

    def __init__(self, tokenizer, lengths: list[int], batch_size: int) -> None:
        super().__init__()
        self.tokenizer, self.batch_size, self.seed, self.consumed = tokenizer, batch_size, 0, 0
        self.replica, self.replicas = 0, 1
        self.block_size, self.tokens_per_batch = max(lengths), batch_size * max(lengths)
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(0, len(tokenizer), (n + 1,), generator=generator) for n in lengths]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(list(enumerate(self.rows)), self.batch_size, collate_fn=self.collate)

    def collate(self, items: list) -> dict:
        batch = {
            "input_ids": torch.zeros(len(items), self.block_size, dtype=torch.long),
            "attention_mask": torch.zeros(len(items), self.block_size, dtype=torch.long),
            "targets": torch.full((len(items), self.block_size), -100),
            "id": [i for i, _ in items],
        }
        for row, (_, tokens) in enumerate(items):
            length = len(tokens) - 1
            batch["input_ids"][row, :length] = tokens[:-1]
            batch["attention_mask"][row, :length] = 1
            batch["targets"][row, :length] = tokens[1:]
        return batch


@pytest.fixture(scope="module")
def tokenizer():
    from lm_lightning.data.tokenizer import Tokenizer, train

    return train(Tokenizer(algorithm="bytes"), iter(["text"]), "gpt")


def made(model: CausalLM, tokenizer, mask_documents: bool = False) -> CausalLM:
    """A model with its network, as if in a trainer with this tokenizer."""
    data = SimpleNamespace(
        tokenizer=tokenizer,
        block_size=16,
        length_option="block_size",
        tokens_per_batch=1,
        mask_documents=mask_documents,
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
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_is_that_of_transformers(name: str, tokenizer):
    model = made(CausalLM(network=NETWORKS[name]), tokenizer).eval()
    assert model.has_linear_head == (name != "gemma2")
    tokens = torch.randint(0, len(tokenizer), (3, 17), generator=torch.Generator().manual_seed(0))
    # compare with the same network without the rows that pad the vocabulary
    network = copy.deepcopy(model.network)
    network.resize_token_embeddings(len(tokenizer))
    expected = network(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss, count = model.loss({"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]})
    assert count == 48
    assert (loss / count).item() == pytest.approx(expected.item(), abs=1e-5)


def test_end_of_text_is_trained_as_an_input_although_it_is_also_the_padding(tokenizer):
    model = made(CausalLM(network=NETWORKS["llama"]), tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokens = torch.tensor([[tokenizer.eos_token_id, 5, 6]])
    model.loss({"input_ids": tokens, "targets": tokens})[0].backward()
    assert model.network.get_input_embeddings().weight.grad[tokenizer.eos_token_id].any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_documents_of_a_block_do_not_see_each_other_when_masked(name: str, tokenizer):
    model = made(CausalLM(network=NETWORKS[name]), tokenizer).eval()
    first = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[:, :12] = (second[:, :12] + 1) % 200  # another document before
    third = first.clone()
    third[:, 12:] = (third[:, 12:] + 1) % 200  # another document after
    positions = torch.cat([torch.arange(12), torch.arange(8)]).unsqueeze(0)

    def logits(tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return model.network(input_ids=tokens, use_cache=False, **inputs).logits

    masked = logits(first, position_ids=positions)
    assert torch.equal(masked[:, 12:], logits(second, position_ids=positions)[:, 12:])
    assert torch.equal(masked[:, :12], logits(third, position_ids=positions)[:, :12])
    assert not torch.allclose(logits(first)[:, 12:], logits(second)[:, 12:], atol=1e-4)
    # and a document's logits are those that it has alone
    assert torch.allclose(masked[:, 12:], logits(first[:, 12:]), atol=1e-5)


def test_flash_attention_gets_packed_documents_in_a_single_row(tokenizer, monkeypatch):
    """In batches with several rows, transformers would ignore where documents begin."""
    model = made(CausalLM(network=NETWORKS["llama"]), tokenizer, mask_documents=True).eval()
    tokens = torch.randint(0, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(12 - n)]) for n in (4, 12, 7)])
    batch = {"input_ids": tokens, "position_ids": positions}
    expected = model.outputs(batch)
    given = []
    model.network.register_forward_pre_hook(lambda _, args, inputs: given.append(inputs), with_kwargs=True)
    monkeypatch.setattr("lm_lightning.models.gpt.is_flash", lambda network: True)
    torch.testing.assert_close(model.outputs(batch), expected)
    assert given[0]["input_ids"].shape == given[0]["position_ids"].shape == (1, 36)
    for name in "qk":
        assert given[0][f"cu_seq_lens_{name}"].tolist() == [0, 4, 12, 24, 31, 36]
        assert given[0][f"max_length_{name}"] == 12
        assert given[0][f"cu_seq_lens_{name}"].dtype == torch.int32


def test_new_network_is_checked_where_its_attention_does_not_work(tokenizer, monkeypatch):
    used = []
    head_is_last = CausalLM.head_is_last

    def spy(model: CausalLM) -> bool:
        used.append(model.network.config._attn_implementation)
        return head_is_last(model)

    monkeypatch.setattr(CausalLM, "head_is_last", spy)
    model = made(CausalLM(network=NETWORKS["llama"], attn_implementation="flex_attention"), tokenizer, True)
    assert used == ["eager"] and model.has_linear_head
    assert model.network.config._attn_implementation == "flex_attention"


def trained(tokenizer, batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
    """The weights after one optimizer step on four sequences of very unequal length."""
    model = CausalLM(
        network=NETWORKS["gpt2"] | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),  # shows the gradient as it is
        schedule=Schedule("constant", warmup_steps=0),
    )
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(model, datamodule=Sentences(tokenizer, [5, 60, 8, 40], batch_size))
    return model.network.state_dict()


def test_step_on_unequal_lengths_is_the_same_however_it_is_accumulated(tokenizer):
    at_once = trained(tokenizer, batch_size=4, accumulate=1)
    for batch_size, accumulate in ((1, 4), (2, 2), (3, 2)):  # the last: an incomplete micro-batch
        split = trained(tokenizer, batch_size, accumulate)
        assert max((at_once[k] - split[k]).abs().max().item() for k in at_once) < 1e-6


def test_step_is_that_of_a_plain_loop(tokenizer):
    ours = trained(tokenizer, batch_size=2, accumulate=2)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=320, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    torch.manual_seed(0)
    network = transformers.GPT2LMHeadModel(config).train()
    data = Sentences(tokenizer, [5, 60, 8, 40], batch_size=4)
    (batch,) = data.train_dataloader()
    logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[..., : len(tokenizer)]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    torch.optim.SGD(network.parameters(), lr=1.0).step()
    plain = network.state_dict()
    assert max((ours[k] - plain[k]).abs().max().item() for k in ours) < 1e-6


def test_pretrained_network_trains_with_its_dropout(tokenizer, tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=257, attn_pdrop=0.3)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = made(CausalLM(pretrained=str(tmp_path)), tokenizer)
    assert model.network.training and model.network.transformer.h[0].attn.attn_dropout.p == 0.3


def test_mistakes_in_the_network_are_named(tokenizer, tmp_path):
    from lm_lightning.errors import UserError

    for arguments, reason in (
        ({"network": {"model_type": "gtp2"}}, "did you mean gpt2"),
        ({"network": {"model_type": "gpt2", "n_layers": 3}}, "did you mean n_layer?"),
        ({"network": {"model_type": "gpt2", "vocab_size": 10}}, "has 257 tokens"),
        ({"network": {"model_type": "gpt2", "n_positions": 8}}, "positions for 8 tokens"),
        ({"pretrained": str(tmp_path / "nowhere")}, "does not exist"),
        ({}, "give either model.network"),
        ({"network": {"model_type": "gpt2"}, "pretrained": "gpt2"}, "not both: --model.network null drops"),
    ):
        with pytest.raises(UserError) as refused:
            made(CausalLM(**arguments), tokenizer)
        assert reason in str(refused.value)


def test_network_beside_which_the_tokenizer_would_be_read_as_another_is_refused(tokenizer, monkeypatch):
    """As transformers 5.24 does beside a qwen2, but 5.0 beside none."""
    from lm_lightning.data.tokenizer import Tokenizer, train
    from lm_lightning.errors import UserError

    other = train(Tokenizer(algorithm="bytes"), iter(["text"]), "bert")
    monkeypatch.setattr("lm_lightning.models.build.load", lambda folder: other)
    with pytest.raises(UserError, match="of type gpt2, .* as a different one"):
        made(CausalLM(network=NETWORKS["gpt2"]), tokenizer)


def test_networks_that_see_what_they_should_not_are_refused(tokenizer):
    from lm_lightning.errors import UserError

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    with pytest.raises(UserError, match="attend to following tokens"):
        made(CausalLM(network={"model_type": "bert", **sizes}), tokenizer)
    for name in ("gpt2", "llama", "gemma2", "opt"):
        model = CausalLM(network=NETWORKS[name])
        if name == "opt":
            with pytest.raises(UserError, match="mask_documents does not work with networks of type opt"):
                made(model, tokenizer, mask_documents=True)
        else:
            made(model, tokenizer, mask_documents=True)


def test_weights_of_another_tokenizer_are_refused(tokenizer, tmp_path):
    from lm_lightning.data.tokenizer import Tokenizer, train
    from lm_lightning.errors import UserError

    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2)).save_pretrained(tmp_path)
    train(Tokenizer(algorithm="characters", vocab_size=20), iter(["abc"]), "gpt").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was not trained with the data.s tokenizer"):
        made(CausalLM(pretrained=str(tmp_path)), tokenizer)
