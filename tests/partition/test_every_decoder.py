"""Every causal language model type of Transformers, in stages: equal to the unsplit model to the last bit, or refused.

Some types run by default; all of them, and the table in the package's own documentation, with

    python tests/partition/test_every_decoder.py [--write]
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_decoders import ENCODER_DECODERS, TYPES, tiny_decoder, tiny_encoder_decoder
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_ouroboros.errors import UnsupportedModelError
from hf_ouroboros.partition import Stage, select, split_model
from hf_ouroboros.partition.meta import call_options, is_encoder_decoder

COMMON = (
    "llama qwen2 qwen3 gemma2 gemma3_text gemma3n_text gemma4_text mistral phi3 olmo2 gpt_neox mixtral qwen3_moe gpt_oss "
    "deepseek_v3 glm4 bloom opt falcon mamba bert gpt2 zaya xmod"
).split()
DOCUMENT = Path(__file__).parents[2] / "hf_ouroboros" / "partition" / "DECODERS.md"
STAGES = 3
TRANSLATES = " (encoder and decoder)"
CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


def batches(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Everything that the model takes: no padding, padding at either side, packed rows."""
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 16), generator=generator)
    if is_encoder_decoder(model):
        return encoder_decoder_batches(ids, torch.randint(3, 90, (2, 11), generator=generator))
    found = {"plain": {"input_ids": ids}}
    if "attention_mask" in takes:
        for name, padding in (("right", slice(11, 16)), ("left", slice(0, 5))):
            mask = torch.ones_like(ids)
            mask[1, padding] = 0
            found[name] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in takes:
        packed = torch.cat([torch.arange(7), torch.arange(9)]).expand(2, -1)
        found["packed"] = {"input_ids": ids, "position_ids": packed}
    return found


