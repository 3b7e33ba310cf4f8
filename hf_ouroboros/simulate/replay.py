"""Replays device programs in simulated time: who computes when, who waits, and whether anybody waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..engine.schedule import Backward, Exchange, Forward, Instruction, Rendezvous


class Deadlock(RuntimeError):
    """The programs wait for each other in a circle; the message shows where each device stands."""


@dataclass(frozen=True)
class Executed:
    """An instruction with its simulated times, in the unit of the durations."""

    device: int
    instruction: Instruction
    start: float
    end: float


def replay(
    programs: Sequence[Iterable[Instruction]],
    duration: Callable[[Instruction], float],
    num_stages: int,
) -> list[Executed]:
    """Runs each device's instructions in order, every instruction as soon as its inputs are there.

    Args:
        programs: one finite instruction sequence per device.
        duration: time that an instruction takes.
        num_stages: K; Forward(k) needs Forward(k-1), Backward(k) needs Backward(k+1), of the same tick.

    Returns:
        All executed instructions, device by device in program order.

    Raises:
        Deadlock: some device can never go on.
    """
    todo = [list(program) for program in programs]
    position = [0] * len(todo)
    free = [0.0] * len(todo)
    finished: dict[Instruction, float] = {}
    executed: list[Executed] = []

    def run(device: int, ready: float) -> None:
        instruction = todo[device][position[device]]
        start = max(free[device], ready)
        free[device] = finished[instruction] = start + duration(instruction)
        executed.append(Executed(device, instruction, start, free[device]))
        position[device] += 1

    def ready_time(instruction: Instruction) -> float | None:
        if isinstance(instruction, Forward) and instruction.stage > 0:
            return finished.get(Forward(instruction.stage - 1, instruction.tick))
        if isinstance(instruction, Backward) and instruction.stage < num_stages - 1:
            return finished.get(Backward(instruction.stage + 1, instruction.tick))
        return 0.0

    while any(position[d] < len(todo[d]) for d in range(len(todo))):
        progress = False
        for device in range(len(todo)):
            while position[device] < len(todo[device]):
                head = todo[device][position[device]]
                if isinstance(head, (Rendezvous, Exchange)):
                    break
                ready = ready_time(head)
                if ready is None:
                    break
                run(device, ready)
                progress = True
        heads = [todo[d][position[d]] if position[d] < len(todo[d]) else None for d in range(len(todo))]
        if all(isinstance(head, (Rendezvous, Exchange)) for head in heads):
            together = max(free)
            for device in range(len(todo)):
                run(device, together)
            progress = True
        if not progress:
            standing = ", ".join(f"device {d} at {head}" for d, head in enumerate(heads))
            raise Deadlock(f"the programs wait for each other: {standing}")
    return executed


def makespan(executed: Sequence[Executed]) -> float:
    """When the last instruction ended."""
    return max((item.end for item in executed), default=0.0)
