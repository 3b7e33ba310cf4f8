"""The nearest orthogonal matrix, roughly, by Newton-Schulz iteration: most of what a step of Muon costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

PRECISION = {"cpu": torch.float32}
"""Of the computation, by type of device; bfloat16 on all others."""

WIDE = 1.5
"""Columns per row from which on `_iterated_through_gram` has fewer multiply-adds, however many iterations there are."""

Coefficients = tuple[float, float, float]


def orthogonalised(matrix: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """A matrix with the same singular vectors, and singular values between 0.7 and 1.2.

    Every matrix is computed by itself, and so in the same way whichever others its stage has. (Batches of matrices of one shape
    gained at most a tenth on a CPU, whose cores are busy with a single product of width 96.)

    Args:
        matrix: [A, B].
        group: Muon's `ns_coefficients`, `ns_steps` and `eps`.

    Returns:
        [A, B], in the precision of the computation.
    """
    wide = matrix.to(PRECISION.get(matrix.device.type, torch.bfloat16))
    if transposed := matrix.size(0) > matrix.size(1):
        wide = wide.T
    wide = wide / wide.norm().clamp(min=group["eps"])
    through_gram = wide.dtype == torch.float32 and wide.size(1) > WIDE * wide.size(0)
    iterate = _iterated_through_gram if through_gram else _iterated
    wide = iterate(wide, group["ns_coefficients"], group["ns_steps"])
    return wide.T if transposed else wide


def _iterated(wide: torch.Tensor, coefficients: Coefficients, steps: int) -> torch.Tensor:
    """Iterations X <- (a I + b G + c G^2) X with G = X X', as torch's Muon does them; A^3 + 2 A^2 B multiply-adds each."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide


def _iterated_through_gram(wide: torch.Tensor, coefficients: Coefficients, steps: int) -> torch.Tensor:
    """The same of a matrix [A, B] with many more columns than rows, in products of matrices [A, A] but for the first and the last.

    Every X is a polynomial P of the first G times the first X, and polynomials of one matrix commute:

        Q = a I + b G + c G^2,  P <- Q P,  G <- Q G Q        4 A^3 multiply-adds each

    G has the squares of the singular values, so that small ones are known less exactly: of what comes out, with values near 1, an
    error of up to 1e-3 is theirs (1e-5 by `_iterated`; bfloat16 has 1e-2). In lower precision than float32 it would break down.
    """
    a, b, c = coefficients
    gram = wide @ wide.T
    product: torch.Tensor | None = None
    for step in range(steps):
        added = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # Q without a I
        if product is None:
            product = added.clone()
            product.diagonal().add_(a)
        else:
            product = torch.addmm(product, added, product, beta=a)
        if step + 1 < steps:
            gram = torch.addmm(gram, added, gram, beta=a)
            gram = torch.addmm(gram, gram, added, beta=a)
    return wide if product is None else product @ wide
