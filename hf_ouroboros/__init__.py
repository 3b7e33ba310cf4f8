"""hf_ouroboros: the Hugging Face Trainer that keeps every device busy when a model is split over several."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AutoStagedModelForCausalLM": "auto_staged",
    "AutoStagedModelForSeq2SeqLM": "auto_staged",
    "OuroborosArguments": "arguments",
    "OuroborosTrainer": "trainer",
    "Reference": "reference",
    "StagePlan": "partition",
    "split_model": "partition",
    "CheckpointError": "errors",
    "CheckpointMismatchError": "errors",
    "ConnectionLostError": "errors",
    "DeviceMapError": "errors",
    "DisagreementError": "errors",
    "EngineError": "errors",
    "OuroborosError": "errors",
    "OutputFolderError": "errors",
    "ProcessLaunchError": "errors",
    "RankFailedError": "errors",
    "UnsupportedModelError": "errors",
    "UnsupportedOptionError": "errors",
    "WorkerError": "errors",
}

__all__ = [
    "AutoStagedModelForCausalLM",
    "AutoStagedModelForSeq2SeqLM",
    "CheckpointError",
    "CheckpointMismatchError",
    "ConnectionLostError",
    "DeviceMapError",
    "DisagreementError",
    "EngineError",
    "OuroborosArguments",
    "OuroborosError",
    "OuroborosTrainer",
    "OutputFolderError",
    "ProcessLaunchError",
    "RankFailedError",
    "Reference",
    "StagePlan",
    "UnsupportedModelError",
    "UnsupportedOptionError",
    "WorkerError",
    "__version__",
    "split_model",
]

if TYPE_CHECKING:
    from .arguments import OuroborosArguments
    from .auto_staged import AutoStagedModelForCausalLM, AutoStagedModelForSeq2SeqLM
    from .errors import (
        CheckpointError,
        CheckpointMismatchError,
        ConnectionLostError,
        DeviceMapError,
        DisagreementError,
        EngineError,
        OuroborosError,
        OutputFolderError,
        ProcessLaunchError,
        RankFailedError,
        UnsupportedModelError,
        UnsupportedOptionError,
        WorkerError,
    )
    from .partition import StagePlan, split_model
    from .reference import Reference
    from .trainer import OuroborosTrainer


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that `import hf_ouroboros` costs nothing."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
