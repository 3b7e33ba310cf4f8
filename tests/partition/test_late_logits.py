"""A head that does not build its logits: the plain loss and its gradients to rounding, and plain logits for whoever looks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_ouroboros.partition import late_logits
from hf_ouroboros.partition.late_logits import LateLogits, only_loss_wanted, with_late_logits

ROWS, TIME, WIDTH, VOCABULARY = 3, 5, 8, 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_logits, "CHUNK_NUMBERS", 4 * VOCABULARY)


def parts(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(ROWS, TIME, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (ROWS, TIME), generator=generator)
    labels[1, 2:] = -100
    return head.to(dtype), hidden, labels


def stock_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    """As Transformers writes it."""
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), shifted, ignore_index=-100, reduction=reduction)


def sliced_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    """As others write it."""
    logits, labels = logits[..., :-1, :].contiguous().float(), labels[..., 1:].contiguous()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", [stock_loss, sliced_loss])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients(dtype: torch.dtype, loss: Callable, reduction: str, autocast: bool) -> None:
    found, losses = [], []
    for late in (False, True):
        head, hidden, labels = parts(dtype)
        with_late_logits(head)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            with only_loss_wanted(late):
                logits = head(hidden)
                assert isinstance(logits, LateLogits) == late
                value = loss(logits, labels, reduction)
        value.backward()
        losses.append(value.detach())
        found.append([hidden.grad, *(p.grad for p in head.parameters())])
    tolerance = 2e-2 if dtype == torch.bfloat16 or autocast else 1e-5
    assert type(losses[1]) is torch.Tensor
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
    for plain, late in zip(*found, strict=True):
        assert plain.dtype == late.dtype
        torch.testing.assert_close(late, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()))


def test_summed_loss_in_bfloat16_is_not_rounded() -> None:
    head, hidden, labels = parts(torch.bfloat16)
    exact = stock_loss(F.linear(hidden, head.weight, head.bias).double(), labels, "sum")
    with_late_logits(head)
    with only_loss_wanted():
        found = stock_loss(head(hidden), labels, "sum")
    assert found.dtype == torch.float32
    assert abs(float(found.detach()) / float(exact.detach()) - 1) < 1e-6


@pytest.mark.parametrize(
    "look",
    [
        lambda logits: logits * 2,
        lambda logits: torch.tanh(logits / 30.0) * 30.0,
        lambda logits: logits.float().argmax(-1),
        lambda logits: logits[..., 3],
        lambda logits: logits[0],
        lambda logits: logits[:, 1:3].float(),
        lambda logits: logits.view(-1),
        lambda logits: torch.cat([logits, logits], 1),
        lambda logits: logits.detach().numpy(),
        lambda logits: F.cross_entropy(logits.view(-1, VOCABULARY), torch.arange(15) % VOCABULARY, label_smoothing=0.1),
        lambda logits: F.cross_entropy(logits.view(-1, VOCABULARY), torch.full((15, VOCABULARY), 1 / VOCABULARY)),
        lambda logits: logits.log_softmax(-1).gather(-1, torch.zeros(ROWS, TIME, 1, dtype=torch.long)),
    ],
)
def test_whoever_looks_gets_the_logits(look: Callable) -> None:
    head, hidden, _ = parts()
    expected = look(head(hidden))
    with_late_logits(head)
    with only_loss_wanted():
        found = look(head(hidden))
    if isinstance(found, LateLogits):
        found = found + 0
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_what_it_is_known_by() -> None:
    head, hidden, _ = parts(torch.bfloat16)
    logits = LateLogits.of(hidden, head.weight, head.bias)
    assert logits.shape == (ROWS, TIME, VOCABULARY) and logits.size(-1) == VOCABULARY and len(logits) == ROWS
    assert (logits.dtype, logits.float().dtype) == (torch.bfloat16, torch.float32)
    assert logits.requires_grad and logits.device == hidden.device
    with torch._C.DisableTorchFunctionSubclass():
        assert logits.untyped_storage().nbytes() < 16


def test_who_asks_whether_they_need_a_gradient_does_not_have_them_made(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, _ = parts()
    monkeypatch.setattr(LateLogits, "made", lambda self: pytest.fail("the logits were made"))
    assert LateLogits.of(hidden, head.weight, head.bias).requires_grad
    for of_hidden, of_weight, of_bias in itertools.product((False, True), repeat=3):
        trained = (hidden.detach().requires_grad_(of_hidden), head.weight.requires_grad_(of_weight))
        late = LateLogits.of(*trained, torch.zeros(VOCABULARY, requires_grad=of_bias))
        assert late.requires_grad == (of_hidden or of_weight or of_bias)
        with torch.no_grad():
            assert not late.requires_grad


def test_only_plain_heads_are_late() -> None:
    head, hidden, _ = parts()
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    with_late_logits(head)
    with only_loss_wanted():
        assert type(head(hidden)) is torch.Tensor
    assert seen == [torch.Tensor]
    other = nn.Sequential(nn.Linear(WIDTH, VOCABULARY))
    with_late_logits(other)
    assert other._compiled_call_impl is None


def test_a_batch_without_any_target() -> None:
    head, hidden, labels = parts()
    with_late_logits(head)
    with only_loss_wanted():
        assert stock_loss(head(hidden), labels * 0 - 100, "sum").item() == 0.0
        assert stock_loss(head(hidden), labels * 0 - 100, "mean").isnan()


@pytest.mark.parametrize("frozen", [False, True])
def test_as_many_products_as_with_logits(frozen: bool) -> None:
    """One to look, one for each gradient that is wanted."""
    counts = {}
    for late in (False, True):
        for graded in (False, True):
            head, hidden, labels = parts(bias=False)
            head.weight.requires_grad_(not frozen)
            with_late_logits(head)
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(graded), only_loss_wanted(late):
                loss = stock_loss(head(hidden), labels, "sum")
                if graded:
                    loss.backward()
            counts[late, graded] = counter.get_total_flops()
    once = 2 * ROWS * TIME * WIDTH * VOCABULARY
    assert counts[True, False] == counts[False, False] == once
    assert counts[True, True] == counts[False, True] == (2 if frozen else 3) * once


def test_a_graph_that_is_kept() -> None:
    """As in backwards that are divided: inputs first, then weights."""
    head, hidden, labels = parts()
    stock_loss(head(hidden), labels, "sum").mul(2).backward()
    with_late_logits(head)
    with only_loss_wanted():
        loss = stock_loss(head(hidden), labels, "sum").mul(2)
    (first,) = torch.autograd.grad(loss, [hidden], retain_graph=True)
    second = torch.autograd.grad(loss, [head.weight, head.bias])
    for expected, found in zip((hidden.grad, head.weight.grad, head.bias.grad), (first, *second), strict=True):
        torch.testing.assert_close(found, expected)
