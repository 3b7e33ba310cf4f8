"""From a plan to what the simulator is told."""

from __future__ import annotations

from helpers import tiny_gpt2

from hf_ouroboros.commands.prediction import stage_costs
from hf_ouroboros.planning.hardware import PRESETS
from hf_ouroboros.planning.memory_model import MemoryOptions
from hf_ouroboros.planning.planner import estimated, plan_split
from hf_ouroboros.planning.unit_facts import model_facts


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
