"""zero_bubble: a backward in two parts, to the last bit what one backward gives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case, Run, assert_same_run, differences
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ouroboros.engine.divided import DividedBackward, Junction
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.errors import UnsupportedModelError

CASES = {
    "tied": Case(3, updates=(2, 4, 1, 3), dropout=0.1, padded=True, clip=0.5),
    "untied": Case(3, updates=(4, 4, 2), tied=False, dropout=0.1),
    "two stages": Case(2, updates=(3, 1, 3), tied=False, clip=0.3, scope="global"),
    "four stages, few ticks": Case(4, updates=(2, 2, 1), dropout=0.1),
    "four stages, many ticks": Case(4, updates=(9, 4), tied=False),
    "several stages per device": Case(4, updates=(4, 3), tied=False, devices=2),
    "tied on two devices": Case(5, updates=(6, 2), devices=2, dropout=0.1),
    "one stage": Case(1, updates=(2, 2)),
    "recompute": Case(3, updates=(4, 2), dropout=0.1, recompute=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_1f1b(name: str) -> None:
    assert_same_run(Run(CASES[name], "1f1b").train(), Run(CASES[name], "zero_bubble").train())


def test_equals_the_reference_and_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    later: list[int] = []
    run = Junction.run
    monkeypatch.setattr(Junction, "run", lambda self: later.append(id(self.leaf)) or run(self))
    case = Case(3, updates=(2, 3), tied=False, padded=True)
    found = Run(case, "zero_bubble").train()
    assert_same_run(Run(case, "reference 1f1b").train(), found)
    partition = found.engine.partition
    matrices = [p for k in (1, 2) for p in partition.owned(k).values() if p.dim() == 2]
    assert len(later) == 5 * len(matrices)  # all of these stages, at every tick


@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_autocast(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where micro-batches share the weights' copies in lower precision."""
    made = EngineSettings.__init__

    def with_autocast(self: EngineSettings, **given: Any) -> None:
        made(self, autocast_dtype=torch.bfloat16, **given)

    monkeypatch.setattr(EngineSettings, "__init__", with_autocast)
    case = Case(3, updates=(3, 2), tied=False, dropout=0.1, recompute=recompute)
    assert_same_run(Run(case, "1f1b").train(), Run(case, "zero_bubble").train())


# ---- what scripts do to gradients ----


def scaled(parameter_name: str) -> Callable[[nn.Module], None]:
    """A hook that changes gradients of a parameter."""
    return lambda model: model.get_parameter(parameter_name).register_hook(lambda gradient: gradient * 0.5)


def frozen(*prefixes: str) -> Callable[[nn.Module], None]:
    """Nothing below these names is trained."""

    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(prefixes))

    return freeze


def summed(model: nn.Module) -> None:
    """A hook that looks at gradients as they are added up."""

    def bounded(parameter: nn.Parameter) -> None:
        parameter.grad.clamp_(-1e-3, 1e-3)

    model.get_parameter("transformer.h.3.mlp.c_fc.weight").register_post_accumulate_grad_hook(bounded)


PREPARED = {
    "a hook on a parameter": scaled("transformer.h.2.mlp.c_fc.weight"),
    "a hook on a tied matrix": scaled("transformer.wte.weight"),
    "a hook on sums": summed,
    "a frozen layer": frozen("transformer.h.2."),
    "frozen embeddings": frozen("transformer.wte.", "transformer.wpe."),
    "a frozen first stage": frozen("transformer.wte.", "transformer.wpe.", "transformer.h.0.", "transformer.h.1."),
    "only biases": lambda model: [p.requires_grad_(n.endswith("bias")) for n, p in model.named_parameters()],
}


@pytest.mark.parametrize("name", PREPARED)
def test_hooks_and_frozen_parameters(name: str) -> None:
    case = Case(3, updates=(4, 2), dropout=0.1, counts=(2, 2, 1), optimizer="sgd")
    found = Run(case, "zero_bubble", PREPARED[name]).train()
    assert_same_run(Run(case, "1f1b", PREPARED[name]).train(), found)


@pytest.mark.parametrize("where", ["module", "tensor"])
def test_hooks_in_the_backward_are_called_once(where: str) -> None:
    """They may do what counts: those backwards are not divided."""
    calls: dict[str, int] = {}

    def run(schedule: str) -> Run:
        calls[schedule] = 0

        def noted(gradient: torch.Tensor) -> torch.Tensor:
            calls[schedule] += 1
            return gradient * 0.5

        def prepare(model: nn.Module) -> None:
            layer = model.transformer.h[3]
            if where == "module":
                layer.register_full_backward_hook(lambda module, given, taken: (noted(given[0]), *given[1:]))
            else:
                layer.mlp.c_fc.register_forward_hook(lambda module, given, output: output.register_hook(noted) and None)

        return Run(Case(3, updates=(3, 2), tied=False, counts=(2, 2, 1)), schedule, prepare).train()

    assert_same_run(run("1f1b"), run("zero_bubble"))
    assert calls["1f1b"] == calls["zero_bubble"] == 5


def test_looking_changes_nothing() -> None:
    case = Case(3, updates=(3,) * 5, dropout=0.1)
    looks = {0: "synchronize", 2: "norm", 3: "settle", 4: "state"}
    assert_same_run(Run(case, "1f1b").train(looks), Run(case, "zero_bubble").train(looks))


