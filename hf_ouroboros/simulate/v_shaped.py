"""Two synchronous schedules whose stages lie in a V: ZB-V and DualPipeV, as programs of each device.

D devices have 2D stages, device i the stages i and 2D-1-i, so that the first device has both ends of the model. An update of 4
micro-batches on two devices under ZB-V (F forward, B gradient of the input, W of the weights; the stage nearer to the end of the
model in small letters):

    device 0   F0 F1 F2 f0 b0 w0 f1 b1 w1 F3 B0 W0 f2 b2 w2 B1 W1 f3 b3 w3 B2 W2 B3 W3
    device 1   F0 f0 F1 f1 b0 w0 F2 B0 W0 f2 b1 w1 F3 B1 W1 f3 b2 w2 B2 b3 B3 W2 w3 W3

Both are as torch.distributed.pipelining has them (`ScheduleZBVZeroBubble`, `ScheduleDualPipeV`). Sources: ZB-V, arXiv 2401.10241,
section 6; DualPipeV, github.com/deepseek-ai/DualPipe, after arXiv 2412.19437. DeepSeek runs a forward and a backward at once, to hide
what experts send; here, as in torch, they follow each other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from ..schedules.instructions import Backward, Forward, InputGradient, Instruction, WeightGradient

Item = tuple[type[Forward] | type[Backward] | type[WeightGradient], int]
"""What is done, and for which stage; always with the next micro-batch."""


def v_placement(num_devices: int) -> list[int]:
    """The device of each of the 2D stages."""
    return [*range(num_devices), *reversed(range(num_devices))]


def zb_v(device: int, num_devices: int, micro_batches: int, first: int) -> list[Instruction]:
    """What a device does for an update under ZB-V; with fewer than 2D-1 micro-batches, what is left of such an update."""
    near, far = device, 2 * num_devices - 1 - device
    behind = num_devices - device  # devices from this one to the turn of the V
    ticks = max(micro_batches, 2 * num_devices - 1)
    missing = ticks - (2 * num_devices - 1 - device)  # forwards of the near stage that are left for the steady phase
    last_first: list[Item] = [(Forward, far), (InputGradient, far), (WeightGradient, far)]
    near_back: list[Item] = [(InputGradient, near), (WeightGradient, near)]
    order: list[Item] = [(Forward, near)] * (2 * behind - 1)
    order += [(Forward, far), (Forward, near)] * device
    order += last_first * behind
    for turn in range(ticks - num_devices):
        order += [(Forward, near)] * (turn < missing)
        order += near_back + last_first
    order += [(InputGradient, near), (InputGradient, far)] * device
    order += near_back * behind
    order += [(WeightGradient, far)] * device + [(WeightGradient, near)] * device
    return _numbered(order, first, micro_batches)


def dualpipev(device: int, num_devices: int, micro_batches: int, first: int) -> list[Instruction]:
    """What a device does for an update under DualPipeV.

    Raises:
        ValueError: fewer micro-batches than stages.
    """
    if micro_batches < 2 * num_devices:
        raise ValueError(
            f"dualpipev: {micro_batches} micro-batches are fewer than the {2 * num_devices} stages of {num_devices} devices; "
            f"use {2 * num_devices} or more"
        )
    near, far = device, 2 * num_devices - 1 - device
    behind = num_devices - 1 - device  # devices between this one and the turn of the V
    forward_near, forward_far = (Forward, near), (Forward, far)
    order: list[Item] = [forward_near] * (2 * behind)
    order += [forward_near, forward_far] * (device + 1)
    order += [(InputGradient, far), (WeightGradient, far), forward_far] * behind
    order += [forward_near, (Backward, far), forward_far, (Backward, near)] * (
        micro_batches - 2 * num_devices + device + 1
    )
    order += [(Backward, far), forward_far, (Backward, near)] * behind
    # From the middle of what follows on, gradients of weights are put off.
    late: deque[int] = deque()
    whole = device + 1
    for number in range(2 * (device + 1)):
        stage = near if number % 2 else far
        if number < whole:
            order.append((Backward, stage))
        else:
            order.append((InputGradient, stage))
            late.append(stage)
    for _ in range(behind):
        order += [(WeightGradient, late.popleft()), (InputGradient, near)]
        late.append(near)
    order += [(WeightGradient, stage) for stage in late]
    return _numbered(order, first, micro_batches)


def _numbered(order: Iterable[Item], first: int, micro_batches: int) -> list[Instruction]:
    """Every item with the next micro-batch of its kind and stage, without those beyond the update's last one."""
    done: Counter[Item] = Counter()
    program: list[Instruction] = []
    for kind, stage in order:
        kinds = (InputGradient, WeightGradient) if kind is Backward else (kind,)
        tick = done[kinds[0], stage]
        done.update((each, stage) for each in kinds)
        if tick < micro_batches:
            program.append(kind(stage, first + tick))
    return program
