"""What `plan` says a stage needs, against a stage at work: the life of each of its tensors is followed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import cpu_devices
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_ouroboros.engine.optimizers import StageOptimizer, snapshot_hyperparameters
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.engine.stage_runner import StageRunner
from hf_ouroboros.partition import split_model
from hf_ouroboros.partition.shadow_stage import HIDDEN
from hf_ouroboros.planning.memory_model import MemoryOptions, StageMemory, stage_memory
from hf_ouroboros.planning.unit_facts import model_facts
from hf_ouroboros.planning.working import Living

STAGES, ROWS, TIME, WIDTH = 4, 2, 32, 64
COUNTS = (2, 2, 2, 1)
SIZES = {"hidden_size": WIDTH, "intermediate_size": 172, "num_attention_heads": 2, "num_hidden_layers": sum(COUNTS)}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300, max_position_embeddings=TIME, **options))


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": WIDTH, "n_layer": sum(COUNTS), "n_head": 2, "n_positions": TIME, "vocab_size": 300}
    return GPT2LMHeadModel(GPT2Config(**sizes, **NO_DROPOUT, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0))


def loss_of(logits: torch.Tensor, batch: Mapping[str, Any], context: Any) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())


def most_alive(model: PreTrainedModel, stage: int, micro_batches: int, **settings: Any) -> float:
    """Peak bytes of a stage that works on its own, with neighbours that answer at once."""
    partition = split_model(model, cpu_devices(STAGES), list(COUNTS), check=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    given = EngineSettings(micro_batches=micro_batches, max_grad_norm=1.0, **settings)
    runner = StageRunner(partition, stage, torch.device("cpu"), loss_of, given, None)
    own = partition.owned(stage).values()
    runner.optimizer = StageOptimizer(optimizer, own)
    mine = {id(p) for p in own}
    living = Living([*(p for p in model.parameters() if id(p) not in mine), *model.buffers()])
    for parameter in own:
        living.note(parameter)
    delay, gradients = STAGES - 1 - stage, {}
    dtype = torch.float32 if "autocast_dtype" in settings else next(iter(own)).dtype
    with living:
        for tick in range(4 * STAGES):
            ids = torch.full((ROWS, TIME), tick)
            received = None if stage == 0 else {HIDDEN: torch.randn(ROWS, TIME, WIDTH, dtype=dtype)}
            output = runner.forward(tick, {"input_ids": ids, "labels": ids}, None, received)
            gradients[tick] = None if delay == 0 else {HIDDEN: output[HIDDEN]}
            del received, output
            if tick >= delay:
                gradient = gradients.pop(tick - delay)
                gradient = gradient and {HIDDEN: torch.ones_like(gradient[HIDDEN])}
                found, _ = runner.backward(tick - delay, gradient, adding=True)
                runner.accumulate(found)
                del found, gradient, _
            if (tick + 1) % micro_batches == 0:
                runner.clip(1.0)
                runner.step(snapshot_hyperparameters(optimizer), tick // micro_batches)
    return living.peak


def planned(model: PreTrainedModel, stage: int, micro_batches: int, **options: Any) -> StageMemory:
    """What the planner says of the stage."""
    facts = model_facts(model.config, ROWS, TIME, **options)
    start = 0 if stage == 0 else 1 + sum(COUNTS[:stage])
    stop = len(facts.units) if stage == STAGES - 1 else 1 + sum(COUNTS[: stage + 1])
    return stage_memory(facts, facts.units[start:stop], stage, STAGES, MemoryOptions("pipelined", micro_batches))


def compare(found: float, memory: StageMemory, stage: int) -> None:
    # Nothing is sent here, but what a stage puts out is kept until its backward.
    put_out = ROWS * TIME * WIDTH * 4 * (STAGES - stage if stage < STAGES - 1 else 0)
    assert memory.total - memory.messages + put_out == pytest.approx(found, rel=0.1), memory


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_float32(make: Any, stage: int, micro_batches: int) -> None:
    model = make()
    compare(most_alive(model, stage, micro_batches), planned(model, stage, micro_batches), stage)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_autocast(stage: int) -> None:
    model = llama()
    compare(most_alive(model, stage, 3, autocast_dtype=torch.bfloat16), planned(model, stage, 3, autocast=True), stage)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bfloat16(stage: int) -> None:
    model, memory = llama().bfloat16(), planned(llama(), stage, 4, dtype=torch.bfloat16)
    compare(most_alive(model, stage, 4), memory, stage)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_adapters(stage: int) -> None:
    model, memory = llama(), planned(llama(), stage, 4, lora_rank=4)
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    compare(most_alive(model, stage, 4), memory, stage)
