"""Model -> stages: device maps, the balanced split, and stages that share the model's parameters."""

from .families import Memory, Targets
from .plan import StagePlan, StageRow, torch_device
from .split import Home, Partition, compose, select, split_model, to_device
from .stages import Stage

__all__ = [
    "Home",
    "Memory",
    "Partition",
    "Stage",
    "StagePlan",
    "StageRow",
    "Targets",
    "compose",
    "select",
    "split_model",
    "to_device",
    "torch_device",
]
