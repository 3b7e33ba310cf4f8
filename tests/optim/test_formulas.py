"""Every compensation against its formula, on numbers that are computed by hand or by a loop of the test's own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import Case, Run, causal_loss, count_targets, differences

from hf_ouroboros.optim import StageUpdate, choose, compensated_step, predictions
from hf_ouroboros.optim.muon import MuonAdamW
from hf_ouroboros.optim.orthogonal import orthogonalised

LATE = StageUpdate(2.0, 0)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: torch.Tensor, *expected: float) -> None:
    # Rounding of double precision.
    torch.testing.assert_close(found.detach(), vector(*expected), rtol=1e-12, atol=1e-15)


def sgd(momentum: float = 0.0) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weights = torch.nn.Parameter(vector(1.0, -2.0))
    return weights, torch.optim.SGD([weights], lr=0.1, momentum=momentum)


def predicted(
    weights: torch.nn.Parameter, optimizer: torch.optim.Optimizer, name: str, update: StageUpdate, options: str = ""
) -> torch.Tensor | None:
    found = predictions(optimizer, optimizer.param_groups, {id(weights)}, choose(name, options).compensations, update)
    return found.get(id(weights))


@pytest.mark.parametrize(
    ("update", "factor"),
    [
        (StageUpdate(4.0, 0), 1 / 4),
        (StageUpdate(4.0, 50), 1 / 2),  # half of the way: 4^-0.5
        (StageUpdate(4.0, 100), 1.0),
        (StageUpdate(4.0, 1000), 1.0),
        (StageUpdate(0.5, 0), 1.0),  # less than one update late
        (StageUpdate(0.0, 0), 1.0),
    ],
)
def test_lr_rescale(update: StageUpdate, factor: float) -> None:
    weights, optimizer = sgd()
    compensated_step(optimizer, [(weights, vector(1.0, 2.0))], choose("lr_rescale", "anneal=100").compensations, update)
    close(weights, 1 - 0.1 * factor, -2 - 0.2 * factor)
    assert optimizer.param_groups[0]["lr"] == 0.1 and weights.grad is None


def test_lr_rescale_for_ever_and_of_what_adamw_steps() -> None:
    weights, optimizer = sgd()
    late = StageUpdate(4.0, 10_000)
    compensated_step(optimizer, [(weights, vector(1.0, 2.0))], choose("lr_rescale", "anneal=0").compensations, late)
    close(weights, 1 - 0.1 / 4, -2 - 0.2 / 4)
    compensations = choose("weight_prediction+lr_rescale", "anneal=0,rescaled=adamw").compensations
    moved = {}
    for name, given in (("plain", compensations[:1]), ("rescaled", compensations)):
        matrix, bias = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.ones(2))
        optimizer = MuonAdamW([matrix, bias], [matrix], lr=0.1)
        compensated_step(optimizer, [(matrix, torch.eye(2)), (bias, torch.ones(2))], given, late)
        ahead = predictions(optimizer, optimizer.param_groups, {id(matrix), id(bias)}, given, late)
        moved[name] = [
            t for p, start in ((matrix, torch.eye(2)), (bias, torch.ones(2))) for t in (p - start, ahead[id(p)] - p)
        ]
    assert all(map(torch.equal, moved["rescaled"][:2], moved["plain"][:2]))
    # Rounding of float32 beside a weight of 1.
    torch.testing.assert_close(moved["rescaled"][2:], [step / 4 for step in moved["plain"][2:]], rtol=0, atol=2e-7)
    assert moved["plain"][2].abs().min() > 0.09


def test_weight_prediction_with_sgd() -> None:
    weights, optimizer = sgd(momentum=0.5)
    for _ in range(2):
        compensated_step(optimizer, [(weights, vector(1.0, 2.0))], (), LATE)
    # m = 1.5 g; w = 1 - 0.1 - 0.15
    close(weights, 0.75, -2.5)
    close(predicted(weights, optimizer, "weight_prediction", LATE), 0.75 - 2 * 0.15, -2.5 - 2 * 0.3)
    close(predicted(weights, optimizer, "weight_prediction", StageUpdate(0.5, 9)), 0.75 - 0.075, -2.5 - 0.15)
    close(predicted(weights, optimizer, "weight_prediction", LATE, "horizon=0.5"), 0.75 - 0.15, -2.5 - 0.3)
    close(weights, 0.75, -2.5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_weight_prediction_with_adam(kind: type[torch.optim.Optimizer]) -> None:
    weights = torch.nn.Parameter(vector(1.0, -2.0))
    decay = 0.3 if kind is torch.optim.AdamW else 0.0
    optimizer = kind([weights], lr=0.1, betas=(0.5, 0.75), eps=1.0, weight_decay=decay)
    for gradient in (vector(1.0, 2.0), vector(3.0, 2.0)):
        compensated_step(optimizer, [(weights, gradient)], (), LATE)
    # m = 0.5 (0.5 g1) + 0.5 g2 = [1.75, 1.5], bias 0.75; v = 0.75 (0.25 g1^2) + 0.25 g2^2 = [2.4375, 1.75], bias 0.4375
    now = weights.detach().clone()
    direction = vector(1.75, 1.5) / 0.75 / ((vector(2.4375, 1.75) / 0.4375).sqrt() + 1.0)
    expected = now - 0.1 * 2 * (direction + decay * now)
    close(predicted(weights, optimizer, "weight_prediction", LATE), *expected.tolist())
    half = predicted(weights, optimizer, "weight_prediction+lr_rescale", StageUpdate(4.0, 500))
    close(half, *(now - 0.1 * 4 * 0.5 * (direction + decay * now)).tolist())  # the coming steps are rescaled, too


def test_weight_prediction_is_adamws_own_step_when_gradients_stay_the_same() -> None:
    weights = torch.nn.Parameter(vector(1.0, -2.0))
    optimizer = torch.optim.AdamW([weights], lr=0.1)
    for _ in range(2):
        ahead = predicted(weights, optimizer, "weight_prediction", StageUpdate(1.0, 0))
        compensated_step(optimizer, [(weights, vector(1.0, 2.0))], (), LATE)
    torch.testing.assert_close(ahead, weights.detach(), rtol=1e-12, atol=1e-15)  # rounding


def measured(weights: torch.nn.Parameter, **options: Any) -> MuonAdamW:
    return MuonAdamW([weights], [weights], lr=0.1, adjust_lr_fn="measure_rms_adamw", **options)


def test_weight_prediction_with_measured_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn((4, 3), generator=generator))
    optimizer = measured(weights, weight_decay=0.2)
    for _ in range(3):
        compensated_step(optimizer, [(weights, torch.randn((4, 3), generator=generator))], (), LATE)
    state, group = optimizer.state[weights], optimizer.param_groups[0]
    rate = 3 * 0.1 * 2 * float(state["adamw_rms"])  # sqrt(4)
    expected = weights.detach() * (1 - 3 * 0.1 * 0.2) - rate * orthogonalised(state["momentum_buffer"], group)
    assert 0.05 < float(state["adamw_rms"]) < 1.0
    ahead = predicted(weights, optimizer, "weight_prediction", StageUpdate(3.0, 0))
    torch.testing.assert_close(ahead, expected)  # rounding


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)])
def test_weight_prediction_with_muon(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = MuonAdamW([weights], [weights], lr=0.1, weight_decay=0.2)
    gradient = torch.randn(shape, generator=generator)
    compensated_step(optimizer, [(weights, gradient)], (), LATE)
    now = weights.detach().clone()
    ahead = predicted(weights, optimizer, "weight_prediction", StageUpdate(3.0, 0))
    assert torch.equal(weights, now)
    # Muon's step with a gradient that leaves its momentum (1 - 0.95) g as it is.
    compensated_step(optimizer, [(weights, 0.05 * gradient)], (), LATE)
    # One bfloat16 rounding may fall differently, since 0.05 g is not to the last bit the momentum.
    torch.testing.assert_close(ahead - now, 3 * (weights.detach() - now), rtol=2e-2, atol=1e-3)
    assert float((ahead - now).norm()) > 0.1


def test_muon_measures_the_rms_of_adamws_step() -> None:
    weights = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = measured(weights, momentum=0.5, betas=(0.8, 0.75))
    for gradient in ([[2.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [0.0, 1.0]]):
        before = weights.detach().clone()
        compensated_step(optimizer, [(weights, torch.tensor(gradient))], (), LATE)
    # mean(G^2) = 2, 0.5: v = 0.75 (0.25 * 2) + 0.25 * 0.5 = 0.5, bias 0.4375
    # m = 0.5 (0.5 g1) + 0.5 g2, ahead = 0.5 g2 + 0.5 m = [0.25 * 0.5, 0.75] * [g1, g2] = 0.25 - 0.75, 0.25 + 0.75
    # its mean square is (0.25 + 1) / 4 = 0.3125, the sum of its weights 0.875
    # noise: of ahead sqrt(0.75^2 + 0.25^2 * 0.5 / 1.5), of AdamW's momentum sqrt(0.2 / 1.8)
    noise = math.sqrt(0.2 / 1.8) / math.sqrt(0.5625 + 0.0625 / 3)
    rms = math.sqrt(0.3125) / 0.875 / math.sqrt(0.5 / 0.4375) * noise
    direction = orthogonalised(torch.tensor([[-0.5, 0.0], [0.0, 1.0]]), optimizer.param_groups[0])
    assert 0.2 < rms < 0.3
    torch.testing.assert_close(weights.detach(), before - 0.1 * math.sqrt(2) * rms * direction)


def test_muon_measures_one_where_gradients_agree_and_adamws_noise_where_they_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    alike, noise, adamws = (torch.nn.Parameter(torch.zeros(32, 48)) for _ in range(3))
    muon = measured(alike), measured(noise)
    adamw = torch.optim.AdamW([adamws], lr=0.1, weight_decay=0.0)
    for _ in range(400):
        gradient = torch.randn(32, 48, generator=generator)
        before = adamws.detach().clone()
        for optimizer, weights, given in (
            (muon[0], alike, torch.ones(32, 48)),
            (muon[1], noise, gradient),
            (adamw, adamws, gradient),
        ):
            compensated_step(optimizer, [(weights, given)], (), LATE)
    step = float((adamws.detach() - before).square().mean().sqrt()) / 0.1
    assert float(muon[0].state[alike]["adamw_rms"]) == 1.0
    # Two samples of noise of 1536 numbers, whose size has an error of 2 %.
    assert abs(float(muon[1].state[noise]["adamw_rms"]) / step - 1) < 0.1
    assert abs(step / math.sqrt(0.1 / 1.9) - 1) < 0.1


def test_muon_stands_still_without_gradients_to_measure() -> None:
    weights = torch.nn.Parameter(torch.ones(2, 3))
    compensated_step(measured(weights), [(weights, torch.zeros(2, 3))], (), LATE)
    assert torch.equal(weights.detach(), torch.ones(2, 3))


def test_weight_prediction_of_steps_like_the_last() -> None:
    weights, optimizer = sgd()
    step = choose("weight_prediction", "prediction=step").compensations
    assert [step[0].keeps_weights(update) for update in (StageUpdate(0.0, 0), LATE)] == [False, True]
    compensated_step(optimizer, [(weights, vector(5.0, 5.0))], step, StageUpdate(0.0, 0))
    assert predicted(weights, optimizer, "weight_prediction", LATE, "prediction=step") is None
    compensated_step(optimizer, [(weights, vector(1.0, -2.0))], step, LATE)
    # 1 - 0.5 - 0.1, -2 - 0.5 + 0.2
    close(weights, 0.4, -2.3)
    close(predicted(weights, optimizer, "weight_prediction", LATE, "prediction=step"), 0.4 - 0.2, -2.3 + 0.4)
    half = predicted(weights, optimizer, "weight_prediction", StageUpdate(0.25, 9), "prediction=step,horizon=2")
    close(half, 0.4 - 0.05, -2.3 + 0.1)
    close(weights, 0.4, -2.3)


@pytest.mark.parametrize("update", [StageUpdate(0.0, 0), LATE])
def test_no_prediction_without_a_past_or_a_delay(update: StageUpdate) -> None:
    weights, optimizer = sgd(momentum=0.5)
    if update.delay == 0:
        compensated_step(optimizer, [(weights, vector(1.0, 2.0))], (), LATE)
    assert predicted(weights, optimizer, "weight_prediction", update) is None


def test_gap_aware() -> None:
    weights, optimizer = sgd()
    compensations = choose("gap_aware", "gap_decay=0.75,gap_eps=0.5").compensations
    late = StageUpdate(2.0, 0)
    compensated_step(optimizer, [(weights, vector(10.0, 0.0))], compensations, late)
    close(weights, 0.0, -2.0)  # nothing is known of a past: the plain step; E = [1, 0]
    compensated_step(optimizer, [(weights, vector(30.0, 10.0))], compensations, late)
    # The oldest known weights are the first ones: gap [1, 0]; penalties 1 + 1/(1 + 0.5) and 1.
    first = 30 / (1 + 1 / 1.5)
    close(weights, -0.1 * first, -3.0)
    # E = 0.75 [1, 0] + 0.25 [1.8^2, 1]; two updates back are again the first weights.
    square = 0.75 * vector(1, 0) + 0.25 * vector(1.8**2, 1)
    gap = vector(1 + 1.8, 1.0)
    before = weights.detach().clone()
    compensated_step(optimizer, [(weights, vector(1.0, 1.0))], compensations, late)
    close(weights, *(before - 0.1 / (1 + gap / (square.sqrt() + 0.5))).tolist())
    assert optimizer.state[weights]["gap_history"].shape == (2, 2)


def test_gap_aware_with_a_part_of_an_update_of_delay() -> None:
    weights, optimizer = sgd()
    compensations = choose("gap_aware", "gap_eps=1").compensations
    for _ in range(2):
        compensated_step(optimizer, [(weights, vector(10.0, 0.0))], compensations, StageUpdate(0.5, 0))
    close(weights, 0 - 1 / (1 + 0.5 * 1 / (1 + 1)), -2.0)


def test_error_feedback() -> None:
    weights, optimizer = sgd()
    compensations = choose("error_feedback").compensations
    received = [vector(10.0 * i, 1.0) for i in range(1, 6)]
    total = vector(0.0, 0.0)
    for count, gradient in enumerate(received, 1):
        compensated_step(optimizer, [(weights, gradient)], compensations, LATE)
        total += gradient if count <= 2 else 2 * gradient - received[count - 3]
        close(weights, *(vector(1.0, -2.0) - 0.1 * total).tolist())
    # Once errors are put right, the sum has the newest two gradients twice, but for the two that began.
    close(total, *(sum(received) + received[3] + received[4] - received[0] - received[1]).tolist())
    assert optimizer.state[weights]["feedback_history"].shape == (2, 2)


def test_error_feedback_with_a_part_of_an_update_of_delay() -> None:
    weights, optimizer = sgd()
    compensations = choose("error_feedback", "feedback=0.5").compensations
    for value in (1.0, 3.0):
        compensated_step(optimizer, [(weights, vector(value, 0.0))], compensations, StageUpdate(0.25, 0))
    close(weights, 1 - 0.1 * (1 + 3 + 0.5 * 0.25 * 2), -2.0)


@pytest.mark.parametrize("name", ["gap_aware", "error_feedback"])
def test_synchronous_updates_are_plain_and_leave_no_history(name: str) -> None:
    weights, optimizer = sgd()
    plain, other = sgd()
    for update in (StageUpdate(0.0, 0), StageUpdate(0.0, 0)):
        compensated_step(optimizer, [(weights, vector(1.0, 2.0))], choose(name).compensations, update)
        compensated_step(other, [(plain, vector(1.0, 2.0))], (), update)
    assert torch.equal(weights, plain)
    assert not any("history" in key for key in optimizer.state[weights])


def test_nesterov_is_nadam_by_its_formula() -> None:
    """Dozat's update with gamma[u] = beta1 (1 - 0.96^(u psi) / 2), decay decoupled."""
    from transformers import TrainingArguments

    choice = choose("nesterov", "momentum_decay=0.1").optimizer
    args = TrainingArguments(output_dir="unused", use_cpu=True, learning_rate=0.1, adam_beta2=0.75, adam_epsilon=0.5)
    kind, options = choice.optimizer(args, [])
    weights = torch.nn.Parameter(vector(1.0, -2.0))
    optimizer = kind([weights], weight_decay=0.2, **options)
    w, m, v, product = vector(1.0, -2.0), vector(0, 0), vector(0, 0), 1.0
    for t, g in enumerate((vector(1.0, 2.0), vector(3.0, -2.0), vector(1.0, 0.5)), 1):
        compensated_step(optimizer, [(weights, g)], (), LATE)
        gamma, following = (0.99 * (1 - 0.5 * 0.96 ** (0.1 * u)) for u in (t, t + 1))
        product *= gamma
        m, v = 0.99 * m + 0.01 * g, 0.75 * v + 0.25 * g**2
        look = following * m / (1 - product * following) + (1 - gamma) * g / (1 - product)
        w = w - 0.1 * 0.2 * w - 0.1 * look / ((v / (1 - 0.75**t)).sqrt() + 0.5)
        # torch keeps the product of the gammas in float32.
        torch.testing.assert_close(weights.detach(), w, rtol=1e-7, atol=0)


