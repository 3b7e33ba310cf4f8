"""Do the stages compute what the model computes? Logits and gradients are compared once, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .finite import check_finite
from .meta import is_encoder_decoder

Run = Callable[[dict[str, torch.Tensor]], torch.Tensor]
SEED = 0


@dataclass(frozen=True)
class Sample:
    """What came of a small fixed batch.

    Args:
        logits: of the tokens that are not padding, in evaluation mode.
        gradients: of every parameter that has one, of the next-token loss, by name.
    """

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]


def take_sample(model: PreTrainedModel, keys: frozenset[str], training: bool, run: Run) -> Sample:
    """Runs a small fixed batch whose second row is padded at both ends; random numbers and modes are put back.

    Args:
        model: whose parameters are asked for gradients.
        keys: what the model takes of a batch.
        training: whether gradients are taken in training mode.
        run: computes logits [batch, time, vocabulary].
    """
    modes = [(module, module.training) for module in model.modules()]
    batch, mask = _batch(model, keys)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and not p.is_meta}
    scopes = ExitStack()
    try:
        scopes.enter_context(kept_buffers(model))
        model.eval()
        with torch.no_grad():
            logits = run(batch).float().cpu()[mask]
        model.train(training)
        # The stages draw the same random numbers in the same order, one after the other.
        with torch.random.fork_rng(devices=_accelerators(parameters.values())):
            torch.manual_seed(SEED)
            gradients = _gradients(run(batch), batch, mask, parameters)
        return Sample(logits, gradients)
    finally:
        scopes.close()
        for module, mode in modes:
            module.training = mode


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Puts buffers back that a forward in training mode writes into (running means, power iterations)."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for buffer, values in before:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def _batch(model: PreTrainedModel, keys: frozenset[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or 16
    length = min(16, longest) if longest > 0 else 16
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(text.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : length // 4] = mask[1, length // 2 + 1 :] = 0
    device = next(model.get_input_embeddings().parameters()).device
    batch = {"input_ids": ids.to(device)}
    if "attention_mask" in keys:
        batch["attention_mask"] = mask.to(device)
    else:
        mask = torch.ones_like(ids)
    if is_encoder_decoder(model):
        batch["decoder_input_ids"] = batch["input_ids"].flip(0, 1)[:, : length - 3]
        mask = torch.ones_like(batch["decoder_input_ids"])
    return batch, mask.bool().cpu()


def _gradients(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], mask: torch.Tensor, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    if not logits.requires_grad:
        return {}
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    targets = ids.to(logits.device).masked_fill(~mask.to(logits.device), -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: g.cpu() for n, g in zip(parameters, found, strict=True) if g is not None}


def _accelerators(parameters: Iterable[torch.Tensor]) -> list[int]:
    return sorted({p.device.index for p in parameters if p.device.type == "cuda"})


def compare(expected: Sample, found: Sample, model: PreTrainedModel) -> None:
    """Refuses stages whose logits or gradients differ by more than rounding.

    Raises:
        UnsupportedModelError: they differ, or weights are not finite.
    """
    if not expected.logits.isfinite().all():
        check_finite(model)
    _compare("logits", expected.logits, found.logits, 1 + _size([expected.logits]), model)
    if lacking := sorted(expected.gradients.keys() ^ found.gradients.keys()):
        where = "the unsplit model" if lacking[0] in found.gradients else "the stages"
        raise UnsupportedModelError(
            f"the stages of this {type(model).__name__} don't compute what the model computes: {lacking[0]} gets no "
            f"gradient in {where}"
        )
    scale = _size(expected.gradients.values())
    for name, gradient in expected.gradients.items():
        _compare(f"the gradients of {name}", gradient, found.gradients[name], scale, model)


def _size(tensors: Iterable[torch.Tensor]) -> float:
    return max((t.float().abs().max().item() for t in tensors if t.numel()), default=0.0)


def _compare(what: str, expected: torch.Tensor, found: torch.Tensor, scale: float, model: PreTrainedModel) -> None:
    # The stages run the same kernels; only another device or a half-precision rounding may differ.
    eps = torch.finfo(next(p for p in model.parameters() if p.is_floating_point()).dtype).eps
    error = _size([expected.float() - found.float()])
    if not error <= 1e3 * eps * scale:
        raise UnsupportedModelError(
            f"the stages of this {type(model).__name__} don't compute what the model computes: {what} differ by "
            f"{error:.3g}. Its forward does more than a row of layers does; please report the configuration"
        )