def test_goes_on_from_a_checkpoint_of_1f1b() -> None:
    case = Case(3, updates=(3,) * 4, dropout=0.1)
    whole = Run(case, "1f1b").train()
    first = Run(case, "1f1b")
    for update in range(2):
        first.update(update)
    second = Run(case, "zero_bubble").resume(first.checkpoint()).train(updates=range(2, 4))
    first.engine.close()
    assert differences(whole.model.state_dict(), second.model.state_dict()) == []


# ---- the two parts ----


class Doubled(torch.autograd.Function):
    """A function in Python whose backward may not be called twice."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(value, weight)
        return 2 * value * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Doubled.calls += 1
        value, weight = ctx.saved_tensors
        return 2 * gradient * weight, (2 * gradient * value).sum((0, 1))


class Net(nn.Module):
    """Weights that join in many ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.LayerNorm(6)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.scale, self.doubled = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.direction, self.unused = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.plain, self.halved = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x + self.second(torch.tanh(self.first(self.norm(x))))
        x = x + torch.nn.functional.linear(torch.nn.functional.linear(x, self.down), self.up)
        x = x @ (self.direction / self.direction.norm()) @ self.plain
        x = torch.addmm(x.flatten(0, 1), x.flatten(0, 1), self.halved, alpha=0.5).view_as(x)
        x = Doubled.apply(x, self.doubled) * self.scale
        x = x + self.second(x)  # a second time
        return [x, x.sum() + self.scale.sum()]  # and past the input


def net_and_gradients(both: bool) -> tuple[Net, torch.Tensor, DividedBackward | None]:
    net = Net()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    outputs = net(x)
    gradients = [torch.ones_like(outputs[0]) / 7, None]
    if not both:
        torch.autograd.backward(outputs, gradients)
        return net, x, None
    divided = DividedBackward(outputs, [x], net.parameters())
    divided.run_first(torch.autograd.backward, gradients)
    return net, x, divided


def test_the_parts_are_the_whole() -> None:
    expected, x, _ = net_and_gradients(both=False)
    Doubled.calls = 0
    found, y, divided = net_and_gradients(both=True)
    later = {name for name, p in found.named_parameters() if p.grad is None and p is not found.unused}
    # The others are no matrices, join in two places, are computed from several tensors, or are multiplied in another way.
    assert later == {"first.weight", "down", "up", "plain"}
    assert torch.equal(x.grad, y.grad)
    divided.run_second()
    assert Doubled.calls == 1 and found.unused.grad is None
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert a.grad is None and b.grad is None or torch.equal(a.grad, b.grad), name


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_every_product_is_computed_once() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)))
    x = torch.randn(5, 4).requires_grad_()
    divided = DividedBackward([layers(x)], [x], layers.parameters())
    with Products() as first:
        divided.run_first(torch.autograd.backward, [torch.ones(5, 4)])
    with Products() as second:
        divided.run_second()
    assert (first.count, second.count) == (3, 3)


def test_lets_go_of_what_it_has_done() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(5, 4).requires_grad_()
    hidden = x * 2
    kept = weakref.ref(hidden)
    divided = DividedBackward([layer(hidden)], [x], layer.parameters())
    del hidden
    divided.run_first(torch.autograd.backward, [torch.ones(5, 4)])
    divided.run_second()
    gc.collect()
    assert kept() is None


def test_the_first_part_frees_the_graph() -> None:
    """But for what matrices were multiplied with."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    x, seen = torch.randn(5, 4).requires_grad_(), []
    for layer in layers[:2]:
        layer.register_forward_hook(lambda module, given, output: seen.append(weakref.ref(output)) and None)
    divided = DividedBackward([layers(x)], [x], layers.parameters())
    assert all(tensor() is not None for tensor in seen)
    storage = [tensor().untyped_storage().data_ptr() for tensor in seen]
    divided.run_first(torch.autograd.backward, [torch.ones(5, 4)])
    kept = {tensor.untyped_storage().data_ptr() for junction in divided.junctions for tensor in junction.kept}
    gc.collect()
    assert all(tensor() is None for tensor in seen) and storage[1] in kept and storage[0] not in kept


def test_what_is_handed_on_as_it_was_received() -> None:
    """As the encoder's output is, through the stages of a decoder; used there, or not."""
    layer, x, y = nn.Linear(4, 4), torch.randn(5, 4).requires_grad_(), torch.randn(5, 4).requires_grad_()
    z = torch.randn(5, 4).requires_grad_()
    divided = DividedBackward([layer(x * y), y, z], [x, y, z], layer.parameters())
    divided.run_first(torch.autograd.backward, [torch.ones(5, 4)] * 3)
    assert torch.equal(z.grad, torch.ones(5, 4))
    assert torch.equal(y.grad, torch.ones(5, 4) + x * layer.weight.sum(0))
    divided.run_second()
    assert torch.equal(layer.bias.grad, torch.full((4,), 5.0))


class WritesOver(torch.autograd.Function):
    """A function that breaks autograd's rule not to write into what it is given."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.mul_(2)


@pytest.mark.parametrize("what", ["gradient", "value"])
def test_what_is_written_over_is_refused(what: str) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(5, 4).requires_grad_()
    hidden = x * 2
    later = WritesOver.apply(x)  # its backward comes after the layer's
    divided = DividedBackward([layer(hidden) + later if what == "gradient" else layer(hidden)], [x], layer.parameters())
    divided.run_first(torch.autograd.backward, [torch.ones(5, 4)])
    if what == "value":
        with torch.no_grad():
            hidden.mul_(2)
    with pytest.raises(UnsupportedModelError, match="writes into the gradient that it is given.*use schedule='1f1b'"):
        divided.run_second()
