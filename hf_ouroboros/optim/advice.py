"""What delay is known to cost, and what `delay_compensation="auto"` chooses.

The numbers are of single runs in the setting that is the default of `recipes/staleness_study.py`, which measures such
numbers again: a 6-layer, 128-wide byte-level GPT-2 from scratch on the first megabytes of enwik8, 1000 updates of 1024 tokens,
cosine after 100 warm-up updates, learning rate 1e-3, one seed. A cost is validation bits per character relative to the
synchronous run of the same optimizer at the same learning rate, minus one.

| largest delay (K-1)/M | AdamW (the default of `optim`) | any other optimizer |
|---|---|---|
| below 1 update | none | none |
| 1 update or more | nesterov | none |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One result of the study.

    Args:
        optimizer: "adamw", "nesterov" or "muon".
        stages: K.
        micro_batches: M.
        bits: validation bits per character.
        synchronous: the same without delay.
    """

    optimizer: str
    stages: int
    micro_batches: int
    bits: float
    synchronous: float

    @property
    def delay(self) -> float:
        """Of the first stage, in updates."""
        return (self.stages - 1) / self.micro_batches

    @property
    def cost(self) -> float:
        """Relative loss of bits per character."""
        return self.bits / self.synchronous - 1


MEASURED = (
    Measurement("adamw", 3, 1, 4.142, 3.443),
    Measurement("adamw", 3, 4, 3.535, 3.443),
    Measurement("adamw", 3, 8, 3.499, 3.443),
    Measurement("adamw", 6, 8, 3.547, 3.443),
    Measurement("nesterov", 3, 1, 3.595, 3.457),
    Measurement("nesterov", 3, 4, 3.464, 3.457),
    Measurement("muon", 3, 1, 3.401, 3.108),
    Measurement("muon", 3, 2, 3.245, 3.108),
    Measurement("muon", 3, 4, 3.163, 3.108),
    Measurement("muon", 6, 8, 3.178, 3.108),
)
COSTLY = 0.04


def automatic(stages: int, micro_batches: int, optimizer: str) -> str:
    """What "auto" stands for.

    Args:
        stages: K; 1 for a synchronous run.
        micro_batches: M.
        optimizer: "adamw", or the name of another one.
    """
    return "nesterov" if optimizer == "adamw" and (stages - 1) / micro_batches >= 1 else "none"


def warning(stages: int, micro_batches: int, optimizer: str) -> str | None:
    """A warning with a number where a run's delay is known to be costly, else None.

    Args:
        stages: K; 1 for a synchronous run.
        micro_batches: M.
        optimizer: "adamw", "nesterov", "muon", or the name of another one, about which nothing is known.
    """
    delay = (stages - 1) / micro_batches
    known = [m for m in MEASURED if m.optimizer == optimizer and m.delay <= delay]
    worst = max(known, key=lambda m: m.cost, default=None)
    if worst is None or worst.cost < COSTLY:
        return None
    return (
        f"num_stages={stages} with gradient_accumulation_steps={micro_batches} applies gradients up to {delay:g} update(s) late. "
        f"With {optimizer}, a delay of {worst.delay:g} update(s) cost {worst.cost:.0%} in bits per character (K={worst.stages}, "
        f"M={worst.micro_batches}, a small model from scratch). Set gradient_accumulation_steps to {stages - 1} or more (with "
        "smaller micro-batches: same tokens per update, same throughput)"
        + (", or delay_compensation to 'nesterov' or 'muon'." if optimizer == "adamw" else ".")
    )
