"""TRL's other trainers: asked for by name, each is refused with the reason why stages can't run it."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import UnsupportedTrainerError

GENERATES = (
    "samples from the model while it trains, and every token needs the whole model with its newest weights, while stages hold "
    "parts of it at different moments. Sample and score beforehand, and train with OuroborosDPOTrainer or OuroborosSFTTrainer; "
    "or use trl's own trainer"
)
SCALAR = (
    "trains a head that gives one number for a text (or for a step), which is no language model: there are no logits of tokens "
    "for the last stage to make a loss of. Use trl's own trainer"
)
TWICE = (
    "runs the model more than once for a batch (for a second set of completions), while the stages before the last one run it "
    "once. Use OuroborosDPOTrainer with pairs, or trl's own trainer"
)
TEACHER = (
    "compares the model's logits with those of a second model, or of its own samples, for every token while it trains, and only "
    "one model is split into stages. Write the teacher's answers down, and train with OuroborosSFTTrainer; or use trl's own trainer"
)
EXPERIMENTAL = (
    "is experimental in TRL (trl.experimental), whose interface changes from release to release, so it was not compared. Use "
    "OuroborosDPOTrainer, or trl's own trainer"
)

REASONS = {
    **dict.fromkeys(
        ("GRPO", "AsyncGRPO", "GSPO", "RLOO", "PPO", "OnlineDPO", "NashMD", "XPO", "A2PO", "GMPO", "TPO", "SDPO"),
        GENERATES,
    ),
    **dict.fromkeys(("Reward", "PRM"), SCALAR),
    **dict.fromkeys(("KTO", "BCO"), TWICE),
    **dict.fromkeys(("Distillation", "AsyncDistillation", "GKD", "GOLD", "MiniLLM", "SDFT"), TEACHER),
    **dict.fromkeys(("ORPO", "CPO", "PAPO"), EXPERIMENTAL),
}
"""{what stands before Trainer or Config: why}"""


def refuse(name: str, here: Collection[str]) -> None:
    """Refuses the name of a trainer of TRL, or of its configuration, that is not here; every other name passes.

    Args:
        name: as it was asked for.
        here: the names that are.

    Raises:
        UnsupportedTrainerError: says why.
    """
    match = re.fullmatch(r"(?:Ouroboros)?(\w+?)(Trainer|Config)", name)
    if match is None:
        return
    kind, what = match.groups()
    if kind in REASONS:
        raise UnsupportedTrainerError(f"there is no {name}: TRL's {kind}Trainer {REASONS[kind]}")
    if f"Ouroboros{kind}{what}" in here:
        raise UnsupportedTrainerError(f"there is no {name} here: it is called Ouroboros{kind}{what}")
