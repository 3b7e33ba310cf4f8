"""What a run writes besides the model: the plan, the timeline and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from trainer_helpers import ouroboros, split_options, tiny_model, trained

from hf_ouroboros import OuroborosTrainer
from hf_ouroboros.errors import OutputFileError


def test_stage_plan(tmp_path: Path) -> None:
    plan = ouroboros(tmp_path).stage_plan
    assert (plan.num_stages, plan.devices, plan.delays) == (3, ("cpu:0", "cpu:1"), (2, 1, 0))
    assert plan.placement == (0, 1, 0)
    assert sum(row.parameters for row in plan.rows) == tiny_model().num_parameters()
    header, *rows, total = str(plan).splitlines()
    assert header.split()[:4] == ["stage", "device", "delay", "layers"]
    assert [row.split()[:3] for row in rows] == [["0", "cpu:0", "2"], ["1", "cpu:1", "1"], ["2", "cpu:0", "0"]]
    assert total.startswith("parameters per device: cpu:0: ")


def test_stage_plan_of_other_schedules(tmp_path: Path) -> None:
    assert ouroboros(tmp_path, schedule="1f1b").stage_plan.delays == (0, 0, 0)
    reference = ouroboros(tmp_path, schedule="reference").stage_plan
    assert (reference.delays, reference.devices) == ((2, 1, 0), ("cpu:0",))
    untied = ouroboros(tmp_path, {"model": tiny_model(tied=False)}).stage_plan
    assert (untied.num_stages, untied.placement) == (2, (0, 1))


# ---- timeline ----


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep", "1f1b"])
def test_timeline(tmp_path: Path, schedule: str) -> None:
    trainer = trained(tmp_path, schedule=schedule, timeline=str(tmp_path / "sub" / "trace.json"))
    assert (tmp_path / "sub" / "trace.png").read_bytes().startswith(b"\x89PNG")
    trace = json.loads((tmp_path / "sub" / "trace.json").read_text())
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    names = {event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    assert names == {"cpu:0", "cpu:1"}
    done = {(e.stage, e.kind, e.index) for e in trainer.timeline.events if e.kind != "wait"}
    assert len(done) == len([e for e in trainer.timeline.events if e.kind != "wait"]), "nothing is done twice"
    assert {d for d in done if d[1] == "forward"} == {(k, "forward", t) for k in range(3) for t in range(10)}
    pending = {0: 2, 1: 1, 2: 0} if schedule != "1f1b" else {0: 0, 1: 0, 2: 0}
    backwards = {(k, "backward", t) for k in range(3) for t in range(10 - pending[k])}
    assert {d for d in done if d[1] == "backward"} == backwards
    assert {d for d in done if d[1] == "step"} == {(k, "step", u) for k in range(3) for u in range(6)}
    shown = [event for event in events if event.get("ph") == "X"]
    assert len(shown) == len(trainer.timeline.events)


def test_timeline_with_saving(tmp_path: Path) -> None:
    trainer = trained(tmp_path, save_strategy="steps", save_steps=3, timeline=str(tmp_path / "trace"))
    settled = {(e.stage, e.index) for e in trainer.timeline.events if e.kind == "settle"}
    assert settled == {(0, 3), (0, 4), (1, 4), (0, 8), (0, 9), (1, 9)}
    assert list(tmp_path.glob("trace*.png")) and list(tmp_path.glob("trace*.json"))


def test_no_timeline(tmp_path: Path) -> None:
    assert trained(tmp_path).timeline is None
    assert list(tmp_path.iterdir()) == []


def test_timeline_of_a_failed_run(tmp_path: Path) -> None:
    """What was recorded up to the failure is written: it is when one wants to look."""

    def loss(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no")

    path = tmp_path / "trace.json"
    with pytest.raises(Exception, match="no"):
        trained(tmp_path, {"compute_loss_func": loss}, timeline=str(path))
    assert path.is_file()


# ---- model card ----


def card_of(trainer: OuroborosTrainer, **given: Any) -> ModelCard:
    trainer.create_model_card(**given)
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def test_model_card(tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "include_num_input_tokens_seen": True, "delay_warmup_steps": 1}
    trainer = trained(tmp_path / "my-model", timeline=str(tmp_path / "trace.json"), **options)
    card = card_of(trainer)
    assert card.data.tags[0] == "ouroboros"
    assert card.data.library_name == "transformers"
    assert "`pipelined`" in card.text and "cpu:0, cpu:1" in card.text
    assert "2, 1, 0" in card.text
    assert f"{tiny_model().num_parameters():,}" in card.text
    assert "eval_loss" in card.text and f"{trainer.state.log_history[-2]['eval_loss']:.5g}" in card.text
    assert "timeline.png" in card.text
    assert (tmp_path / "my-model" / "timeline.png").is_file()
    assert "1809.06695" not in card.text and "1909.06695" in card.text
    assert str(tmp_path) not in card.text, "paths of this machine are nobody else's business"


def test_model_card_before_training(tmp_path: Path) -> None:
    card = card_of(ouroboros(tmp_path / "new"))
    assert "ouroboros" in card.data.tags


def test_model_card_takes_what_the_stock_one_takes(tmp_path: Path) -> None:
    trainer = trained(tmp_path, eval_strategy="epoch")
    card = card_of(
        trainer,
        language="en",
        license="apache-2.0",
        tags="mine",
        model_name="given-name",
        finetuned_from="openai-community/gpt2",
        tasks="text-generation",
        dataset_tags="wikitext",
        dataset="WikiText",
        dataset_args="raw",
    )
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["language"] in ("en", ["en"])
    assert data["base_model"] == "openai-community/gpt2"
    assert data["datasets"] == ["wikitext"]
    assert data["tags"] == ["ouroboros", "mine"]
    assert "given-name" in card.text


def test_model_card_takes_facts(tmp_path: Path) -> None:
    card = card_of(trained(tmp_path, max_steps=1), tokens_per_second=12345.0, seed=99)
    assert "12,345" in card.text and "99" in card.text


def test_model_card_tells_what_auto_stands_for(tmp_path: Path) -> None:
    text = card_of(trained(tmp_path, max_steps=1, gradient_accumulation_steps=1, delay_compensation="auto")).text
    assert "| Delay compensation | muon+weight_prediction+lr_rescale |" in text
    assert "| Its options | adjust_lr_fn=measure_rms_adamw,anneal=0,rescaled=adamw |" in text
    plain = card_of(trained(tmp_path / "plain", max_steps=1, delay_compensation="muon")).text
    assert "| Delay compensation | muon |" in plain and "Its options" not in plain


def test_model_is_tagged(tmp_path: Path) -> None:
    assert "ouroboros" in ouroboros(tmp_path).model.model_tags


def test_synchronous_card_speaks_of_no_delay(tmp_path: Path) -> None:
    card = card_of(trained(tmp_path, schedule="1f1b", max_steps=1))
    assert "Delay compensation" not in card.text
    one = card_of(trained(tmp_path, max_steps=1, **split_options(1, 1)))
    assert "Delay compensation" not in one.text


@pytest.mark.parametrize("where", ["folder.json", "file/below/trace", "x" * 300])
def test_a_timeline_that_can_not_be_written(tmp_path: Path, where: str) -> None:
    """Said before the first update, not after the last one."""
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    trainer = ouroboros(tmp_path, timeline=str(tmp_path / where))
    with pytest.raises(OutputFileError, match="^timeline: "):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_timeline_that_is_lost_does_not_lose_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    told: list[str] = []
    monkeypatch.setattr("hf_ouroboros.simulate.picture.draw", full)
    monkeypatch.setattr("hf_ouroboros.hooks.timeline.logger.warning", told.append)
    trainer = trained(tmp_path, timeline=str(tmp_path / "new" / "trace"))
    assert "No space left on device" in told[0] and not (tmp_path / "new").exists()
    trainer.save_model()
