"""Splitting a model: same parameters, same logits, and an unsplit model that notices nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from helpers import VOCABULARY, cpu_devices, make_batch, tiny_gpt2
from transformers import GPT2LMHeadModel

from hf_ouroboros.errors import DeviceMapError, UnsupportedModelError
from hf_ouroboros.partition import Partition, compose, select, split_model, torch_device
from hf_ouroboros.partition.shadow_stage import ShadowStage

SNAKE = {
    "transformer.wte": 0,
    "transformer.wpe": 0,
    "transformer.drop": 0,
    "transformer.h.0": 0,
    **{f"transformer.h.{i}": 1 for i in (1, 2, 3, 4)},
    "transformer.ln_f": 1,
    "lm_head": 0,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def split(model: GPT2LMHeadModel, stages: int, **kwargs: Any) -> Partition:
    return split_model(model, cpu_devices(max(1, stages - 1)), num_stages=stages, **kwargs)


@torch.no_grad()
def assert_same_logits(model: GPT2LMHeadModel, partition: Partition, batch: dict[str, torch.Tensor]) -> None:
    """The stages run the same kernels on the same values, so the logits are equal to the last bit."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    assert torch.equal(compose(partition.stages, batch), model(**inputs, use_cache=False).logits)


# ---- parameters ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_parameters_are_the_models_own(tied: bool, stages: int) -> None:
    model = tiny_gpt2(tied)
    named = dict(model.named_parameters(remove_duplicate=False))
    partition = split(model, stages)
    assert partition.plan.num_stages == len(partition.stages) == stages
    for stage in partition.stages:
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            assert parameter is named[name]
    owned = [name for k in range(stages) for name in partition.owned(k)]
    assert sorted(owned) == sorted(dict(model.named_parameters()))  # each exactly once, tied or not
    assert partition.tied_names == (("transformer.wte.weight",) if tied else ())
    assert all(p is model.lm_head.weight for p in partition.tied.values())
    assert sum(row.parameters for row in partition.plan.rows) == model.num_parameters()


def test_stages_and_model_do_not_share_modes() -> None:
    model = tiny_gpt2(dropout=0.1)
    model.train()
    partition = split(model, 3)
    assert all(m.training for stage in partition.stages for m in stage.modules())
    for stage in partition.stages:
        stage.eval()
    assert all(m.training for m in model.modules())
    model.eval()
    for stage in partition.stages:
        stage.train()
    assert not any(m.training for m in model.modules())
    assert not any(m.training for stage in split(model, 3).stages for m in stage.modules())


def test_self_check_leaves_mixed_modes_alone() -> None:
    model = tiny_gpt2().train()
    model.transformer.h[1].eval()
    before = [m.training for m in model.modules()]
    split(model, 3)
    assert [m.training for m in model.modules()] == before


def test_swapped_weights_do_not_reach_the_model() -> None:
    model = tiny_gpt2()
    stage = split(model, 3).stages[1]
    mine = model.transformer.h[2].mlp.c_fc.weight
    stage.get_submodule("transformer.h.2").mlp.c_fc.weight = torch.nn.Parameter(torch.zeros_like(mine))
    assert model.transformer.h[2].mlp.c_fc.weight is mine


def test_splitting_draws_no_random_numbers() -> None:
    model = tiny_gpt2(dropout=0.1)
    before = torch.get_rng_state()
    split(model, 3)
    assert torch.equal(torch.get_rng_state(), before)


# ---- logits ----


def batches() -> dict[str, dict[str, torch.Tensor]]:
    """Everything that GPT-2 takes."""
    plain, padded = make_batch(0), make_batch(1, padded=True)
    left = {"input_ids": plain["input_ids"], "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    left["attention_mask"][0, :3] = 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2)
    return {
        "plain": plain,
        "right padded": padded,
        "left padded": left,
        "boolean mask": {**padded, "attention_mask": padded["attention_mask"].bool()},
        "position_ids": {**plain, "position_ids": torch.arange(3, 10).expand(2, 7)},
        "position_ids and mask": {**left, "position_ids": left["attention_mask"].cumsum(-1).sub(1).clamp(min=0)},
        "packed": {**plain, "position_ids": packed},
        "token_type_ids": {**padded, "token_type_ids": torch.randint(VOCABULARY, (2, 7))},
    }


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_same_logits(attention: str, tied: bool, stages: int) -> None:
    model = tiny_gpt2(tied, attn_implementation=attention, dropout=0.1).eval()
    partition = split(model, stages)
    for batch in batches().values():
        assert_same_logits(model, partition, batch)


@pytest.mark.parametrize(
    "config",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
        {"activation_function": "relu"},
        {"n_inner": 12},
    ],
    ids=str,
)
def test_same_logits_with_options_of_the_configuration(config: dict[str, Any]) -> None:
    model = tiny_gpt2(**config).eval()
    assert_same_logits(model, split(model, 4), make_batch(1, padded=True))


