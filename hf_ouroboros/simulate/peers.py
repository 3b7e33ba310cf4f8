"""Schedules that others run, as programs for the replay: naive, GPipe, interleaved 1F1B, zero-bubble and DualPipeV.

All are synchronous: an update's gradients are those of its own weights, and every update ends with a drained
pipeline. They are here to be compared with; the engine does not run them. D devices, M micro-batches per update,
F, B and W the time of a device's forward, input gradient and weight gradient of one micro-batch:

    naive        devices take turns                                          update: M D (F + B + W)
    gpipe        all forwards, then all backwards                            (M + D - 1) (F + B + W)
    interleaved  1F1B, every device holds V chunks of the model              (M + (D - 1) / V) (F + B + W)
    zb-h1        weight gradients fill the waiting, memory as 1F1B           M (F + B + W) + (D - 1) (F + B - W)
    zb-v         the same on 2D stages in a V, M >= 2D - 1                   M (F + B + W), where F = B = W
    dualpipev    the same, a forward beside every backward, M >= 2D          M (F + B + W) + (D - 1) F / 2, where F = B = W

Sources: GPipe, arXiv 1811.06965; interleaved, arXiv 2104.04473; zero-bubble, arXiv 2401.10241. What shares out every layer instead
of splitting by layers is in `sharded.py`.
"""

from __future__ import annotations

from ..schedules.instructions import Backward, Forward, InputGradient, Instruction, Step, WeightGradient
from .v_shaped import dualpipev, v_placement, zb_v

PEERS = {
    "naive": "#9a9aa2",
    "gpipe": "#7aa6d1",
    "interleaved": "#4fa3a5",
    "zb-h1": "#8a5bb0",
    "zb-v": "#5a3d8a",
    "dualpipev": "#a08427",
}
"""Names, and the colours of their curves."""
V_SHAPED = {"zb-v": zb_v, "dualpipev": dualpipev}
CHUNKS = 2  # of the model per device, under "interleaved"


def peer_placement(name: str, num_devices: int) -> list[int]:
    """Device of every stage: one stage per device, or two in a V, or `CHUNKS` in turn under "interleaved"."""
    if name in V_SHAPED:
        return v_placement(num_devices)
    return [k % num_devices for k in range(num_devices * (CHUNKS if name == "interleaved" else 1))]


def peer_programs(
    name: str,
    num_devices: int,
    micro_batches: int,
    updates: int,
) -> list[list[Instruction]]:
    """Instructions of every device for a run of `updates` updates.

    Args:
        name: one of `PEERS`.
        num_devices: D.
        micro_batches: M.
        updates: how many updates.

    Raises:
        ValueError: unknown name, or an M that "interleaved" cannot divide into rounds or that is too small for "dualpipev".
    """
    if name not in PEERS:
        raise ValueError(f"schedule {name!r} is unknown; use one of {', '.join(PEERS)}")
    others = {"naive": _naive, "gpipe": _gpipe, "interleaved": _interleaved, "zb-h1": _zero_bubble}
    make = (others | V_SHAPED)[name]
    return [
        [
            instruction
            for update in range(updates)
            for instruction in (
                *make(device, num_devices, micro_batches, update * micro_batches),
                *(Step(k, update) for k in reversed(_own(name, device, num_devices))),
            )
        ]
        for device in range(num_devices)
    ]


def _own(name: str, device: int, num_devices: int) -> list[int]:
    return [k for k, d in enumerate(peer_placement(name, num_devices)) if d == device]


def _naive(device: int, num_devices: int, micro_batches: int, first: int) -> list[Instruction]:
    return [i for t in range(first, first + micro_batches) for i in (Forward(device, t), Backward(device, t))]


def _gpipe(device: int, num_devices: int, micro_batches: int, first: int) -> list[Instruction]:
    ticks = range(first, first + micro_batches)
    return [*(Forward(device, t) for t in ticks), *(Backward(device, t) for t in ticks)]


def _interleaved(device: int, num_devices: int, micro_batches: int, first: int) -> list[Instruction]:
    """Rounds of about D micro-batches pass through chunk 0, then through chunk 1; backwards from chunk 1 to 0."""
    rounds = max(1, micro_batches // num_devices)
    if micro_batches % rounds:
        raise ValueError(
            f"interleaved: {micro_batches} micro-batches can't be divided into {rounds} equal rounds for {num_devices} "
            f"devices; use a multiple of {num_devices}"
        )
    size, total = micro_batches // rounds, micro_batches * CHUNKS

    def item(number: int, backward: bool) -> Instruction:
        chunk = number // size % CHUNKS
        tick = first + number // (size * CHUNKS) * size + number % size
        if backward:
            return Backward((CHUNKS - 1 - chunk) * num_devices + device, tick)
        return Forward(chunk * num_devices + device, tick)

    ahead = min(total, (CHUNKS - 1) * size + 2 * (num_devices - 1 - device))
    program = [item(n, False) for n in range(ahead)]
    for n in range(total):
        if n + ahead < total:
            program.append(item(n + ahead, False))
        program.append(item(n, True))
    return program


def _zero_bubble(device: int, num_devices: int, micro_batches: int, first: int) -> list[Instruction]:
    """1F1B whose weight gradients are late: by as many micro-batches as the device is far from the first one."""
    ahead = min(micro_batches, num_devices - 1 - device)
    ticks = range(first, first + micro_batches)
    program: list[Instruction] = [Forward(device, t) for t in ticks[:ahead]]
    for n, tick in enumerate(ticks):
        if n + ahead < micro_batches:
            program.append(Forward(device, tick + ahead))
        program.append(InputGradient(device, tick))
        if n >= device:
            program.append(WeightGradient(device, tick - device))
    return [*program, *(WeightGradient(device, t) for t in ticks[max(0, micro_batches - device) :])]
