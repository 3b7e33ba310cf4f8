"""A run of OuroborosTrainer over several processes, and its result put together as if it were one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from rig import in_processes
from stream_helpers import tiny_xl
from stream_trainer_helpers import OPTIONS as STREAM_OPTIONS
from stream_trainer_helpers import StreamRows
from trainer_helpers import Rows, complete_optimizer, copied, ouroboros, tiny_model

from hf_ouroboros import OuroborosTrainer


def held(trainer: OuroborosTrainer) -> dict[str, Any]:
    """Weights and optimizer state in this process, and what it has logged."""
    optimizer = complete_optimizer(trainer)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return {
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.is_meta},
        "optimizer": {names[id(p)]: copied(state) for p, state in optimizer.state.items()},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "scheduler": trainer.lr_scheduler.state_dict(),
        "log": [without_times(entry) for entry in trainer.state.log_history],
        "flos": trainer.state.total_flos,
        "tokens": trainer.state.num_input_tokens_seen,
        "step": trainer.state.global_step,
    }


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics that do not depend on the clock."""
    return {k: v for k, v in metrics.items() if not k.endswith(("_runtime", "_per_second"))}


def train_part(rank: int, folder: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One process's part in some runs, one after the other: {options, model, trainer, resume}."""
    results = []
    for run in runs:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = made(folder, run)
            trainer.train(resume_from_checkpoint=run.get("resume"))
        results.append(held(trainer) | after(trainer, run))
    return results


def after(trainer: OuroborosTrainer, run: dict[str, Any]) -> dict[str, Any]:
    """What a run is asked to do when it is trained."""
    found: dict[str, Any] = {"best": trainer.state.best_model_checkpoint}
    if "predict" in run:
        prediction = trainer.predict(Rows(run["predict"], seed=2))
        found["predictions"], found["labels"] = prediction.predictions, prediction.label_ids
        found["metrics"] = without_times(prediction.metrics)
    if run.get("save"):
        trainer.save_model()
    return found


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Predicted tokens instead of logits."""
    return logits.argmax(-1)


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of target tokens that were predicted."""
    targets = prediction.label_ids[:, 1:]
    hits = prediction.predictions[:, :-1][targets != -100] == targets[targets != -100]
    return {"accuracy": float(hits.mean()), "targets": int(hits.size)}


def made(folder: str, run: dict[str, Any]) -> OuroborosTrainer:
    """The trainer of a run; `stream` for a Transformer-XL, `sgd` for an optimizer that the script makes from the model."""
    if "stream" in run:
        model = tiny_xl(**run["stream"])
        run = {**run, "options": STREAM_OPTIONS | run.get("options", {})}
        rows = {"train_dataset": StreamRows(), "eval_dataset": StreamRows(seed=1, segments=4, tail=3)}
        given = {"model": model} | rows | run.get("trainer", {})
    else:
        given = {"model": tiny_model(**run.get("model", {}))} | run.get("trainer", {})
    if run.get("sgd"):
        given["optimizers"] = torch.optim.SGD(given["model"].parameters(), lr=0.05, momentum=0.9), None
    if "model_init" in given:
        del given["model"]
    return ouroboros(Path(folder) / run.get("name", "out"), given, **run.get("options", {}))


def whole(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The processes' results as one; all must agree on what they all know, replicas on their weights."""
    merged: dict[str, Any] = {**parts[0], "weights": {}, "optimizer": {}}
    for part in parts:
        for key in ("log", "flos", "tokens", "step", "scheduler", "groups"):
            assert part[key] == parts[0][key], (key, part[key], parts[0][key])
        for key in ("weights", "optimizer"):
            for name, value in part[key].items():
                if torch.is_tensor(value) and name in merged[key]:
                    assert torch.equal(merged[key][name], value), name
                merged[key][name] = value
    return merged


def run_all(folder: Path, processes: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of runs over processes."""
    parts = in_processes(processes, train_part, str(folder), runs)
    return [whole([part[i] for part in parts]) for i in range(len(runs))]


def run_here(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The same in this process, with threads or as the reference."""
    trainer = made(str(folder), run)
    trainer.train(resume_from_checkpoint=run.get("resume"))
    return held(trainer) | after(trainer, run)


def fresh_model() -> Any:
    """What a script gives as model_init."""
    return tiny_model()


class Stream(torch.utils.data.IterableDataset):
    """Rows one after the other, of unknown number."""

    def __init__(self, count: int):
        self.rows = Rows(count)

    def __iter__(self) -> Any:
        return (self.rows[i] for i in range(len(self.rows)))


def sum_of_losses(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss function of the user's."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else labels.numel())


def large_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """One whose gradients overflow in float16 with the first scale."""
    return 8 * sum_of_losses(outputs, labels, num_items_in_batch)
