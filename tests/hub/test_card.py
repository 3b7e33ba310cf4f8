"""The model card: valid metadata, no empty section, the right tables, nothing about machine or day."""

from __future__ import annotations

import dataclasses
import math
import re
import socket
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_ouroboros.hub.card import MAX_LOSS_ROWS, CardFacts, build_card, table


def minimal(**changes: object) -> CardFacts:
    facts = CardFacts("tiny", "gpt2", 1234567, "pipelined", 3)
    return dataclasses.replace(facts, **changes)


def full() -> CardFacts:
    return minimal(
        devices=["cpu:0", "cpu:1"],
        stages=[
            {"stage": 0, "device": "cpu:0", "layers": "wte, h.0-h.3", "parameters": 1000000, "delay": 2},
            {"stage": 1, "device": "cpu:1", "layers": "h.4-h.8", "parameters": 200000, "delay": 1},
            {"stage": 2, "device": "cpu:0", "layers": "h.9-h.11, lm_head", "parameters": 34567, "delay": 0},
        ],
        micro_batches_per_update=8,
        tied_gradient="joint",
        delay_warmup_steps=100,
        clip_scope="stage",
        delay_compensation="nadam",
        hyperparameters={"learning_rate": 5e-5, "optim": "a|b", "warmup": None, "betas": (0.9, 0.95)},
        base_model="openai-community/gpt2",
        repo_id="somebody/tiny",
        dataset_name="enwik8",
        dataset_description="The first 10^8 bytes of a Wikipedia dump.",
        dataset_id="enwik8-org/enwik8",
        tags=["byte-level", "ouroboros"],
        license="apache-2.0",
        language="en",
        metrics={"eval_loss": 2.5, "perplexity": math.exp(2.5), "broken": math.nan},
        log_history=[{"step": 10, "loss": 4.0, "epoch": 0.5}, {"step": 20, "eval_loss": 2.5, "epoch": 1.0}],
        seed=42,
        versions={"torch": "2.13.0"},
        timeline_picture="timeline.png",
        train_runtime=1234.56,
        tokens_seen=10_000_000,
        tokens_per_second=8100.4,
        tokenizer=True,
    )


def section(card: ModelCard, heading: str) -> str:
    """Text from a heading to the next of the same or a higher level."""
    level = heading.split(" ")[0]
    text = card.text[card.text.index(f"\n{heading}\n") + len(heading) + 2 :]
    return re.split(rf"\n#{{1,{len(level)}}} ", text)[0]


