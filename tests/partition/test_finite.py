"""Weights that are not finite are named, instead of blaming the architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_helpers import ouroboros, tiny_model

from hf_ouroboros import UnsupportedModelError
from hf_ouroboros.partition.finite import check_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_named(tmp_path: Path, value: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4:6] = value
    with pytest.raises(
        UnsupportedModelError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight .* has 2 NaN or infinite elements"
    ):
        ouroboros(tmp_path, {"model": model})


def test_finite_weights_whose_sum_is_not() -> None:
    model = torch.nn.Linear(100, 100).half()
    torch.nn.init.constant_(model.weight, 60000.0)
    check_finite(model)
    check_finite(torch.nn.Linear(2, 2, device="meta"))
