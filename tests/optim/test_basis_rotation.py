"""RotatedAdam: its formula, what it is in special cases, and its state."""

from __future__ import annotations

import torch
from helpers import clone, differences, make_optimizer, tiny_gpt2

from hf_ouroboros.optim import StageUpdate, choose, predictions
from hf_ouroboros.optim.basis_rotation import RotatedAdam, RotatedAdamW


def double(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # Bases are computed in float32.
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)


def test_is_adam_where_the_basis_is_that_of_the_coordinates() -> None:
    """Diagonal gradients: covariances are diagonal, eigenvectors are coordinates."""
    assert_adam_in(torch.eye(2, dtype=torch.float64), refresh=1)


def test_is_adam_in_the_basis_of_the_gradients() -> None:
    """Gradients U diag U' for one U: U' W U moves as under AdamW."""
    assert_adam_in(double([0.6, -0.8], [0.8, 0.6]), refresh=2)


def assert_adam_in(turn: torch.Tensor, refresh: int) -> None:
    weights = torch.nn.Parameter(double([1.0, 2.0], [3.0, 4.0]))
    plain = torch.nn.Parameter(turn.T @ weights.detach() @ turn)
    rotated = RotatedAdam([weights], lr=0.1, weight_decay=0.2, betas=(0.5, 0.75), eps=0.1, refresh=refresh)
    adamw = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.2, betas=(0.5, 0.75), eps=0.1)
    for count, diagonal in enumerate(([2.0, 1.0], [1.0, 3.0], [2.0, 4.0], [1.0, -5.0], [0.5, 2.0])):
        plain.grad = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        weights.grad = turn @ plain.grad @ turn.T
        rotated.step()
        if count > 0:  # the first gradient gives the basis
            adamw.step()
    close(turn.T @ weights.detach() @ turn, plain.detach())


def test_formula() -> None:
    """A wide matrix, written out."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    weights = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer = RotatedAdam([weights], lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), covariance_decay=0.8, refresh=2)
    for gradient in given:
        weights.grad = gradient.clone()
        optimizer.step()
    left, right = given[0] @ given[0].T, given[0].T @ given[0]
    turns = [torch.linalg.eigh(left.float())[1].flip(1).double(), torch.linalg.eigh(right.float())[1].flip(1).double()]
    expected = torch.ones(2, 3, dtype=torch.float64)
    momentum, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for count, gradient in enumerate(given[1:], 1):
        left, right = 0.8 * left + 0.2 * gradient @ gradient.T, 0.8 * right + 0.2 * gradient.T @ gradient
        if count == 2:
            turns = [torch.linalg.qr(left @ turns[0])[0], torch.linalg.qr(right @ turns[1])[0]]
        momentum = 0.9 * momentum + 0.1 * gradient
        square = 0.99 * square + 0.01 * (turns[0].T @ gradient @ turns[1]) ** 2
        turned = turns[0].T @ momentum @ turns[1] / (1 - 0.9**count)
        step = turns[0] @ (turned / ((square / (1 - 0.99**count)).sqrt() + 1e-8)) @ turns[1].T
        expected = expected - 0.1 * (step + 0.5 * expected)
    close(weights, expected)


def test_prediction_is_its_own_step_when_gradients_stay_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    gradient = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    optimizer = RotatedAdamW([weights], [weights], lr=0.1, weight_decay=0.3)
    for count in range(3):
        weights.grad = (gradient.T if count == 0 else gradient).clone()
        optimizer.step()
    update = StageUpdate(1.0, 0)
    compensations = choose("weight_prediction").compensations
    ahead = predictions(optimizer, optimizer.param_groups, {id(weights)}, compensations, update)[id(weights)]
    weights.grad = gradient.clone()
    optimizer.step()
    close(ahead, weights.detach())


def test_state_dict_round_trip() -> None:
    model, other = tiny_gpt2(), tiny_gpt2()
    optimizer, loaded = make_optimizer("rotated", model), make_optimizer("rotated", other)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        for twin in (model, other) if step == 3 else (model,):
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        optimizer.step()
        if step == 2:
            other.load_state_dict(model.state_dict())
            loaded.load_state_dict(clone(optimizer.state_dict()))
    loaded.step()
    assert differences(model.state_dict(), other.state_dict()) == []
    assert differences(optimizer.state_dict(), loaded.state_dict()) == []
