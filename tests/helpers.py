"""What the tests of partition, engine and reference share: a tiny GPT-2, its batches, and a complete run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from transformers import Adafactor, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_ouroboros.engine.core import Engine
from hf_ouroboros.engine.losses import LossFunction
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.engine.state import RunState
from hf_ouroboros.optim import choose
from hf_ouroboros.optim.basis_rotation import RotatedAdamW
from hf_ouroboros.optim.muon import MuonAdamW
from hf_ouroboros.partition import Partition, split_model
from hf_ouroboros.reference import Reference
from hf_ouroboros.reference_now import reference_of

VOCABULARY = 19
Batch = dict[str, torch.Tensor]


def tiny_gpt2(tied: bool = True, layers: int = 5, dropout: float = 0.0, **config: Any) -> GPT2LMHeadModel:
    """A GPT-2 of a few thousand parameters, always with the same weights."""
    torch.manual_seed(0)
    values: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=layers,
        n_head=2,
        n_positions=16,
        tie_word_embeddings=tied,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(GPT2Config(**{**values, **config}))


def make_batch(seed: int, padded: bool = False, rows: int = 2, time: int = 7) -> Batch:
    """A micro-batch of random tokens; with `padded`, the second row is right-padded."""
    ids = torch.randint(VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))
    if not padded:
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[1, 3 + seed % (time - 3) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def count_targets(batches: Iterable[Mapping[str, torch.Tensor]]) -> int:
    """Tokens of an update that count in the loss."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def causal_loss(logits: torch.Tensor, batch: Mapping[str, Any], targets: int | None) -> torch.Tensor:
    """Next-token loss; the sum over the micro-batch divided by the targets of its update."""
    logits, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    if targets is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / targets