# ---- a whole run with predicted weights, by a loop of its own ----


@pytest.mark.parametrize(("tied", "ticks"), [(True, 1), (False, 1), (True, 2), (True, 3)])
def test_reference_with_weight_prediction(tied: bool, ticks: int) -> None:
    """SGD with momentum: p = w - lr (d_k/M) m, gradients at p, applied d_k ticks later to w."""
    torch.set_num_threads(1)
    case = Case(3, updates=(ticks,) * 6, tied=tied, optimizer="sgd", compensation="weight_prediction")
    run = Run(case, "reference")
    model = copy.deepcopy(run.model)
    delays = {n: 2 - k for k in range(3) for n in run.engine.partition.owned(k)}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    momentum: dict[str, torch.Tensor] = {}
    pending: dict[int, dict[str, torch.Tensor]] = {}
    losses = []
    for u in range(6):
        rate = 0.05 / (1 + 0.1 * u)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                ahead = delays[name] / ticks * rate
                parameter.copy_(weights[name] - ahead * momentum[name] if name in momentum else weights[name])
        batches = case.batches(u)
        for i, batch in enumerate(batches):
            model.zero_grad()
            loss = causal_loss(model(batch["input_ids"]).logits, batch, count_targets(batches))
            loss.backward()
            losses.append(float(loss.detach()))
            pending[u * ticks + i] = {n: p.grad.clone() for n, p in model.named_parameters()}
        for name, delay in delays.items():
            window = [pending[s][name] for t in range(ticks) if (s := u * ticks + t - delay) >= 0]
            if window:
                g = sum(window) + (0.1 * weights[name] if weights[name].dim() > 1 else 0)
                momentum[name] = 0.9 * momentum[name] + g if name in momentum else g
                weights[name] = weights[name] - rate * (g + 0.9 * momentum[name])
    run.train()
    # The loop is float32, too, but adds up in another order.
    assert run.losses == pytest.approx(losses, rel=1e-5)
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-4, atol=1e-5)
    plain = Run(Case(3, updates=(ticks,) * 6, tied=tied, optimizer="sgd"), "reference").train()
    assert differences(plain.model.state_dict(), run.model.state_dict()), "predictions change a run"


def test_real_weights_are_back_after_a_tick_that_fails() -> None:
    run = Run(Case(3, updates=(1,) * 5, optimizer="sgd", compensation="weight_prediction"), "reference")
    for u in range(4):
        run.update(u)
    before: dict[str, Any] = {n: (p.data_ptr(), p.detach().clone()) for n, p in run.model.named_parameters()}
    with pytest.raises(KeyError):
        run.engine.submit({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, 1)
    for name, parameter in run.model.named_parameters():
        assert (parameter.data_ptr(), torch.equal(parameter, before[name][1])) == (before[name][0], True)
