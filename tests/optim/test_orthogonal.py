"""Newton-Schulz iterations: what comes out, what it costs, and that long matrices are no other case than short ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_ouroboros.optim import orthogonal
from hf_ouroboros.optim.muon import DeviceMuon
from hf_ouroboros.optim.orthogonal import orthogonalised

GROUP = DeviceMuon([torch.nn.Parameter(torch.zeros(2, 2))]).param_groups[0]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (4, 16), (16, 4), (5, 5)])
def test_in_float32_on_cpus(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    found = orthogonalised(matrix, GROUP)
    assert found.dtype == torch.float32 and found.shape == shape
    # Newton-Schulz keeps the singular vectors and brings the values near 1.
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ found @ right.T
    torch.testing.assert_close(turned, turned.diag().diag(), rtol=0, atol=1e-4)  # rounding, five iterations
    assert values[0] > 1.5 * values[-1] and 0.65 < turned.diag().min() and turned.diag().max() < 1.25


def conditioned(rows: int, columns: int, smallest: float) -> torch.Tensor:
    """Singular values from 1 to the smallest, evenly on a logarithmic scale."""
    left, _, right = torch.linalg.svd(random(rows, columns), full_matrices=False)
    return left @ torch.logspace(0, float(torch.tensor(smallest).log10()), rows).diag() @ right


WIDE = {
    "random": random(32, 128),
    "tall": random(128, 32),
    "just wide": random(32, 49),
    "small singular values": conditioned(32, 128, 1e-3),
    "smaller ones": conditioned(32, 96, 1e-8),
    "low rank": random(32, 2) @ random(2, 128),
    "tiny": random(32, 128) * 1e-20,
    "zero": torch.zeros(32, 128),
    "one row": random(1, 8),
}


@pytest.mark.parametrize("name", WIDE)
def test_through_the_gram_matrix(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same polynomial as torch's iterations, in double precision."""
    found = orthogonalised(WIDE[name], GROUP)
    again = orthogonalised(WIDE[name], GROUP)
    monkeypatch.setattr(orthogonal, "PRECISION", {"cpu": torch.float64})  # which only the other way has
    expected = orthogonalised(WIDE[name], GROUP)
    assert torch.equal(found, again) and found.isfinite().all()
    # Of float32's squares of singular values, see `_iterated_through_gram`.
    assert float(torch.linalg.matrix_norm(found.double() - expected, 2)) < 1e-3


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_any_number_of_iterations(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    group: dict[str, Any] = {**GROUP, "ns_steps": steps}
    found = orthogonalised(WIDE["random"], group)
    monkeypatch.setattr(orthogonal, "WIDE", float("inf"))
    torch.testing.assert_close(found, orthogonalised(WIDE["random"], group), rtol=0, atol=1e-5)  # rounding


def products(shape: tuple[int, int]) -> int:
    """Multiply-adds of a matrix."""
    matrix = random(*shape)
    with FlopCounterMode(display=False) as counter:
        orthogonalised(matrix, GROUP)
    return counter.get_total_flops() // 2


def test_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way with fewer of them is taken, for every shape."""
    assert products((16, 64)) == products((64, 16)) == 17 * 16**3 + 2 * 16**2 * 64
    assert products((16, 16)) == 5 * (16**3 + 2 * 16**2 * 16)
    shapes = [(16, columns) for columns in (16, 20, 24, 25, 28, 32, 48)]
    chosen = [products(shape) for shape in shapes]
    ways = []
    for least in (0.0, float("inf")):
        monkeypatch.setattr(orthogonal, "WIDE", least)
        ways.append([products(shape) for shape in shapes])
    assert chosen == [min(both) for both in zip(*ways, strict=True)]
