"""What delay is known to cost, how many micro-batches make it small, and what `delay_compensation="auto"` and `"muon+auto"` choose.

The numbers are of `recipes/staleness_study.py` with the grids of `recipes/staleness_grids`: a 9-layer, 96-wide byte-level
GPT-2 from scratch on the first megabytes of enwik8, 1024 tokens per update, warm-up over a tenth of the run and cosine to 0.
Every result stands beside the synchronous run of the same optimizer and seed at the best learning rate tried for it.
Adapters are those of `recipes/staleness_grids/lora.yaml`: rank 8 on a 6-layer, 64-wide Llama.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One result of the study.

    Args:
        optimizer: "adamw", "nesterov" or "muon".
        compensation: what else was done about the delay: "none" or names joined by "+".
        stages: K.
        micro_batches: M.
        learning_rate: the best of those tried.
        cost: relative loss of bits per byte at the end, in per cent, mean over the seeds.
        updates: length of the runs.
        seeds: how many there are.
        adapters: whether LoRA adapters were trained, on another text than the model below them, instead of all of a model from
            scratch.
    """

    optimizer: str
    compensation: str
    stages: int
    micro_batches: int
    learning_rate: float
    cost: float
    updates: int = 750
    seeds: int = 3
    adapters: bool = False

    @property
    def delay(self) -> float:
        """Of the first stage, in updates."""
        return longest_delay(self.stages, self.micro_batches)


MEASURED = (
    Measurement("adamw", "none", 3, 4, 3e-3, 5.9),
    Measurement("adamw", "none", 5, 1, 1e-3, 38.2, updates=500, seeds=1),
    Measurement("adamw", "error_feedback", 3, 4, 3e-3, 3.7),
    Measurement("adamw", "error_feedback", 5, 1, 1e-3, 22.2, updates=500, seeds=1),
    Measurement("adamw", "weight_prediction", 5, 1, 1e-3, 23.2, updates=500, seeds=1),
    Measurement("nesterov", "none", 5, 8, 3e-3, 1.3, updates=500, seeds=1),
    Measurement("nesterov", "none", 5, 1, 1e-3, 13.3, updates=500, seeds=1),
    Measurement("muon", "none", 5, 8, 1e-2, 2.8, updates=500, seeds=1),
    Measurement("muon", "none", 5, 1, 3e-3, 31.6, updates=500, seeds=1),
    Measurement("muon", "error_feedback", 3, 4, 1e-2, 0.4),
    Measurement("muon", "error_feedback", 5, 8, 1e-2, 0.5),
    Measurement("muon", "error_feedback", 9, 16, 1e-2, 0.3),
    Measurement("muon", "error_feedback", 3, 1, 3e-3, 10.1),
    Measurement("muon", "error_feedback", 5, 1, 3e-3, 26.4, updates=500, seeds=1),
    Measurement("muon", "weight_prediction+error_feedback+lr_rescale", 3, 1, 1e-2, 3.9),
    Measurement("muon", "weight_prediction+lr_rescale", 3, 1, 1e-2, 6.1, seeds=1),
    Measurement("muon", "weight_prediction+lr_rescale", 5, 1, 3e-3, 13.9, seeds=1),
    Measurement("adamw", "none", 3, 1, 1e-2, 7.7, updates=150, seeds=1, adapters=True),
    Measurement("adamw", "none", 5, 1, 3e-3, 13.1, updates=150, seeds=1, adapters=True),
    Measurement("adamw", "none", 5, 2, 1e-2, 10.3, updates=150, seeds=1, adapters=True),
    Measurement("adamw", "weight_prediction", 5, 1, 3e-3, 10.5, updates=150, seeds=1, adapters=True),
    Measurement("adamw", "weight_prediction", 5, 2, 1e-2, 3.9, updates=150, seeds=1, adapters=True),
)
COSTLY = 5.0  # per cent
WHOLE_UPDATES = (
    "muon+weight_prediction+lr_rescale",
    "adjust_lr_fn=measure_rms_adamw,anneal=0,rescaled=adamw",
)
"""What bears delays of an update and more, and a learning rate that was meant for AdamW."""
MUON_LATE_BY_PARTS = ("muon+weight_prediction+error_feedback", "prediction=step")
"""What of Muon's loss comes back where gradients are less than an update late."""
MUON_LATE_BY_UPDATES = ("muon+weight_prediction+error_feedback+lr_rescale", "anneal=0,rescaled=adamw")
"""The same for an update and more."""
AUTOMATIC = ("auto", "muon+auto")
"""Values of `delay_compensation` that `automatic` resolves."""
ALIKE = 1 / 3  # of a measurement's learning rate: below that, as in most fine-tuning, it says nothing


