"""The fused loss: the same numbers as the plain one, with less memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lm_lightning import losses
from lm_lightning.losses import linear_cross_entropy

N, H, V = 13, 8, 20  # rows, width, vocabulary


def example(rows=N, missing=(1, 5, 12), bias=True, vocab_size=V):
    """Hidden states, head, bias and targets, of which those of the rows `missing` are left out."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator, requires_grad=True) for n in (rows, V))
    bias = torch.randn(V, generator=generator, requires_grad=True) if bias else None
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[list(missing)] = -100
    return hidden, weight, bias, targets


def plain(hidden, weight, bias, targets):
    """The loss from all the logits at once."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return cross_entropy(logits.float(), targets, reduction="sum")


def with_gradients(loss, hidden, weight, bias):
    """The loss and its gradients for whichever tensors need one; the factor stands for what comes after the loss."""
    tensors = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(0.5 * loss, tensors)]


def assert_close(actual, expected, tolerance=1e-5):
    """Compares tensors relative to the largest entry."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max(), f"{a} is not {e}"


def assert_same_as_plain(hidden, weight, bias, targets):
    fused = linear_cross_entropy(hidden, weight, bias, targets)
    assert_close(
        with_gradients(fused, hidden, weight, bias),
        with_gradients(plain(hidden, weight, bias, targets), hidden, weight, bias),
    )


class Watch(TorchDispatchMode):
    """Records the largest tensor made, and the number of matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += str(function) in ("aten.mm.default", "aten.mm.out", "aten.addmm.default")
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("missing", [(), (1, 5, 12), range(1, N)])
def test_loss_and_gradients_are_those_of_the_plain_loss(bias, missing):
    assert_same_as_plain(*example(bias=bias, missing=missing))


@pytest.mark.parametrize("chunk, part", [(1, 1), (4, 1), (4, 3), (4, N), (N, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_number_of_chunks_does_not_matter(monkeypatch, chunk, part, bias):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk * V)
    monkeypatch.setattr(losses, "SLICE_LOGITS", part * V)
    assert_same_as_plain(*example(bias=bias, missing=(0, 1, 2, 3, 7)))  # a chunk of 4 rows has no target at all


def test_a_chunk_smaller_than_one_row_is_one_row(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(losses, "SLICE_LOGITS", 1)
    assert_same_as_plain(*example())


def test_no_more_logits_are_held_than_a_chunk_has(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 10 * V)
    hidden, weight, bias, targets = example(rows=40)
    with Watch() as watch:
        linear_cross_entropy(hidden, weight, bias, targets).backward()
    assert watch.largest == max(10 * V, hidden.numel(), weight.numel()) < 40 * V


def test_padded_rows_of_the_head_are_no_tokens():
    hidden, weight, bias, targets = example(vocab_size=15)
    fused = with_gradients(linear_cross_entropy(hidden, weight, bias, targets, 15), hidden, weight, bias)
    expected = with_gradients(plain(hidden, weight[:15], bias[:15], targets), hidden, weight, bias)
    assert_close(fused, expected)
    assert fused[0] < plain(hidden, weight, bias, targets), "the padded rows take part in the softmax"
    assert (fused[2][15:] == 0).all() and (fused[3][15:] == 0).all()


@pytest.mark.parametrize("rows", [0, N])
def test_without_any_target_loss_and_gradients_are_zero(rows):
    hidden, weight, bias, targets = example(rows=rows, missing=range(rows))
    for tensor in with_gradients(linear_cross_entropy(hidden, weight, bias, targets), hidden, weight, bias):
        assert (tensor == 0).all()


@pytest.mark.parametrize("needing", ["hidden", "weight", "bias"])
def test_one_gradient_can_be_had_without_the_others(needing):
    hidden, weight, bias, targets = example()
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        tensor.requires_grad_(name == needing)
    assert_same_as_plain(hidden, weight, bias, targets)


def test_a_network_learns_through_the_loss_as_through_the_plain_one():
    """The gradient goes on into the layers before, and a tied embedding sums both of its uses."""
    layer, embedding = torch.nn.Linear(H, H), torch.nn.Embedding(V, H)
    targets = example()[-1]
    gradients = []
    for loss in (linear_cross_entropy, plain):
        hidden = layer(embedding(torch.arange(N)))
        tensors = [layer.weight, layer.bias, embedding.weight]
        gradients.append(torch.autograd.grad(loss(hidden, embedding.weight, None, targets), tensors))
    assert_close(*gradients)


def test_a_row_without_target_may_hold_anything():
    """What comes after the end of a text is computed, but means nothing."""
    hidden, weight, bias, targets = example(missing=(2,))
    with torch.no_grad():
        hidden[2] = torch.inf
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    present = targets != -100
    assert_close([loss.detach()], [plain(hidden[present], weight, bias, targets[present]).detach()])


def test_large_logits_do_not_overflow():
    hidden, weight, bias, targets = example()
    hidden = (hidden.detach() * 1e4).requires_grad_()
    assert_same_as_plain(hidden, weight, bias, targets)


# Precision


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_makes_the_products_in_bfloat16_and_the_sums_in_float32(monkeypatch, bias):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 4 * V)
    hidden, weight, bias, targets = example(rows=1000, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float() + (0 if bias is None else bias)
    assert loss.dtype == torch.float32
    assert_close([loss], [cross_entropy(logits, targets, reduction="sum")])

    fused = with_gradients(loss, hidden, weight, bias)
    assert {tensor.dtype for tensor in fused} == {torch.float32}
    assert_close(fused, with_gradients(plain(hidden, weight, bias, targets), hidden, weight, bias), tolerance=1e-2)


def test_a_bfloat16_head_takes_bfloat16_states_and_gives_bfloat16_gradients():
    hidden, weight, bias, targets = example()
    hidden, weight, bias = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight, bias))
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert loss.dtype == torch.float32
    fused = with_gradients(loss, hidden, weight, bias)
    assert {tensor.dtype for tensor in fused[1:]} == {torch.bfloat16}
    precise = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = with_gradients(plain(*precise, targets), *precise)
    assert_close([tensor.float() for tensor in fused], expected, tolerance=2e-2)


# Evaluation


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_loss(mode):
    hidden, weight, bias, targets = example()
    with mode():
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert not loss.requires_grad
    assert_close([loss], [plain(hidden, weight, bias, targets).detach()])


def test_evaluation_computes_no_gradients():
    """The logits are the only matrix product."""
    hidden, weight, bias, targets = example()
    with torch.no_grad(), Watch() as watch:
        linear_cross_entropy(hidden, weight, bias, targets)
    assert watch.products == 1


@pytest.mark.parametrize("bias", [False, True])
def test_improbable_targets_have_their_exact_loss(bias):
    """Probabilities that float32 cannot represent, and rows without a target between others."""
    torch.manual_seed(0)
    hidden = (torch.randn(12, 8) * 30).requires_grad_()
    weight, shift = (torch.randn(40, 8) * 2).requires_grad_(), torch.randn(40).requires_grad_() if bias else None
    targets = torch.arange(12) * 3
    targets[[2, 7]] = -100
    inputs = [tensor for tensor in (hidden, weight, shift) if tensor is not None]
    logits = hidden @ weight.T if shift is None else hidden @ weight.T + shift
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert expected > 1000
    loss = linear_cross_entropy(hidden, weight, shift, targets)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