def encoder_decoder_batches(ids: torch.Tensor, labels: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Decoder inputs made of the labels, and given beside them; with and without padding."""
    mask, padded = torch.ones_like(ids), labels.clone()
    mask[1, 11:], padded[1, 6:] = 0, -100
    given = {"decoder_input_ids": labels.roll(1, 1), "labels": padded}
    return {
        "plain": {"input_ids": ids, "labels": labels},
        "padded": {"input_ids": ids, "attention_mask": mask, "labels": padded},
        "with decoder inputs": {"input_ids": ids, "attention_mask": mask, **given},
    }


def takes_labels(model: PreTrainedModel) -> bool:
    """Whether the model computes a loss of text alone; some do only beside an image."""
    ids = torch.zeros(2, 16, dtype=torch.long)
    labels = torch.zeros(2, 11, dtype=torch.long) if is_encoder_decoder(model) else ids
    try:
        with torch.no_grad():
            return model(input_ids=ids, labels=labels, **call_options(model)).loss is not None
    except ValueError:
        return False


def call_with_loss(call: Any, batch: dict[str, torch.Tensor], own: bool, options: dict[str, Any]) -> Any:
    """What the model returns, with its own loss or else one of its logits."""
    if own:
        return call(**{"labels": batch["input_ids"], **batch}, **options)
    output = call(**batch, **options)
    output["loss"] = output.logits.float().square().mean()
    return output


def run_whole(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], weights: Weights, own: bool
) -> tuple[Any, Weights]:
    """Output with loss, and all gradients, with some weights."""
    leaves = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in weights.items()}

    def call(**inputs: Any) -> Any:
        return functional_call(model, leaves, (), inputs)

    output = call_with_loss(call, batch, own, call_options(model))
    output.loss.backward()
    return output, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def run_in_stages(
    stages: tuple[Stage, ...], batch: dict[str, torch.Tensor], weights: Weights, names: dict[int, str], own: bool
) -> tuple[Any, Weights]:
    """The same, with the graph cut at every boundary as the engine does."""
    tape, state, gradients = [], None, {}
    for stage in stages:
        leaves = {n: weights[names[id(p)]].clone() for n, p in stage.named_parameters()}
        leaves = {n: leaf.requires_grad_(leaf.is_floating_point()) for n, leaf in leaves.items()}
        used = {n: leaf.view_as(leaf) for n, leaf in leaves.items()}
        received = None
        if state is not None:
            received = {n: t.detach().requires_grad_(stage.trains(n, t)) for n, t in state.items()}

        finish = partial(call_with_loss, batch=batch, own=own, options={})
        given = (select(stage, batch, CPU), received, None, finish if stage.is_last else None)
        state = functional_call(stage, used, given)
        tape.append((stage, leaves, used, received, state))
    output, incoming = state, None
    for stage, leaves, used, received, state in reversed(tape):
        own = {n: names[id(p)] for n, p in stage.named_parameters()}
        if incoming is None:
            state.loss.backward()
        else:  # the head's part of a tied matrix's gradient comes first, as in the unsplit model
            sent = [n for n in state if n in incoming and state[n].requires_grad]
            tied = [n for n, name in own.items() if name in gradients]
            roots = [state[n] for n in sent] + [used[n] for n in tied]
            torch.autograd.backward(roots, [incoming[n] for n in sent] + [gradients.pop(own[n]) for n in tied])
        gradients |= {own[n]: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
        incoming = {n: t.grad for n, t in (received or {}).items() if t.grad is not None}
    return output, gradients


def made(model_type: str, **options: Any) -> PreTrainedModel:
    """A small model of a type; some types are both, a decoder alone and one with an encoder."""
    make = tiny_encoder_decoder if model_type.endswith(TRANSLATES) else tiny_decoder
    return make(model_type.removesuffix(TRANSLATES), **options)


def differing(model_type: str, **options: Any) -> list[str]:
    """What differs between a model of a type and its stages.

    Raises:
        UnsupportedModelError: it is refused.
    """
    model = made(model_type, **options).train()
    stages = split_model(model, ["cpu:0", "cpu:1", "cpu:2"], num_stages=STAGES).stages
    names = {id(p): n for n, p in model.named_parameters()}
    own = takes_labels(model)
    now = {n: p.detach() for n, p in model.named_parameters()}
    older = {n: p + 0.01 * p.abs() if p.is_floating_point() else p for n, p in now.items()}
    found = []
    for name, batch in batches(model).items():
        if "labels" in batch and "decoder_input_ids" not in batch and not takes_labels(model):
            continue  # FSMT does not make its decoder's inputs of labels
        for weights in (now, older) if name == "plain" else (now,):
            torch.manual_seed(0)
            expected, expected_gradients = run_whole(model, batch, weights, own)
            torch.manual_seed(0)
            output, gradients = run_in_stages(stages, batch, weights, names, own)
            which = f"{name}, {'older' if weights is older else 'present'} weights"
            if not torch.equal(output.logits, expected.logits):
                found.append(f"logits ({which})")
            if not torch.equal(output.loss, expected.loss):
                found.append(f"loss ({which})")
            if gradients.keys() != expected_gradients.keys():
                found.append(f"which gradients there are ({which})")
            found += [
                f"{n} ({which})"
                for n in gradients.keys() & expected_gradients.keys()
                if not torch.equal(gradients[n], expected_gradients[n])
            ]
    return found


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in COMMON if name in TYPES])
def test_equal_to_the_last_bit(model_type: str) -> None:
    assert differing(model_type) == []


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "jamba"])
def test_the_loss_that_balances_experts(model_type: str) -> None:
    """Jamba has layers without experts, the first among them."""
    assert differing(model_type, output_router_logits=True) == []


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("doge", "its load_balancing_loss_func takes gate_logits, num_experts, num_keys, top_k, attention_mask"),
        ("deepseek_v3", "its forward calls no load_balancing_loss_func"),
        ("jetmoe", "its forward does not run without weights"),
    ],
)
def test_other_losses_that_balance_experts_are_refused(model_type: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"balances the experts of all layers.*{why}.*set it to False"):
        differing(model_type, output_router_logits=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("zamba2", "layers 2 and 4 of model.layers share the parameter"),
        ("hrm_text", "run more than once in a forward"),
        ("reformer", "its layers return a ReformerOutput"),
        ("xlm", "something goes past its layers to the head"),
    ],
)
def test_refused_by_a_sentence_that_says_why(model_type: str, why: str) -> None:
    if model_type not in TYPES:
        pytest.skip(f"this Transformers has no {model_type}")
    with pytest.raises(UnsupportedModelError, match=why):
        differing(model_type)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
        ({"layerdrop": 0.1}, "layerdrop=0.1: layers that are skipped at random"),
    ],
)
def test_options_that_change_from_forward_to_forward_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        split_model(tiny_decoder("llama", **options), ["cpu:0", "cpu:1"])


def verdict(model_type: str) -> tuple[str, str]:
    """("equal" | "refused" | "differs" | "not tried", a remark)."""
    try:
        made(model_type)
    except Exception as error:
        return "not tried", f"no small model was made of it ({type(error).__name__})"
    try:
        found = differing(model_type)
    except UnsupportedModelError as error:
        return "refused", str(error).partition("can't be split into stages: ")[2] or str(error)
    except Exception as error:
        return "differs", f"{type(error).__name__}: {error}"
    return ("differs", ", ".join(found[:3])) if found else ("equal", "")


def balancing(model_type: str) -> str:
    """What becomes of the loss that balances experts: "" where a type has none."""
    if not hasattr(made(model_type).config, "output_router_logits"):
        return ""
    try:
        found = differing(model_type, output_router_logits=True)
    except UnsupportedModelError:
        return "refused"
    return ("differs: " + ", ".join(found[:3])) if found else "equal"


def main() -> None:
    """Tries all types; with `--write`, the table goes into the documentation."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {}
    for model_type in sys.argv[2:] or [*sorted(TYPES), *(f"{name}{TRANSLATES}" for name in ENCODER_DECODERS)]:
        kind, remark = verdict(model_type)
        results[model_type] = kind, balancing(model_type) if kind == "equal" else "", remark
        print(model_type, *results[model_type], flush=True)
    counts = Counter(kind for kind, *_ in results.values())
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    balanced = Counter(found for _, found, _ in results.values())
    print(summary, dict(balanced))
    if "--write" in sys.argv:
        remarks = {name: " ".join(text.split())[:160].replace("|", "\\|") for name, (*_, text) in results.items()}
        rows = [f"| {name} | {kind} | {loss} | {remarks[name]} |" for name, (kind, loss, _) in results.items()]
        header = [
            "# Causal language models in stages",
            "",
            f"Transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, CPU, float32: {summary}.",
            "Equal means that a small model in three stages has the unsplit model's logits, loss and gradients to the last",
            "bit, with and without padding, packed rows and older weights. The loss that balances experts",
            f"(`output_router_logits=True`) is equal for {balanced['equal']} types, and refused for {balanced['refused']}. Written by",
            "`python tests/partition/test_every_decoder.py --write`.",
            "",
            "| type | in stages | balanced experts | why |",
            "|---|---|---|---|",
        ]
        DOCUMENT.write_text("\n".join([*header, *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
