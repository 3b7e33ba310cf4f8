"""Replays device programs in simulated time: who computes when, who waits, and whether anybody waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .instructions import Backward, Exchange, Forward, Instruction, Rendezvous


class Deadlock(RuntimeError):
    """The programs wait for each other in a circle; the message shows where each device stands."""


@dataclass(frozen=True)
class Executed:
    """An instruction with its simulated times, in the unit of the durations."""

    device: int
    instruction: Instruction
    start: float
    end: float


class Message(NamedTuple):
    """What it takes to send a result to another device, in the unit of the durations.

    Args:
        occupied: how long the link is taken; the next message from this device to that one waits so long.
        latency: how much later the message is there.
    """

    occupied: float
    latency: float


class Task(NamedTuple):
    """An instruction, prepared for the replay.

    Args:
        need: number of the result that it waits for; `NOTHING`, or `EVERYBODY` where all devices meet.
        give: number of the result that it produces, or `NOTHING`.
        duration: time that it takes.
        stage: whose it is; -1 where no stage is concerned.
        link: (from, to) device of the message with its result; None where the consumer is on the same device.
        message: what sending it takes.
        after: time between its end and the next instruction of its stage; the device may work for other stages.
        instruction: itself.
    """

    need: int
    give: int
    duration: float
    stage: int
    link: tuple[int, int] | None
    message: Message | None
    after: float
    instruction: Instruction


NOTHING, EVERYBODY = -1, -2
Duration = Callable[[Instruction], float]
Transfer = Callable[[Forward | Backward, int, int], Message]


def prepare(
    program: Iterable[Instruction],
    device: int,
    placement: Sequence[int],
    duration: Duration,
    transfer: Transfer | None = None,
    after: Duration | None = None,
) -> list[Task]:
    """Prepares one device's instructions for `run`.

    Args:
        program: finite sequence of `Instruction`s; unknown kinds with a `stage` need nothing and give nothing.
        device: who executes it.
        placement: device of every stage.
        duration: time that an instruction takes.
        transfer: (instruction, from, to) -> what sending its result takes; None for no time at all.
        after: see `Task`; None for no time at all.
    """
    stages = len(placement)
    tasks = []
    for instruction in program:
        need, give, target = NOTHING, NOTHING, None
        if isinstance(instruction, Forward):
            stage, tick = instruction.stage, instruction.tick
            give = 2 * (tick * stages + stage)
            if stage > 0:
                need = give - 2
            target = placement[stage + 1] if stage < stages - 1 else None
        elif isinstance(instruction, Backward):
            stage, tick = instruction.stage, instruction.tick
            give = 2 * (tick * stages + stage) + 1
            if stage < stages - 1:
                need = give + 2
            target = placement[stage - 1] if stage > 0 else None
        elif isinstance(instruction, (Rendezvous, Exchange)):
            stage, need = -1, EVERYBODY
        else:
            stage = getattr(instruction, "stage", -1)
        link = message = None
        if transfer is not None and isinstance(instruction, (Forward, Backward)) and target not in (None, device):
            link, message = (device, target), transfer(instruction, device, target)
        tasks.append(
            Task(
                need,
                give,
                duration(instruction),
                stage,
                link,
                message,
                after(instruction) if after is not None else 0.0,
                instruction,
            )
        )
    return tasks


def run(tasks: Sequence[Sequence[Task]]) -> list[list[float]]:
    """Runs every device's tasks in order, each as soon as its inputs are there; returns when each one ended.

    Raises:
        Deadlock: some device can never go on.
    """
    devices = range(len(tasks))
    there: dict[int, float] = {}  # result -> when it is where it is needed
    waiting: dict[int, int] = {}  # result -> device that waits for it
    link_free: dict[tuple[int, int], float] = {}
    stage_free: dict[int, float] = {}
    free = [0.0 for _ in devices]
    ends: list[list[float]] = [[] for _ in devices]
    todo = list(reversed(devices))
    while True:
        while todo:
            device = todo.pop()
            own, done, now = tasks[device], ends[device], free[device]
            for position in range(len(done), len(own)):
                need, give, duration, stage, link, message, after, _ = own[position]
                if need >= 0:
                    ready = there.get(need)
                    if ready is None:
                        waiting[need] = device
                        break
                    if ready > now:
                        now = ready
                elif need == EVERYBODY:
                    break
                if stage in stage_free:
                    now = max(now, stage_free.pop(stage))
                now += duration
                done.append(now)
                if after:
                    stage_free[stage] = now + after
                if give >= 0:
                    if link is None or message is None:
                        there[give] = now
                    else:
                        sent = max(link_free.get(link, 0.0), now) + message.occupied
                        link_free[link] = sent
                        there[give] = sent + message.latency
                    if give in waiting:
                        todo.append(waiting.pop(give))
            free[device] = now
        heads = [tasks[d][len(ends[d])] if len(ends[d]) < len(tasks[d]) else None for d in devices]
        if all(head is None for head in heads):
            return ends
        if not all(head is not None and head.need == EVERYBODY for head in heads):
            standing = ", ".join(f"device {d} at {head and head.instruction}" for d, head in enumerate(heads))
            raise Deadlock(f"the programs wait for each other: {standing}")
        together = max(free)
        for device in devices:
            free[device] = together + tasks[device][len(ends[device])].duration
            ends[device].append(free[device])
        todo = list(reversed(devices))


def replay(
    programs: Sequence[Iterable[Instruction]],
    duration: Duration,
    num_stages: int,
    transfer: Transfer | None = None,
    after: Duration | None = None,
) -> list[Executed]:
    """Runs each device's instructions in order, every instruction as soon as its inputs are there.

    Args:
        programs: one finite instruction sequence per device.
        duration: time that an instruction takes.
        num_stages: K; Forward(k) needs Forward(k-1), Backward(k) needs Backward(k+1), of the same tick.
        transfer: see `prepare`.
        after: see `prepare`.

    Returns:
        All executed instructions, device by device in program order.

    Raises:
        Deadlock: some device can never go on.
    """
    sequences = [list(program) for program in programs]
    placement = placement_of(sequences, num_stages)
    tasks = [prepare(program, d, placement, duration, transfer, after) for d, program in enumerate(sequences)]
    return [
        # Never before the end of the one before, which the subtraction might miss by the last bit.
        Executed(device, task.instruction, max(end - task.duration, before), end)
        for device, (own, ends) in enumerate(zip(tasks, run(tasks), strict=True))
        for task, before, end in zip(own, [0.0, *ends], ends, strict=False)
    ]


def placement_of(programs: Sequence[Sequence[Instruction]], num_stages: int) -> list[int]:
    """Device of every stage, from the programs; -1 for stages that none of them runs."""
    placement = [-1] * num_stages
    for device, program in enumerate(programs):
        for instruction in program:
            if (stage := getattr(instruction, "stage", -1)) >= 0:
                placement[stage] = device
    return placement
