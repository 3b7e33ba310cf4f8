"""Model -> stages: device maps, the balanced split, and stages that share the model's parameters."""

from .plan import StagePlan, StageRow, torch_device
from .split import Home, Partition, split_model
from .stages import Boundary, Memory, Stage, Targets, compose, select, to_device

__all__ = [
    "Boundary",
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
