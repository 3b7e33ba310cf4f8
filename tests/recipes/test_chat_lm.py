"""chat_lm.py end to end: conversations of a file, those it makes itself, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import recipe, run

pytest.importorskip("trl", reason="needs the extra `trl`: pip install -e '.[trl]'")

import chat_lm

PLAIN_ADAPTER = """
import sys
sys.modules["hf_ouroboros"] = None  # importing it fails
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True)
print(tokenizer.decode(model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=3)[0]))
"""


@pytest.mark.slow
def test_own_conversations_fit() -> None:
    chats = chat_lm.stdlib_chats(480, 64)
    assert len(chats) == 480
    roles = [[message["role"] for message in chat["messages"]] for chat in chats]
    assert all(found == ["user", "assistant"] for found in roles)
    assert max(sum(len(m["content"]) + len(m["role"]) + 2 for m in chat["messages"]) for chat in chats) < 64


@pytest.mark.slow
def test_conversations_of_a_file(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    def messages(i: int) -> dict:
        return {"messages": [{"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": f"{i + 1}"}]}

    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(messages(i)) + "\n" for i in range(24)))
    values = {"model_name_or_path": pretrained[0], "chat": "chats.jsonl", "validation_share": 0.25}
    values |= {"num_train_epochs": 1, "per_device_train_batch_size": 2, "sample_tokens": 4, "lora_rank": 2}
    done = recipe("finetune_lm.py", tmp_path, values)  # which hands over to chat_lm.py
    assert "18 training and 6 validation conversations" in done.stdout
    assert "assistant: >>>" in done.stdout and "before -> after" in done.stdout
    assert "user: 1+1\nassistant: " in run(["-c", PLAIN_ADAPTER, "runs/chat_lm"], tmp_path).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "model_name_or_path='runs/pretrain_lm' does not exist"),
        ({"quantization": "nf3"}, "quantization='nf3' must be nf4 or int8"),
        ({"lora_rank": 0}, "lora_rank=0 must be at least 1"),
        ({"chat": "nowhere.jsonl"}, "chat='nowhere.jsonl' does not exist"),
        ({"chat": "rows.jsonl"}, "but no messages"),
        ({"chat": "broken.jsonl"}, "is no .jsonl file of messages"),
        ({"validation_share": 0}, "leaves a part empty"),
    ],
)
def test_errors(
    values: dict, said: str, pretrained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "broken.jsonl").write_text("{no json\n")
    values = values | ({"model_name_or_path": pretrained[0]} if values else {})
    monkeypatch.setattr("sys.argv", ["chat_lm.py", *(f"--{name}={value}" for name, value in values.items())])
    with pytest.raises(chat_lm.OptionError, match=said):
        chat_lm.main()


def test_a_run_that_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "pretrain_lm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        chat_lm.OptionError, match="'runs/pretrain_lm' holds no model: .* run recipes/pretrain_lm.py first"
    ):
        chat_lm.check_model_is_there("runs/pretrain_lm")
