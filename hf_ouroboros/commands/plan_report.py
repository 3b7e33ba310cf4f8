"""What `plan` prints about a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..schedules import SCHEDULES
from ..simulate.peers import PEERS
from ..simulate.sharded import FSDP
from .tables import byte_unit, milliseconds, size, table

if TYPE_CHECKING:
    from ..planning.planner import SplitPlan
    from ..simulate.simulator import Simulation


def headline(plan: SplitPlan) -> str:
    """The model, and what is special about the run."""
    facts = plan.facts
    tied = "tied" if facts.tied else "untied"
    active = "" if facts.active_parameters == facts.parameters else f" ({facts.active_parameters:,} per token)"
    text = (
        f"{facts.name}: {facts.parameters:,} parameters{active}, {facts.layers} layers, {tied} embeddings; micro-batches of "
        f"{facts.batch} x {facts.time} tokens, {str(facts.dtype).removeprefix('torch.')}{', autocast' if facts.autocast else ''}, "
        f"M = {plan.options.micro_batches}, {plan.options.optimizer}{', recompute' if plan.options.recompute else ''}"
        f"{', weights of now' if plan.options.replays_newest else ''}"
    )
    if any(unit.trained < unit.parameter_bytes for unit in facts.units):
        text += f"\nonly adapters are trained: {sum(unit.trained for unit in facts.units) / 2**20:,.1f} MiB"
    if unpacked := sum(unit.unpacked_bytes for unit in facts.units):
        whole = sum(unit.parameter_bytes for unit in facts.units) / 2**30
        text += f"\nmatrices are packed: all weights are {whole:,.2f} GiB; those matrices alone were {unpacked / 2**30:,.2f} GiB"
    used = max(plan.placement) + 1
    if used < len(plan.devices):
        text += f"\nonly {used} of {len(plan.devices)} devices are used: more have no layers of their own"
    return text if facts.untrainable is None else f"{text}\nPLANNED ONLY, training not supported: {facts.untrainable}"


def delay(plan: SplitPlan) -> str:
    """How late gradients are, and whether that is advisable."""
    from ..optim.advice import recommended_micro_batches

    if SCHEDULES[plan.options.schedule].is_synchronous:
        return "no gradient is late"
    stages, micro_batches = len(plan.stages), plan.options.micro_batches
    text = f"the first stage's gradients are {(stages - 1) / micro_batches:.2g} updates late"
    enough = recommended_micro_batches(stages)
    return (
        text if micro_batches >= enough else f"{text}; M = {enough} or more is recommended, with smaller micro-batches"
    )


def weighed(plan: SplitPlan, speeds: dict[int, float]) -> str:
    """What `--device_map mixed` has chosen, and why."""
    from .prediction import SLOWER

    chosen, best = len(plan.stages), max(speeds.values())
    compared = ", ".join(f"{speed / best:.3f} with {stages}" for stages, speed in speeds.items())
    return f"mixed: {chosen} stages, the fewest that are simulated within {SLOWER:.0%} of the fastest; of its speed: {compared} stages"


def stage_table(plan: SplitPlan) -> str:
    """A row per stage: its device, size, times and modules."""
    rows = []
    for stage in plan.stages:
        names = [name for unit in stage.units for name in unit.modules]
        rows.append(
            (
                stage.stage,
                f"{stage.device}: {plan.devices[stage.device].name}",
                stage.delay,
                stage.layers,
                f"{sum(unit.parameters for unit in stage.units):,}",
                milliseconds(stage.forward),
                milliseconds(stage.backward),
                milliseconds(stage.step),
                names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}",
            )
        )
    header = ("stage", "device", "delay", "layers", "parameters", "forward ms", "backward ms", "step ms", "modules")
    return table(header, rows, left=(1, 8))


def device_table(plan: SplitPlan, chosen: Simulation) -> str:
    """A row per device: its memory by what it is for, and how busy it is."""
    devices = range(max(plan.placement) + 1)
    name, unit = byte_unit(max(plan.bytes_on(device) for device in devices))
    rows = []
    for device in devices:
        memory = plan.memory_on(device)
        parts = [*vars(memory).values(), memory.total]
        limit = plan.devices[device].memory
        rows.append(
            (
                f"{device}: {plan.devices[device].name}",
                *(size(part, unit) for part in parts),
                "-" if limit == float("inf") else f"{limit / 2**30:.1f} GiB",
                f"{chosen.busy_shares[device]:.0%}",
            )
        )
    header = (
        f"{name} on",
        "weights",
        "old versions",
        "gradients",
        "optimizer",
        "activations",
        "working",
        "messages",
        "all",
        "may use",
        "busy",
    )
    return table(header, rows)


def schedule_table(plan: SplitPlan, runs: dict[str, Simulation], ideal: float, replicas: int) -> str:
    """A row per schedule, those of other software included."""
    tokens = plan.facts.batch * plan.facts.time * replicas
    naive = runs.get("naive")  # not if there are more devices than layers
    name, unit = byte_unit(max(max(found.bytes_in_flight) for found in runs.values()))
    rows = []
    for schedule, found in runs.items():
        rows.append(
            (
                schedule,
                f"{tokens / found.seconds_per_tick:,.0f}",
                f"{naive.seconds_per_tick / found.seconds_per_tick:.2f}" if naive is not None else "-",
                f"{min(found.busy_shares):.0%} - {max(found.busy_shares):.0%}",
                milliseconds(found.fill_seconds),
                size(max(found.bytes_in_flight), unit),
            )
        )
    header = ("schedule", "tokens/s", "over naive", "devices busy", "fill ms", f"activations {name}")
    return (
        f"{table(header, rows)}\nThis split could reach {ideal:.2f} times one device's speed if no device ever waited. "
        f"{', '.join(PEERS)}\nare other software's, each with its own split; {FSDP} shares out every layer instead."
    )
