"""Running a model without data: how it is called, and answers for values that the meta device does not have."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def call_options(model: nn.Module) -> dict[str, Any]:
    """What a forward for training is called with besides a batch."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model reads with an encoder what its decoder goes on from."""
    declared = getattr(model.config, "is_encoder_decoder", False)
    return declared and "decoder_input_ids" in inspect.signature(model.forward).parameters


def target_labels(labels: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """The labels that are targets: a decoder alone never predicts its first token."""
    return labels if getattr(model.config, "is_encoder_decoder", False) else labels[..., 1:]


def probe_inputs(model: nn.Module, rows: int, time: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The smallest batch that the model runs on: tokens, and a decoder's, which are fewer."""
    ids = torch.zeros(rows, time, dtype=torch.long, device=device)
    return (
        {"input_ids": ids, "decoder_input_ids": ids[:, : time - 4]} if is_encoder_decoder(model) else {"input_ids": ids}
    )


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model returned."""
    return output.logits if hasattr(output, "logits") else output[0]


class Answers(TorchDispatchMode):
    """Answers for values that are not there on the meta device, and notes whether random numbers are drawn.

    Every scalar is 1 or True; of everything there is one that is not zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) and args[0].is_meta else None
        if tensor is not None:
            if func is torch.ops.aten._local_scalar_dense.default:
                if tensor.dtype is torch.bool:
                    return True
                return 1.0 if tensor.is_floating_point() else 1
            if func is torch.ops.aten.nonzero.default:
                return torch.empty(1, tensor.dim(), dtype=torch.long, device="meta")
            if func is torch.ops.aten.where.default:
                return [torch.empty(1, dtype=torch.long, device="meta") for _ in range(tensor.dim())]
            if func is torch.ops.aten.equal.default:
                return True
        return func(*args, **(kwargs or {}))


class batched_experts:
    """Within this context, experts are computed for all tokens at once, which needs no data."""

    def __init__(self, config: Any):
        self.configs = [c for c in (config, getattr(config, "text_config", None)) if c is not None]
        self.before: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        for config in self.configs:
            if hasattr(config, "_experts_implementation"):
                self.before.append((config, config._experts_implementation))
                config._experts_implementation = "batched_mm"

    def __exit__(self, *_: Any) -> None:
        for config, value in self.before:
            config._experts_implementation = value
