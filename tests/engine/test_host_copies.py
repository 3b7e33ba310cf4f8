"""Masks whose values the host knows: the same numbers as plain ones, and no question asked of the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from hf_ouroboros.engine.host_copies import KnownTensor, known, plain_positions

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


class Asked(TorchDispatchMode):
    """Notes which memory is read into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.memory.append(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def twin(values: torch.Tensor) -> KnownTensor:
    return KnownTensor.of(values.clone(), values)


def test_what_is_computed_of_it_alone_is_known() -> None:
    mask = twin(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    for found in (mask.to(torch.bool), mask[:, 1:], ~mask.bool(), mask.sum() == mask.numel(), torch.diff(mask, dim=-1)):
        assert isinstance(found, KnownTensor)
        assert torch.equal(found.as_subclass(torch.Tensor), found.host)


def test_with_others_it_is_a_plain_tensor() -> None:
    mask = twin(torch.ones(2, 3))
    for found in (mask + torch.ones(3), torch.nn.functional.linear(mask, torch.ones(4, 3)), torch.ones(2, 3) * mask):
        assert type(found) is torch.Tensor


def test_questions_are_answered_by_the_copy() -> None:
    mask = twin(torch.ones(2, 3))
    mask.as_subclass(torch.Tensor).zero_()  # as a device that has not come so far
    assert bool(mask.all()) and mask.sum().item() == 6 and mask.tolist() == [[1.0] * 3] * 2


def test_what_was_written_to_is_not_known() -> None:
    mask = twin(torch.ones(2, 3))
    mask[0, 1] = 0
    assert mask.host is None and not bool(mask.all())
    mask = twin(torch.ones(2, 3))
    mask.mul_(0)
    assert mask.host is None and not bool(mask.any())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_masks_are_the_same(padded: bool, attention: str) -> None:
    config = LlamaConfig(attn_implementation=attention)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0 if padded else 1
    given = dict(config=config, inputs_embeds=torch.zeros(2, 5, 8), past_key_values=None)
    expected = create_causal_mask(attention_mask=mask, **given)
    device = mask.clone()
    with Asked() as asked:
        found = create_causal_mask(attention_mask=KnownTensor.of(device, mask), **given)
    assert (expected is None) == (found is None)
    assert expected is None or torch.equal(expected, found.as_subclass(torch.Tensor))
    assert device.untyped_storage().data_ptr() not in asked.memory


def test_only_what_comes_from_the_host_is_known() -> None:
    batch = {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)}
    assert all(type(value) is torch.Tensor for value in known(batch, batch).values())  # the device is the host
    on_device = {key: value.to("meta") for key, value in batch.items()}
    found = known(on_device, batch)
    assert type(found["input_ids"]) is torch.Tensor and isinstance(found["attention_mask"], KnownTensor)


def test_positions_that_a_model_counts_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    counted, packed = torch.arange(4)[None].expand(2, -1), torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    device = torch.device("meta")
    with plain_positions({}, device), Asked() as asked:
        assert masking_utils.find_packed_sequence_indices(counted) is None
    assert not asked.memory
    with plain_positions({}, device):
        assert masking_utils.find_packed_sequence_indices(packed) is not None
    with plain_positions({"position_ids": packed}, device):
        assert masking_utils.find_packed_sequence_indices(counted) is None
    assert masking_utils.find_packed_sequence_indices(packed) is not None