def test_packed_sequences_do_not_see_each_other() -> None:
    model = tiny_gpt2().eval()
    partition = split(model, 3)
    first, second = make_batch(0, time=4)["input_ids"], make_batch(1, time=3)["input_ids"]
    packed = torch.cat([first, second], 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2)
    with torch.no_grad():
        together = compose(partition.stages, {"input_ids": packed, "position_ids": positions})[:, 4:]
        alone = compose(partition.stages, {"input_ids": second})
    # Another mask takes another kernel, which sums in another order.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_half_precision() -> None:
    model = tiny_gpt2().to(torch.bfloat16).eval()
    assert_same_logits(model, split(model, 3), make_batch(0))


def test_select_takes_what_the_stages_compute_with() -> None:
    batch = {**make_batch(1, padded=True), "position_ids": None, "idx": torch.zeros(2), "note": "text"}
    stage = split(tiny_gpt2(), 3).stages[1]
    assert select(stage, batch, torch.device("cpu")).keys() == {"input_ids", "attention_mask"}


# ---- already dispatched models ----


def test_hf_device_map_is_honoured_and_removed() -> None:
    model = tiny_gpt2()
    model.hf_device_map = dict(SNAKE)
    partition = split_model(model, cpu_devices(2))
    assert not hasattr(model, "hf_device_map")
    assert [(row.layers, row.device) for row in partition.plan.rows] == [(1, "cpu:0"), (4, "cpu:1"), (0, "cpu:0")]


def test_an_explicit_map_beats_the_models() -> None:
    model = tiny_gpt2()
    model.hf_device_map = dict(SNAKE)
    assert [row.layers for row in split_model(model, cpu_devices(2), [2, 2, 1]).plan.rows] == [2, 2, 1]


def test_a_model_on_one_device_is_split_anew() -> None:
    model = tiny_gpt2()
    model.hf_device_map = {"": 0}
    assert split_model(model, cpu_devices(2)).plan.num_stages == 3


def test_hooks_are_removed() -> None:
    model = tiny_gpt2().eval()
    attach_align_device_hook_on_blocks(
        model, execution_device=dict.fromkeys(SNAKE, "cpu"), offload=dict.fromkeys(SNAKE, False)
    )
    model.hf_device_map = dict(SNAKE)
    partition = split_model(model, cpu_devices(2))
    modules = [m for root in (model, *partition.stages) for m in root.modules()]
    assert not any(hasattr(m, "_hf_hook") for m in modules)
    assert_same_logits(model, partition, make_batch(0))


@pytest.mark.parametrize("dispatched", [True, False])
def test_forward_left_by_hooks_is_the_stages_own(dispatched: bool) -> None:
    """accelerate leaves `module.forward`, bound to the original module, in the instance when it removes a hook."""
    model = tiny_gpt2().eval()
    attach_align_device_hook_on_blocks(
        model, execution_device=dict.fromkeys(SNAKE, "cpu"), offload=dict.fromkeys(SNAKE, False)
    )
    if dispatched:
        model.hf_device_map = dict(SNAKE)
    stage = split_model(model, cpu_devices(2), [2, 2, 1]).stages[1]
    zeros = {name: torch.zeros_like(p) for name, p in stage.named_parameters()}
    hidden = torch.randn(1, 3, 8)
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    found = torch.func.functional_call(stage, zeros, (batch, {"hidden": hidden}))
    assert torch.equal(found["hidden"], hidden)  # blocks of zeros are residual connections alone


def test_replaced_forward_is_refused() -> None:
    model = tiny_gpt2()
    model.transformer.h[1].mlp.forward = functools.partial(
        type(model.transformer.h[1].mlp).forward, model.transformer.h[1].mlp
    )
    with pytest.raises(
        UnsupportedModelError, match="forward of a GPT2MLP of this model was replaced by functools.part"
    ):
        split(model, 3)


def test_offloaded_model_is_refused() -> None:
    model = tiny_gpt2()
    model.hf_device_map = {**SNAKE, "transformer.h.4": "disk"}
    with pytest.raises(DeviceMapError, match=r"device_map\['transformer.h.4'\]='disk': offloading"):
        split_model(model, cpu_devices(2))
    with pytest.raises(DeviceMapError, match="meta device"):
        split_model(tiny_gpt2().to("meta"), cpu_devices(2))


# ---- refusals ----


def test_what_is_no_row_of_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear can't be split into stages: it is no Transformers model"):
        split_model(torch.nn.Linear(2, 2), cpu_devices(2))


def test_cross_attention() -> None:
    """Encoder states are a part of the batch, for every stage."""
    model = tiny_gpt2(add_cross_attention=True).eval()
    batch = {**make_batch(0), "encoder_hidden_states": torch.randn(2, 3, 8)}
    assert_same_logits(model, split(model, 3), batch)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions", "output_router_logits"])
