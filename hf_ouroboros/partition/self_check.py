"""Do the stages compute what the model computes? Their logits are compared once, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .finite import check_finite


@torch.no_grad()
def sample_logits(model: PreTrainedModel, run: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
    """Logits (or log-probabilities) of a small fixed batch whose second row is padded, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    length = min(16, getattr(model.config, "max_position_embeddings", 16))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    device = next(model.get_input_embeddings().parameters()).device
    try:
        model.eval()
        logits = run({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
        return logits.float().cpu()[mask.bool()]
    finally:
        for module, mode in modes:
            module.training = mode


def compare_logits(expected: torch.Tensor, found: torch.Tensor, model: PreTrainedModel) -> None:
    """Refuses stages whose logits differ by more than rounding.

    Raises:
        UnsupportedModelError: they differ, or weights are not finite.
    """
    if not expected.isfinite().all():
        check_finite(model)
    # The stages run the same kernels; only another device or a half-precision rounding may differ.
    eps = torch.finfo(next(model.parameters()).dtype).eps
    error = (expected - found).abs().max().item()
    if not error <= 1e3 * eps * (1 + expected.abs().max().item()):
        raise UnsupportedModelError(
            f"the stages of this {type(model).__name__} don't compute what the model computes: logits differ by "
            f"{error:.3g}. Its forward probably does more than its family expects; please report the configuration"
        )
