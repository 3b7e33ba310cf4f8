"""Agreement: at which points the processes of a run compare what they know, and what they compare there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainingArguments

from ..arguments import OuroborosArguments
from ..engine.settings import EngineSettings
from ..engine.state import RunState
from ..processes import run_digest
from ..processes.meeting import present
from .interfaces import SplitTrainer


class AgreementHooks(SplitTrainer):
    """Has all processes compare options, model, split, optimizer and data before anything depends on them.

    They meet when the trainer is made, twice (options; then the model, the plan and the accelerator), at `train()`, at
    every evaluation and at `save_model()`. In a run of a single process nothing happens.
    """

    _resumed_state: RunState | None
    _train_data: Mapping[str, Any] | None = None
    _beside: tuple[TrainingArguments, OuroborosArguments] | None = None

    @property
    def options(self) -> OuroborosArguments:
        """All options: the script's own arguments, which `args` is, and where they have none, the defaults of this package."""
        if self._beside is None or self._beside[0] is not self.args:
            self._beside = self.args, OuroborosArguments.from_training_arguments(self.args)
        return self._beside[1]

    def _agree(self, where: str, args: TrainingArguments | None = None, **sections: Mapping[str, Any]) -> None:
        """Compares what the processes know; see `processes.meeting.Meeting.agree`."""
        args = self.args if args is None else args
        meeting = present() if args.world_size > 1 else None
        if meeting is not None:
            meeting.agree(where, sections, args.ddp_timeout_delta, self._check_others)

    @property
    def _check_others(self) -> Callable[[], None]:
        """Raises if another process is known to have failed, from the moment on when somebody watches over them."""
        watch = getattr(self, "_watch", None)
        return (lambda: None) if watch is None else watch.check

    def _agree_on_options(self, args: TrainingArguments, **given: Any) -> None:
        """When processes meet: software, options, and which functions and callbacks a script has given."""
        if args.world_size > 1:
            own = {name: run_digest.plain(value) for name, value in given.items() if name != "callbacks"}
            own |= run_digest.stopping(
                [c for c in given.get("callbacks") or () if isinstance(c, EarlyStoppingCallback)]
            )
            self._agree(
                "the trainer's creation",
                args,
                software=run_digest.software(),
                options=run_digest.options(args),
                arguments=own,
            )

    def _agree_on_model(self, model: nn.Module, args: TrainingArguments) -> None:
        """Before the model is split."""
        if args.world_size > 1:
            self._agree("splitting the model", args, model=run_digest.model(model), weights=run_digest.weights(model))

    def _agree_on_plan(self, args: TrainingArguments) -> None:
        """After it, before anything travels between stages."""
        if args.world_size > 1:
            self._agree("connecting the stages", args, plan=run_digest.plan(self._partition.plan.rows))

    def _agree_on_training(self, settings: EngineSettings, compensation: str) -> None:
        """At `train()`: everything that may have been changed since, and what is known only now."""
        if self._grid is None:
            return
        resumed = self._resumed_state
        optimizer, scheduler = self._face.optimizer, self.lr_scheduler
        # Hosts may have different numbers of cores.
        names = [field.name for field in fields(settings) if field.name not in ("threads", "compensations")]
        self._agree(
            "train()",
            options=run_digest.options(self.options),
            settings={name: run_digest.plain(getattr(settings, name)) for name in names}
            | {"compensation": compensation},
            model=run_digest.model(self.model),
            weights=run_digest.weights(self.model),
            plan=run_digest.plan(self._partition.plan.rows),
            optimizer=run_digest.optimizer(optimizer, self.model),
            scheduler=run_digest.scheduler_facts(scheduler),
            data=self._train_data or {},
            steps={
                "global step": self.state.global_step,
                "max_steps": self.state.max_steps,
                "num_train_epochs": self.state.num_train_epochs,
                "checkpoint": None if resumed is None else f"tick {resumed.tick}, update {resumed.update}",
                "seed of the checkpoint": None if resumed is None else resumed.seed,
            },
        )

    def _agree_on_evaluation(self, loader: DataLoader, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self._grid is not None:
            self._agree(
                "an evaluation",
                call={"arguments of the evaluation": [run_digest.plain(args), run_digest.plain(kwargs)]},
                options=run_digest.options(self.options),
                data=run_digest.data(loader, loader.dataset, loader.collate_fn),
            )

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer; what it reads, and in which order, is compared when training begins."""
        loader = super().get_train_dataloader()
        if self._grid is not None:
            self._train_data = run_digest.data(loader, self.train_dataset, self.data_collator)
        return loader