def longest_delay(stages: int, micro_batches: int) -> float:
    """Of the first stage, in updates: (K-1)/M."""
    return (stages - 1) / micro_batches


def recommended_micro_batches(stages: int) -> int:
    """M that leaves the first stage half an update late.

    Args:
        stages: K.
    """
    return max(1, 2 * (stages - 1))


def with_muon(stages: int, micro_batches: int) -> tuple[str, str | None]:
    """What "muon+auto" stands for: `delay_compensation` and `delay_compensation_args`.

    Args:
        stages: K; 1 for a synchronous run.
        micro_batches: M.
    """
    if stages == 1:
        return "muon", None
    return MUON_LATE_BY_UPDATES if longest_delay(stages, micro_batches) >= 1 else MUON_LATE_BY_PARTS


def automatic(stages: int, micro_batches: int, optimizer: str, adapters: bool = False) -> tuple[str, str | None]:
    """What "auto" stands for: `delay_compensation` and `delay_compensation_args`.

    Where gradients are less than an update late it leaves the optimizer alone and adds weight prediction to it, rather than
    error feedback, which gained as much from scratch: that one makes gradients noisier, for which AdamW takes smaller steps, so
    that fine-tuning at a low learning rate ended behind a run without it.

    Where they are whole updates late, AdamW would need a lower learning rate than without the delay, and nothing that was tried
    on top of it changed that. Steps are as long as AdamW's there, but the direction of matrices is Muon's.

    Args:
        stages: K; 1 for a synchronous run.
        micro_batches: M.
        optimizer: "adamw", or the name of another one, which is never exchanged and which the study did not have.
        adapters: whether only adapters are trained, whose matrices are no case for Muon.
    """
    if stages == 1 or optimizer != "adamw":
        return "none", None
    whole = longest_delay(stages, micro_batches) >= 1 and not adapters
    return WHOLE_UPDATES if whole else ("weight_prediction", None)


def warning(
    stages: int,
    micro_batches: int,
    learning_rate: float,
    optimizer: str,
    compensation: str = "none",
    adapters: bool = False,
) -> str | None:
    """A warning with a number where a run's delay is known to be costly, else None.

    Args:
        stages: K; 1 for a synchronous run.
        micro_batches: M.
        learning_rate: the run's.
        optimizer: "adamw", "nesterov", "muon", or the name of another one, about which nothing is known.
        compensation: what else is done about the delay; "none" or names joined by "+".
        adapters: whether only adapters are trained.
    """
    delay = longest_delay(stages, micro_batches)
    known = [
        m
        for m in MEASURED
        if (m.optimizer, m.compensation, m.adapters) == (optimizer, compensation, adapters)
        and m.delay <= delay
        and learning_rate >= ALIKE * m.learning_rate
    ]
    worst = max(known, key=lambda m: m.cost, default=None)
    if worst is None or worst.cost < COSTLY:
        return None
    enough = recommended_micro_batches(stages)
    advice = []
    if micro_batches < enough:
        advice.append(
            f"set gradient_accumulation_steps to {enough} (with smaller micro-batches: same tokens per update, same "
            "throughput)"
        )
    if compensation == "none" and adapters:
        advice.append("set delay_compensation to 'auto', which adds weight prediction")
    elif compensation == "none" and optimizer == "adamw" and delay >= 1:
        advice.append("set delay_compensation to 'auto', which takes Muon's directions for such delays")
    elif compensation == "none" and optimizer == "adamw":
        advice.append("set delay_compensation to 'muon+auto', or to 'auto', which keeps the optimizer")
    elif compensation == "none" and optimizer != "nesterov":
        advice.append(
            "set delay_compensation to 'muon+auto'"
            if optimizer == "muon"
            else "add error_feedback to delay_compensation"
        )
    elif (optimizer, compensation) == ("muon", "error_feedback") and delay >= 1:
        advice.append("set delay_compensation to 'muon+auto'")
    return (
        f"num_stages={stages} with gradient_accumulation_steps={micro_batches} applies gradients up to {delay:g} update(s) "
        f"late. With {optimizer} and delay_compensation={compensation!r}, a delay of {worst.delay:g} update(s) cost "
        f"{worst.cost:.1f} % in bits per byte (K={worst.stages}, M={worst.micro_batches}, learning rate "
        f"{worst.learning_rate:g}, {'LoRA on a small model' if adapters else 'a small model from scratch'}). To lose less: {' and '.join(advice) or 'use a lower learning rate'}."
    )