def test_what_is_of_all_layers_is_refused(option: str) -> None:
    model = tiny_gpt2(attn_implementation="eager", **{option: True})
    with pytest.raises(UnsupportedModelError, match=rf"config\.{option}=True .*set it to False"):
        split(model, 3)
    assert split(model, 1).plan.num_stages == 1


def test_gradient_checkpointing_is_refused() -> None:
    model = tiny_gpt2()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match=r"gradient_checkpointing_disable\(\).*recompute=True"):
        split(model, 2)


def test_wrong_stages_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ShadowStage.forward

    def forgets_the_mask(self: Any, batch: Any, *args: Any) -> Any:
        return forward(self, {"input_ids": batch["input_ids"]}, *args)

    monkeypatch.setattr(ShadowStage, "forward", forgets_the_mask)
    model = tiny_gpt2(attn_implementation="eager").train()
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel don't compute what the model computes"):
        split(model, 3)
    assert model.training
    split(model, 3, check=False)


def test_nan_logits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ShadowStage.forward

    def nan(self: Any, batch: Any, *args: Any) -> Any:
        output = forward(self, batch, *args)
        return output * float("nan") if self.is_last else output

    monkeypatch.setattr(ShadowStage, "forward", nan)
    with pytest.raises(UnsupportedModelError, match="differ by nan"):
        split(tiny_gpt2(), 3)


# ---- the plan ----


def test_plan() -> None:
    plan = split_model(tiny_gpt2(), cpu_devices(2), [1, 3, 1]).plan
    assert plan.devices == ("cpu:0", "cpu:1") and plan.placement == (0, 1, 0) and plan.tied
    assert plan.delays == (2, 1, 0)
    assert [row.layers for row in plan.rows] == [1, 3, 1]
    assert plan.rows[1].modules == ("transformer.h.1", "transformer.h.2", "transformer.h.3")
    assert plan.parameters_on("cpu:0") == plan.rows[0].parameters + plan.rows[2].parameters
    assert plan.bytes_on("cpu:1") == 4 * plan.rows[1].parameters
    assert split_model(tiny_gpt2(), cpu_devices(2), [1, 3, 1], delayed=False).plan.delays == (0, 0, 0)


def test_plan_prints_as_a_table() -> None:
    lines = str(split_model(tiny_gpt2(), cpu_devices(2), [1, 3, 1]).plan).splitlines()
    assert lines[0].split() == ["stage", "device", "delay", "layers", "parameters", "MiB", "modules"]
    assert lines[1].split() == ["0", "cpu:0", "2", "1", "1,152", "0.0", *"transformer.wte .. transformer.h.0".split()]
    assert lines[2].split()[:5] == ["1", "cpu:1", "1", "3", "2,616"]
    assert lines[3].endswith("transformer.h.4 .. lm_head")
    assert lines[4] == "parameters per device: cpu:0: 2,040 (0.0 MiB), cpu:1: 2,616 (0.0 MiB)"
    assert lines[0].index("modules") == lines[3].index("transformer.h.4")


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_device_map_round_trips(stages: int) -> None:
    devices = cpu_devices(max(1, stages))
    plan = split_model(tiny_gpt2(tied=False), devices, num_stages=stages).plan
    assert split_model(tiny_gpt2(tied=False), devices, plan.device_map()).plan == plan


def test_snake_round_trips() -> None:
    plan = split_model(tiny_gpt2(), cpu_devices(3)).plan
    assert plan.num_stages == 4
    assert split_model(tiny_gpt2(), cpu_devices(3), plan.device_map()).plan == plan


def test_unused_devices_are_left_out() -> None:
    mapping = {name: 3 if device == 1 else 0 for name, device in SNAKE.items()}
    plan = split_model(tiny_gpt2(), cpu_devices(4), mapping).plan
    assert plan.devices == ("cpu:0", "cpu:3") and plan.placement == (0, 1, 0)


def test_colocated_stages_keep_the_split_of_all_devices() -> None:
    apart = split_model(tiny_gpt2(), cpu_devices(3)).plan
    together = split_model(tiny_gpt2(), cpu_devices(3), colocate=True).plan
    assert [row.modules for row in together.rows] == [row.modules for row in apart.rows]
    assert together.devices == ("cpu:0",) and together.placement == (0,) * 4


def test_worker_names_on_one_cpu() -> None:
    assert torch_device("cpu:3") == torch.device("cpu")
    assert torch_device("cuda:1") == torch.device("cuda", 1)


def test_unknown_names_inside_a_layer_are_refused() -> None:
    with pytest.raises(DeviceMapError, match="transformer.h.1.bogus"):
        split_model(tiny_gpt2(), cpu_devices(2), {"": 0, "transformer.h.1.bogus": 0})