def cells(text: str) -> list[list[str]]:
    """Rows of the tables in a text, without the header's rule."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "| --- |" not in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("facts", [minimal(), full()], ids=["minimal", "full"])
def test_card_survives_saving_and_loading(tmp_path: Path, facts: CardFacts) -> None:
    card = build_card(facts)
    card.save(tmp_path / "README.md")
    back = ModelCard.load(tmp_path / "README.md")
    assert back.data.to_dict() == card.data.to_dict()
    assert back.text == card.text


def test_metadata_of_a_full_card() -> None:
    data = build_card(full()).data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "base_model": "openai-community/gpt2",
        "datasets": ["enwik8-org/enwik8"],
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["ouroboros", "byte-level"],
    }
    (result,) = index[0]["results"]
    assert index[0]["name"] == "tiny"
    assert result["dataset"] == {"type": "enwik8-org/enwik8", "name": "enwik8"}
    metrics = [(m["type"], m["name"], m["value"]) for m in result["metrics"]]
    assert metrics == [("loss", "eval_loss", 2.5), ("perplexity", "perplexity", math.exp(2.5))]


def test_metadata_of_a_minimal_card_holds_nothing_unknown() -> None:
    assert build_card(minimal()).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ouroboros"],
    }


def test_metrics_without_a_data_set_stay_out_of_the_metadata() -> None:
    card = build_card(minimal(metrics={"perplexity": 9.0}))
    assert "model-index" not in card.data.to_dict()
    assert ["perplexity", "9"] in cells(section(card, "## Results"))


@pytest.mark.parametrize("path", ["/data/someone/gpt2-mine", "./out/here/gpt2-mine", r"C:\models\gpt2-mine"])
def test_a_local_base_model_does_not_give_the_machine_away(path: str) -> None:
    card = build_card(minimal(base_model=path))
    assert "base_model" not in card.data.to_dict()
    assert path not in card.content
    assert "starting from `gpt2-mine`" in card.text


def test_sections() -> None:
    def headings(card: ModelCard) -> list[str]:
        return re.findall(r"^#+ .*", card.text, flags=re.MULTILINE)

    fixed = ["# tiny", "## How to load it", "## Training procedure", "## Limits", "## Citation"]
    assert headings(build_card(minimal())) == fixed
    stages, data = (
        ["### Stages", "### Hyper-parameters"],
        ["## Data", "## Results", "### Loss during training"],
    )
    everything = [*fixed[:3], *stages, *data, "## Timeline", "## Limits", "## Versions", "## Citation"]
    assert headings(build_card(full())) == everything


@pytest.mark.parametrize("facts", [minimal(), full(), minimal(schedule="1f1b"), minimal(num_stages=1)])
def test_layout_is_clean(facts: CardFacts) -> None:
    text = build_card(facts).content
    assert "\n\n\n" not in text
    assert not re.search(r"[ \t]$", text, flags=re.MULTILINE)
    assert text.endswith("```\n")
    for leftover in ("None", "{{", "{%"):
        assert leftover not in text
    assert not re.search(r"^(#+) .*\n+\1 ", text, flags=re.MULTILINE)  # a section without content


def test_procedure_table() -> None:
    rows = dict(cells(section(build_card(full()), "## Training procedure").split("###")[0])[1:])
    assert rows == {
        "Schedule": "`pipelined` (the update rule as a dataflow, all devices busy)",
        "Stages (K)": "3",
        "Devices": "cpu:0, cpu:1",
        "Delay of each stage, in micro-batches": "2, 1, 0",
        "Micro-batches per update (M)": "8",
        "Updates without delay at the start": "100",
        "Gradient of the tied embedding": "joint",
        "Scope of gradient clipping": "stage",
        "Activations recomputed": "no",
        "Delay compensation": "nadam",
        "Training time": "1,234.6 s",
        "Tokens seen": "10,000,000",
        "Tokens per second": "8,100",
        "Seed": "42",
    }


def test_weights_of_now_are_named() -> None:
    text = build_card(dataclasses.replace(full(), weights="now")).content
    assert "| Weights of late backwards | those of now (features replay) |" in text
    assert "Each backward replays its stage's forward with the newest weights" in text and "true gradient" not in text
    assert "late backwards" not in build_card(dataclasses.replace(full(), weights="now", num_stages=1)).content


def test_stage_table_and_its_missing_columns() -> None:
    rows = cells(section(build_card(full()), "### Stages"))
    assert rows[0] == ["Stage", "Device", "Layers", "Parameters", "Delay in micro-batches"]
    assert rows[1] == ["0", "cpu:0", "wte, h.0-h.3", "1,000,000", "2"]
    assert rows[3][-1] == "0"
    short = build_card(minimal(stages=[{"stage": 0, "delay": 1}, {"stage": 1, "delay": 0}]))
    assert cells(section(short, "### Stages"))[0] == ["Stage", "Delay in micro-batches"]


def test_cells_are_escaped() -> None:
    rows = cells(section(build_card(full()), "### Hyper-parameters"))
    assert rows == [["Name", "Value"], ["learning_rate", "5e-05"], ["optim", r"a\|b"], ["betas", "0.9, 0.95"]]
    assert table(("a", "b"), [("x\ny", {"k": 1.5, "on": True})]).splitlines()[-1] == "| x y | k=1.5, on=yes |"
    assert table(("a", "b"), [("x", None)]) == ""


def test_loss_table_merges_by_step() -> None:
    history = [
        {"step": 10, "loss": 4.0, "learning_rate": 0.1},
        {"step": 20, "loss": 3.0},
        {"step": 20, "eval_loss": 3.125},
        {"step": 20, "train_loss": 3.5, "train_runtime": 1.0},
    ]
    rows = cells(section(build_card(minimal(log_history=history)), "### Loss during training"))
    assert rows == [["Step", "Training loss", "Evaluation loss"], ["10", "4", ""], ["20", "3", "3.125"]]


@pytest.mark.parametrize("evaluations", [0, 1, 5, 200, 1000])
def test_a_long_history_is_thinned(evaluations: int) -> None:
    history = [{"step": i, "loss": 1.0 / i, "epoch": i / 100} for i in range(1, 1001)]
    every = 1000 // evaluations if evaluations else 2000
    history += [{"step": i, "eval_loss": 2.0 / i} for i in range(every, 1001, every)]
    rows = cells(section(build_card(minimal(log_history=history)), "### Loss during training"))
    assert 6 <= len(rows) - 1 <= MAX_LOSS_ROWS
    steps = [int(row[0]) for row in rows[1:]]
    assert steps == sorted(set(steps))
    assert steps[0] == 1 and steps[-1] == 1000
    assert (rows[0][-1] == "Evaluation loss") == (evaluations > 0)


def test_loading_code_runs_as_python() -> None:
    def code(facts: CardFacts) -> str:
        (block,) = re.findall(r"```python\n(.*?)```", build_card(facts).text, flags=re.DOTALL)
        compile(block, "card", "exec")
        return block

    assert code(minimal()).splitlines() == [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("tiny")',
    ]
    assert 'AutoTokenizer.from_pretrained("somebody/tiny")' in code(full())
    own = code(minimal(load_import="hf_ouroboros.models.transfo_xl"))
    assert own.startswith("import hf_ouroboros.models.transfo_xl")


def test_what_is_said_about_the_delay() -> None:
    text = build_card(full()).text
    assert "K = 3 stages" in text and "`nadam` was applied on top" in text
    assert "(K-1)/M = 0.25 updates" in text
    assert "any single micro-batch" not in text
    assert "any single micro-batch" in build_card(minimal(tied_gradient="paper")).text
    assert "delays simulated" in build_card(minimal(schedule="reference")).text
    for undelayed in (minimal(schedule="1f1b"), minimal(num_stages=1)):
        text = build_card(undelayed).text
        assert "ordinary synchronous training" in text
        assert "late" not in text.split("## Citation")[0]


def test_citation_and_picture() -> None:
    text = build_card(full()).text
    assert "eprint        = {1909.06695}" in text
    assert "](<timeline.png>)" in section(build_card(full()), "## Timeline")


def test_deterministic_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the card used the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert build_card(full()).content == build_card(full()).content
    assert not re.search(r"\b20[2-9]\d\b", build_card(full()).content)
