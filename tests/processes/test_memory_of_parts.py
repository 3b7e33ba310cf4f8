"""Two processes train a Llama of a few hundred MiB, read from several files: neither ever holds more than its part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rig import in_processes
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, OuroborosTrainer
from hf_ouroboros.memory_use import peak_memory

MIB = 2**20
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8000}
OTHERS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}


class Tokens(Dataset):
    """Rows of sixteen tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(16) + index
        return {"input_ids": ids, "labels": ids}


def trained_part(rank: int, folder: str, tiny: str) -> dict[str, int | None]:
    """Bytes of a process's parameters, and how much it grew while it loaded and trained them."""
    torch.set_num_threads(1)
    found: dict[str, int | None] = {}
    for path in (tiny, folder):  # what does not grow with the model is paid for by a tiny one
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "optim": "sgd"}
        args = OuroborosArguments(
            f"{path}-out", num_stages=2, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, **options
        )
        before = peak_memory().resident
        model = AutoStagedModelForCausalLM.from_pretrained(path, args=args)
        own = [p for p in model.parameters() if not p.is_meta]
        with torch.no_grad():
            [p.sum() for p in own]  # a mapped file is read when it is used
        loaded = peak_memory().peak_resident
        trainer = OuroborosTrainer(model, args, train_dataset=Tokens())
        trainer.train()
        ended = peak_memory().peak_resident
        sizes = {"own": sum(p.nbytes for p in own), "all": model.num_parameters() * 4}
        found = sizes | {"loading": before and loaded - before, "training": before and ended - before}
        del trainer, model, own
    return found


@pytest.mark.slow
def test_no_process_holds_more_than_its_part(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("model", "tiny")]
    LlamaForCausalLM(LlamaConfig(**SIZES, **OTHERS)).save_pretrained(folders[0], max_shard_size="60MB")
    tiny = LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}, **OTHERS)
    LlamaForCausalLM(tiny).save_pretrained(folders[1])
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    for found in in_processes(2, trained_part, *folders, limit=200):
        if found["loading"] is None:
            pytest.skip("the current size is known on Linux only")
        own = found["own"]
        assert 0.4 < own / found["all"] < 0.6 and found["all"] > 240 * MIB
        assert found["loading"] < 1.15 * own + 16 * MIB
        # Its weights, those that what is in flight has used, and gradients: of the part. The whole would add twice as much.
        assert found["training"] < 4 * own + 32 * MIB
