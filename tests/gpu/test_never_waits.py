"""Between two logs neither a worker nor the main thread waits for an accelerator; and what a timeline shows of one."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import KIND, run, workers
from trainer_helpers import Rows
from transformers import TrainerCallback


class Watched(TrainerCallback):
    """Lets torch report every wait between two updates."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(KIND != "cuda", reason="only CUDA reports that it is waited for")
@pytest.mark.parametrize("masks", [False, True], ids=["without masks", "with masks"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("compensation", ["none", "muon+weight_prediction+error_feedback"])
def test_nothing_waits_between_logs(tmp_path: Path, model: str, masks: bool, compensation: str) -> None:
    from hf_ouroboros import OuroborosTrainer

    class WithCallback(OuroborosTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.add_callback(Watched(6, 12))

    torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(
                tmp_path,
                model,
                rows=Rows(160, masks=masks),
                num_train_epochs=1,
                logging_steps=16,
                cls=WithCallback,
                delay_compensation=compensation,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message))
    assert not waits, waits


def test_timeline_is_of_the_kernels(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", "llama", timeline=str(tmp_path / "timeline.json"))
    events = trainer.timeline.events
    assert {event.kind for event in events} >= {"forward", "backward", "step"}
    assert {event.device for event in events} == {0, 1, 2}
    for device in range(3):
        own = [event for event in events if event.device == device]
        assert all(a.end <= b.start + 1e-4 for a, b in zip(own, own[1:], strict=False))
    assert trainer.stage_plan.devices == tuple(workers(3)) or list(trainer.stage_plan.devices) == workers(3)
