"""MuonAdamW: torch's two optimizers on their parameters, and which parameters those are."""

from __future__ import annotations

import pytest
import torch
from helpers import clone, cpu_devices, differences, make_optimizer, tiny_gpt2
from transformers import Trainer, TrainingArguments

from hf_ouroboros.optim import orthogonal
from hf_ouroboros.optim.basis_rotation import BasisRotation
from hf_ouroboros.optim.matrices import algorithm_of, hidden_matrices
from hf_ouroboros.optim.muon import DeviceMuon, Muon, MuonAdamW
from hf_ouroboros.partition import split_model


def set_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_is_torchs_muon_where_both_compute_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, adjust_lr_fn: str, nesterov: bool
) -> None:
    monkeypatch.setattr(orthogonal, "PRECISION", {"cpu": torch.bfloat16})
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((6, 8), (8, 6), (5, 5), (4, 16), (16, 4))]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    given = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    optimizers = DeviceMuon(ours, **given), torch.optim.Muon(theirs, **given)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, ours, theirs))


def test_is_muon_and_torchs_adamw() -> None:
    model, expected = tiny_gpt2(), tiny_gpt2()
    optimizer = make_optimizer("muon", model)
    named = dict(expected.named_parameters())
    matrices = [p for n, p in named.items() if p.dim() == 2 and ".h." in n]
    rest = [p for n, p in named.items() if p.dim() == 2 and ".h." not in n]
    biases = [p for p in named.values() if p.dim() < 2]
    muon = DeviceMuon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": rest, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=1e-2)
    assert len(matrices) == 20
    for step in range(3):
        for twin in (model, expected):
            set_gradients(twin, step)
        optimizer.step()
        muon.step()
        adamw.step()
    assert differences(expected.state_dict(), model.state_dict()) == []


def test_parameters_without_gradient_are_left_alone() -> None:
    model = tiny_gpt2()
    optimizer = make_optimizer("muon", model)
    set_gradients(model, 0)
    for parameter in model.transformer.h[0].parameters():
        parameter.grad = None
    before = clone(model.transformer.h[0].state_dict())
    optimizer.step()
    assert differences(before, model.transformer.h[0].state_dict()) == []
    assert not any(p in optimizer.state for p in model.transformer.h[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["muon", "measured muon"])
def test_schedulers_and_state_dict(name: str, dtype: torch.dtype) -> None:
    """Groups, learning rates and state survive the round trip; a scheduler moves all groups."""
    model, other = tiny_gpt2().to(dtype), tiny_gpt2().to(dtype)
    optimizer, loaded = make_optimizer(name, model), make_optimizer(name, other)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
        scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.0025}
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(clone(optimizer.state_dict()))
    for twin in (model, other):
        set_gradients(twin, 9)
    optimizer.step()
    loaded.step()
    assert differences(model.state_dict(), other.state_dict()) == []
    assert differences(optimizer.state_dict(), loaded.state_dict()) == []


@pytest.mark.parametrize("choice", [Muon(), BasisRotation()])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_adamw_is_that_of_the_run(choice: Muon | BasisRotation, optim: str) -> None:
    args = TrainingArguments(
        report_to="none", use_cpu=True, optim=optim, adam_beta2=0.9, adam_epsilon=1e-6, learning_rate=1e-2
    )
    runs = []
    for kind, options in (choice.optimizer(args, []), Trainer.get_optimizer_cls_and_kwargs(args)):
        model = tiny_gpt2()
        optimizer = kind([{"params": list(model.parameters()), "weight_decay": 0.1}], **options)
        for step in range(2):
            set_gradients(model, step)
            optimizer.step()
        runs.append((model.state_dict(), bool(optimizer.param_groups[0]["fused"])))
    assert differences(runs[0][0], runs[1][0]) == []
    assert runs[0][1] == runs[1][1] == (optim == "adamw_torch_fused")


def test_a_checkpoint_goes_on_with_the_kernels_that_it_began_with() -> None:
    """Those of earlier versions are of an AdamW that is not fused, which rounds in another way."""
    models = [tiny_gpt2() for _ in range(3)]
    plain, fused, resumed = (
        MuonAdamW(m.parameters(), fused=kernel) for m, kernel in zip(models, (None, True, True), strict=True)
    )
    for model, optimizer in zip(models[:2], (plain, fused), strict=True):
        set_gradients(model, 0)
        optimizer.step()
    models[2].load_state_dict(models[0].state_dict())
    resumed.load_state_dict(clone(plain.state_dict()))
    for step in range(1, 4):
        for model, optimizer in zip(models, (plain, fused, resumed), strict=True):
            set_gradients(model, step)
            optimizer.step()
    assert differences(models[0].state_dict(), models[2].state_dict()) == []
    assert differences(models[0].state_dict(), models[1].state_dict()) != []


def test_groups_are_split_and_keep_their_decay() -> None:
    model = tiny_gpt2()
    optimizer = make_optimizer("muon", model)
    assert [(algorithm_of(g), g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        ("muon", 0.1, 20),
        ("adamw", 0.1, 2),
        ("adamw", 0.0, 42),
    ]
    frozen = [p for p in model.parameters() if p.dim() > 1]
    assert {algorithm_of(g) for g in MuonAdamW(frozen).param_groups} == {"adamw"}


def test_hidden_matrices_are_those_inside_layers() -> None:
    model = tiny_gpt2(tied=False)
    partition = split_model(model, cpu_devices(3), num_stages=3, check=False)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = [n for n in names.values() if "bias" not in n and "ln" not in n]
    found = {names[id(p)] for p in hidden_matrices(partition.stages, decayed)}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found == {f"transformer.h.{i}.{part}.weight" for i in range(5) for part in parts}
    assert len(hidden_matrices(partition.stages, list(found)[:3])) == 3


def test_a_step_hook_is_called_once_a_step() -> None:
    model = tiny_gpt2()
    optimizer = make_optimizer("muon", model)
    seen = []
    optimizer.register_step_pre_hook(lambda found, *_: seen.append(found))
    set_gradients(model, 0)
    optimizer.step()
    assert seen == [optimizer]