def cpu_devices(count: int) -> list[str]:
    """["cpu:0", "cpu:1", ...]."""
    return [f"cpu:{i}" for i in range(count)]


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """One of the optimizers of the tests, with two parameter groups as the Trainer makes them."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    if name == "plain sgd":
        return torch.optim.SGD(groups, lr=0.05)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    if name == "nadam":
        return torch.optim.NAdam(groups, lr=1e-2, decoupled_weight_decay=True)
    if name == "nesterov":
        return torch.optim.NAdam(groups, lr=1e-2, betas=(0.99, 0.999), decoupled_weight_decay=True)
    if name == "muon":
        return MuonAdamW(groups, matrices, lr=1e-2)
    if name == "measured muon":
        return MuonAdamW(groups, matrices, lr=1e-2, betas=(0.9, 0.95), adjust_lr_fn="measure_rms_adamw")
    if name == "rotated":
        return RotatedAdamW(groups, matrices, lr=1e-2, refresh=2)
    if name == "adafactor":
        return Adafactor(groups, lr=1e-2, relative_step=False, scale_parameter=True)
    raise ValueError(name)


@dataclass(frozen=True)
class Case:
    """A run, but for the schedule that executes it.

    Args:
        stages: K.
        updates: ticks of each update.
        devices: how many workers share the stages; None for K-1 if tied, else K.
        counts: layers of each stage; None for a balanced split.
        compensation: what is done about the delay besides the choice of the optimizer.
        compensation_args: its options.
        weights: of late backwards.
        scale: of losses at first, in float16; None for float32.
        interval: updates without an overflow after which it is doubled.
        placement: device of every stage, with `counts`; None for the usual one.
    """

    stages: int = 3
    updates: tuple[int, ...] = (1,) * 6
    tied: bool = True
    dropout: float = 0.0
    optimizer: str = "adamw"
    clip: float | None = None
    scope: str = "stage"
    warmup: int = 0
    recompute: bool = False
    tied_gradient: str = "joint"
    padded: bool = False
    devices: int | None = None
    layers: int = 5
    counts: tuple[int, ...] | None = None
    compensation: str = "none"
    compensation_args: str = ""
    weights: str = "then"
    scale: float | None = None
    interval: int = 2000
    placement: tuple[int, ...] | None = None

    def model(self) -> PreTrainedModel:
        """The model before it is split."""
        return tiny_gpt2(self.tied, self.layers, self.dropout)

    def loss(self, replicas: int = 1) -> LossFunction:
        """What the last stage computes; among replicas, whose mean it becomes, so much more."""
        return lambda logits, batch, targets: causal_loss(logits, batch, targets) * replicas

    def targets(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> int:
        """Tokens of an update that count in the loss."""
        return count_targets(batches)

    def partition(self, model: PreTrainedModel, colocate: bool = False) -> Partition:
        """The model split as the case says."""
        count = self.devices or max(1, self.stages - self.tied)
        counts: Any = self.counts or (None if self.stages <= self.layers else (*[1] * self.layers, 0))
        if self.placement is not None and self.counts is not None:
            counts, count = list(zip(self.counts, self.placement, strict=True)), max(self.placement) + 1
        return split_model(
            model,
            cpu_devices(count),
            counts or "auto",
            num_stages=self.stages,
            colocate=colocate,
            check=False,
        )

    def batches(self, update: int) -> list[Batch]:
        """The micro-batches of an update."""
        first = sum(self.updates[:update])
        return [make_batch(first + i, self.padded) for i in range(self.updates[update])]


class Run:
    """A case under a schedule; the learning rate changes with every update.

    Args:
        case: what to compute.
        schedule: how. The reference computes what 1f1b does if all its updates are warm-up: "reference 1f1b".
        prepare: done to the model before it is split.
    """

    def __init__(self, case: Case, schedule: str, prepare: Callable[[GPT2LMHeadModel], None] | None = None):
        warmup = 10**6 if schedule.startswith("reference ") else case.warmup
        schedule, *rule = schedule.split()
        self._at_once = schedule == "reference"
        if rule and case.scale is not None:  # what is done about overflows goes by the schedule
            schedule = rule[0]
        self.case = case
        self.model = case.model()
        if prepare is not None:
            prepare(self.model)
        partition = case.partition(self.model, colocate=self._at_once)
        self.optimizer = make_optimizer(case.optimizer, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda u: 1 / (1 + 0.1 * u))
        scaling: dict[str, Any] = {}
        if case.scale is not None:
            scaling = {"autocast_dtype": torch.float16, "initial_loss_scale": case.scale}
            scaling["loss_scale_interval"] = case.interval
        settings = EngineSettings(
            schedule=schedule,
            tied_gradient=case.tied_gradient,
            max_grad_norm=case.clip,
            clip_scope=case.scope,
            delay_warmup_steps=warmup,
            seed=3,
            recompute=case.recompute,
            threads=1,
            micro_batches=max(case.updates),
            compensations=choose(case.compensation, case.compensation_args).compensations,
            weights=case.weights,
            **scaling,
        )
        self.engine = self.make_engine(partition, settings)
        self.ticks: list[int] = []
        self.losses: list[float] = []
        self.grad_norms: dict[int, float | str | None] = {}

    def make_engine(self, partition: Partition, settings: EngineSettings) -> Engine | Reference:
        """The engine that the schedule asks for."""
        kind = reference_of(settings) if self._at_once else Engine
        return kind(partition, self.optimizer, self.case.loss(), settings)

    def update(self, u: int, look: str | None = None) -> None:
        """One update; `look` says what happens after its first tick or, for "norm" and "state", after it."""
        batches = self.case.batches(u)
        targets = self.case.targets(batches)
        for i, batch in enumerate(batches):
            self.engine.submit(self.batch(batch), targets)
            if i == 0 and look in ("synchronize", "settle"):
                getattr(self.engine, look)()
                self.model.eval()
                with torch.no_grad():
                    self.model(batch["input_ids"])
        self.engine.step()
        self.optimizer._opt_called = True  # the stages' optimizers step, but the scheduler watches this one
        self.scheduler.step()
        if look == "state":
            self.engine.state_dict()
        if look in ("norm", "state"):
            self.engine.synchronize()
            self.grad_norms[u] = self._norm()
        self.hear()

    def batch(self, batch: Batch) -> Batch:
        """What of a micro-batch this run gets."""
        return batch

    def hear(self) -> None:
        """Takes the losses that are there."""
        for finished in self.engine.collect():
            self.ticks.append(finished.tick)
            self.losses.append(float(finished.loss))

    def _norm(self) -> float | str | None:
        """The gradient norm; what is no number as a word, so that it equals itself."""
        norm = self.engine.grad_norm
        return norm if norm is None or norm == norm else "nan"

    def finish(self) -> Run:
        """Waits for everything and stops the workers."""
        self.engine.synchronize()
        self.hear()
        self.grad_norms[-1] = self._norm()
        self.engine.close()
        return self

    def train(self, looks: Mapping[int, str] | None = None, updates: Iterable[int] | None = None) -> Run:
        """All updates, or those named, and the end of the run."""
        try:
            for u in range(len(self.case.updates)) if updates is None else updates:
                self.update(u, (looks or {}).get(u))
            return self.finish()
        finally:
            self.engine.close()

    def checkpoint(self) -> dict[str, Any]:
        """All of the run, as it would be written to disk."""
        state: RunState = self.engine.state_dict()
        return {
            "meta": json.dumps(state.meta()),
            "tensors": save({k: v.contiguous() for k, v in state.tensors().items()}),
            "weights": {k: v.clone() for k, v in self.model.state_dict().items()},
            "optimizer": clone(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
        }

    def resume(self, checkpoint: dict[str, Any]) -> Run:
        """Takes up a run where its checkpoint left it."""
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(checkpoint["weights"][name])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.optimizer.load_state_dict(clone(checkpoint["optimizer"]))
        self.engine.attach(self.optimizer)
        state = RunState.from_parts(json.loads(checkpoint["meta"]), load(checkpoint["tensors"]))
        self.engine.load_state_dict(state)
        return self


def oracle(case: Case, rule: str = "reference", looks: Mapping[int, str] | None = None) -> Run:
    """The reference's run of a case, computed once for all that is compared with it, which leaves it as it is."""
    return _oracle(case, rule, tuple((looks or {}).items()))


@functools.cache
def _oracle(case: Case, rule: str, looks: tuple[tuple[int, str], ...]) -> Run:
    return Run(case, rule).train(dict(looks))


def clone(value: Any) -> Any:
    """A deep copy of nested dicts and lists of tensors."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    return [clone(v) for v in value] if isinstance(value, (list, tuple)) else value


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """Where two nested structures differ, to the last bit."""
    if torch.is_tensor(expected) and torch.is_tensor(found):
        return [] if torch.equal(expected, found) else [path]
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if expected.keys() != found.keys():
            return [f"{path}: keys {set(expected) ^ set(found)}"]
        return [d for k in expected for d in differences(expected[k], found[k], f"{path}/{k}")]
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        if len(expected) != len(found):
            return [f"{path}: {len(expected)} and {len(found)} items"]
        pairs = enumerate(zip(expected, found, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if expected == found else [f"{path}: {expected} and {found}"]


def assert_same_run(expected: Run, found: Run) -> None:
    """Weights, optimizer state, losses and gradient norms are equal to the last bit."""
    assert differences(expected.model.state_dict(), found.model.state_dict()) == []
    assert differences(expected.optimizer.state_dict()["state"], found.optimizer.state_dict()["state"]) == []
    assert found.ticks == expected.ticks
    assert found.losses == expected.losses
    assert found.grad_norms == expected.grad_norms
