"""The costs by which the engine interleaves the stages of a device."""

from __future__ import annotations

from hf_ouroboros.schedules.interleave import engine_costs


def test_relative_to_the_mean() -> None:
    assert engine_costs([1.0, 2.0, 3.0], recompute=False) == ([0.5, 1.0, 1.5], [1.0, 2.0, 3.0])


def test_the_last_stage_never_replays_its_forward() -> None:
    assert engine_costs([1.0, 2.0, 3.0], recompute=True) == ([0.5, 1.0, 1.5], [1.5, 3.0, 3.0])


def test_stages_without_cost_take_a_moment() -> None:
    assert engine_costs([0.0, 0.0], recompute=False) == ([1e-3, 1e-3], [2e-3, 2e-3])
    assert engine_costs([2.0, 0.0], recompute=False)[0] == [2.0, 1e-3]
