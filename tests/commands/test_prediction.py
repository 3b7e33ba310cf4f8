"""From a plan to what the simulator is told."""

from __future__ import annotations

import pytest
from helpers import tiny_gpt2

from hf_ouroboros.commands.prediction import predict, sharded_units, stage_costs
from hf_ouroboros.planning.hardware import PRESETS
from hf_ouroboros.planning.memory_model import MemoryOptions
from hf_ouroboros.planning.planner import estimated, plan_split
from hf_ouroboros.planning.unit_facts import model_facts
from hf_ouroboros.simulate.links import Links


def test_recompute_keeps_inputs_only() -> None:
    """Nothing but token ids on the first stage, hidden states [2, 8, width] in between, everything on the last."""
    config = tiny_gpt2().config
    facts = model_facts(config, 2, 8)
    devices = [estimated(facts, PRESETS["t4"])] * 3
    hidden = 2 * 8 * config.n_embd * 4
    for recompute in (False, True):
        plan = plan_split(facts, devices, MemoryOptions("pipelined", 4, recompute))
        whole = [sum(unit.activation_bytes for unit in stage.units) for stage in plan.stages]
        kept = [cost.activation_bytes for cost in stage_costs(plan)]
        assert kept == ([0.0, hidden, hidden, whole[3]] if recompute else whole)
        assert min(whole) > hidden


def test_only_late_backwards_are_replayed_with_weights_of_now() -> None:
    """Beside pipelined, a synchronous schedule of the same plan does not pay for replays that it has no use for."""
    facts = model_facts(tiny_gpt2().config, 2, 8)
    devices = [estimated(facts, PRESETS["t4"])] * 3
    then, new = (plan_split(facts, devices, MemoryOptions("pipelined", 4, weights=w)) for w in ("then", "now"))
    assert [stage.memory.versions for stage in new.stages[1:]] == [0.0] * 3
    for stage, cost, late in zip(new.stages, stage_costs(new, "1f1b"), stage_costs(new, "pipelined"), strict=True):
        again = 0.0 if stage is new.stages[-1] else stage.forward
        assert cost.backward == pytest.approx(late.backward - again)
    if [s.layers for s in then.stages] == [s.layers for s in new.stages]:
        assert stage_costs(new, "1f1b") == pytest.approx(stage_costs(then, "1f1b"))
    found = {w: predict(plan, "pipelined", Links()).seconds_per_tick for w, plan in (("then", then), ("now", new))}
    assert found["then"] < found["now"] < 1.6 * found["then"]
    assert predict(new, "gpipe", Links()).seconds_per_tick == pytest.approx(
        predict(then, "gpipe", Links()).seconds_per_tick
    )


def test_fsdp_shares_out_every_layer() -> None:
    """As fast as so many devices over links without time; with recompute a third slower, keeping less."""
    facts = model_facts(tiny_gpt2().config, 2, 8)
    devices = [estimated(facts, PRESETS["t4"])] * 2
    plain, again = (plan_split(facts, devices, MemoryOptions("pipelined", 4, recompute)) for recompute in (False, True))
    units = sharded_units(plain)
    assert [unit.is_layer for unit in units] == [unit.kind == "layer" for unit in facts.units]
    assert sum(unit.parameter_bytes for unit in units) == sum(unit.parameter_bytes for unit in facts.units)
    fast, less = (predict(plan, "fsdp", Links()) for plan in (plain, again))
    assert fast.speedup == pytest.approx(2)
    assert 1.1 < less.seconds_per_tick / fast.seconds_per_tick < 1.4
    assert max(less.bytes_in_flight) < max(fast.bytes_in_flight)
    assert predict(plain, "fsdp", Links(bandwidth=1e9, latency=1e-3)).seconds_per_tick > fast.seconds_per_tick
    with pytest.raises(ValueError, match="use a multiple of 3"):
        predict(plan_split(facts, devices[:1] * 3, MemoryOptions("pipelined", 4)), "fsdp", Links())


def test_stages_of_peers_are_balanced() -> None:
    """Also where a device has the first and the last one, which are no smaller for that."""
    facts = model_facts(tiny_gpt2(layers=12).config, 2, 8)
    devices = [estimated(facts, PRESETS["t4"])] * 2
    plan = plan_split(facts, devices, MemoryOptions("pipelined", 8))
    for schedule in ("interleaved", "zb-v", "dualpipev"):
        assert predict(plan, schedule, Links()).speedup > 1.7
