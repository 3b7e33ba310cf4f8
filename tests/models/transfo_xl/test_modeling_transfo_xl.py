"""The whole model: formulas, loading and saving, loss, training modes, stages, resizing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transfo_xl_cases import BASE, KINDS, log_probabilities_by_loops, tiny_config, tiny_model, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_ouroboros.models.transfo_xl import TransfoXLLMHeadModel, TransfoXLMemory, TransfoXLModel
from hf_ouroboros.models.transfo_xl.context import attention_context, valid_keys
from hf_ouroboros.models.transfo_xl.recurrent_memory import extended, initial_memory

kinds = pytest.mark.parametrize("kind", KINDS)
shifted_counts = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.14"), reason="Trainer divides the loss by the count before shifting"
)


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def ties(model: torch.nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in named(model).items():
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def assert_same_model(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Bit for bit, ties included."""
    first, second = named(one), named(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ties(one) == ties(other)


@kinds
@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_formulas_of_the_paper(kind: str, implementation: str) -> None:
    model = tiny_model(**KINDS[kind])
    model.set_attn_implementation(implementation)
    ids, memory = tokens(2, 5), [torch.randn(2, 4, 8), torch.randn(2, 4, 8)]
    with torch.no_grad():
        output = model(ids, mems=memory)
    for row in range(2):
        expected, inputs = log_probabilities_by_loops(model, ids[row].tolist(), [state[row] for state in memory])
        # Float32 against float64; the largest deviation seen is 3e-6.
        torch.testing.assert_close(
            output.logits[row].double(), torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=0
        )
        for old, new, state in zip(memory, inputs, output.mems, strict=True):
            kept = torch.cat([old[row], new.float()])[-6:]
            torch.testing.assert_close(state[row], kept, atol=2e-5, rtol=0)
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(2, 5))


# Loading and saving


@kinds
def test_a_saved_model_loads_exactly(kind: str, tmp_path: Path) -> None:
    model = tiny_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(model, loaded.eval())
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    ids = tokens(2, 5)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, TransfoXLModel)
    assert_same_model(base, model.transformer)


@kinds
def test_old_bin_files_load_exactly(kind: str, tmp_path: Path) -> None:
    model = tiny_model(**KINDS[kind])
    model.config.save_pretrained(tmp_path)
    # torch.save keeps both sides of a tie; 4.57.6 also saved the frequencies and every layer's alias of shared biases.
    state = model.state_dict() | {"transformer.pos_emb.inv_freq": torch.ones(4)}
    if not model.config.untie_r:
        for i in range(model.config.n_layer):
            for name in ("r_w_bias", "r_r_bias"):
                state[f"transformer.layers.{i}.dec_attn.{name}"] = state[f"transformer.{name}"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(model, loaded)


def test_a_file_without_aliases_loads_exactly(tmp_path: Path) -> None:
    model = tiny_model(**KINDS["wikitext"])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("crit.out_layers") and name.endswith("weight") for name in saved)
    assert [name for name in saved if name.startswith("crit.out_projs")] == ["crit.out_projs.0"]
    # An old file whose ties were broken by hand: what differs stays apart instead of being overwritten.
    other = torch.full_like(saved["transformer.word_emb.emb_projs.1"], 0.5)
    save_file(saved | {"crit.out_projs.1": other}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.crit.out_projs[1], other)
    assert torch.equal(loaded.transformer.word_emb.emb_projs[1], saved["transformer.word_emb.emb_projs.1"])


TABLE, PROJECTION = ("crit.out_layers.{}.weight", "transformer.word_emb.emb_layers.{}.weight"), "crit.out_projs.{}"


@pytest.mark.parametrize(
    ("kind", "tables", "projections"),
    [
        ("plain", [0], {}),
        ("narrow", [0], {}),
        ("cut_narrow", [0], {0: [1, 2]}),
        ("cut_narrow_untied_projections", [0], {}),
        ("wikitext", [0, 1, 2], {1: [1], 2: [2]}),
        ("divided_untied_projections", [0, 1, 2], {}),
        ("divided_untied", [], {1: [1], 2: [2]}),
        ("untied_narrow", [], {}),
    ],
)
def test_what_is_tied(kind: str, tables: list[int], projections: dict[int, list[int]]) -> None:
    expected = {frozenset(name.format(i) for name in TABLE) for i in tables}
    for source, targets in projections.items():
        names = {PROJECTION.format(target) for target in targets}
        expected.add(frozenset(names | {f"transformer.word_emb.emb_projs.{source}"}))
    assert ties(TransfoXLLMHeadModel(tiny_config(**KINDS[kind]))) == expected


def test_auto_classes_build_new_models() -> None:
    config = AutoConfig.for_model("transfo-xl", **BASE)
    assert config.mem_init == "masked"
    assert isinstance(AutoModelForCausalLM.from_config(config), TransfoXLLMHeadModel)
    assert isinstance(AutoModel.from_config(config), TransfoXLModel)


# Loss


@kinds
def test_the_loss_is_the_mean_over_labels_that_count(kind: str) -> None:
    model = tiny_model(**KINDS[kind])
    ids = tokens(3, 7)
    labels = ids.clone()
    labels[0, 2], labels[1] = -100, -100
    given = labels.clone()
    output = model(ids, labels=labels)
    assert torch.equal(labels, given)
    picked = -output.logits[:, :-1].gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    expected = picked.masked_fill(labels[:, 1:] == -100, 0.0)
    torch.testing.assert_close(output.losses, expected)
    torch.testing.assert_close(output.loss, expected.sum() / 11)


def test_a_row_without_labels_trains_nothing() -> None:
    model = tiny_model(**KINDS["wikitext"])
    ids, gradients = tokens(2, 6), []
    for rows in (slice(0, 2), slice(0, 1)):
        model.zero_grad()
        labels = ids.clone()
        labels[1] = -100
        model(ids[rows], labels=labels[rows]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_shifted_labels_lose_no_target() -> None:
    model = tiny_model(**KINDS["cut"])
    stream = tokens(2, 9)
    long = model(stream, labels=stream, use_cache=False)
    first = model(stream[:, :4], shift_labels=stream[:, 1:5])
    second = model(stream[:, 4:8], mems=first.mems, labels=stream[:, 4:8], shift_labels=stream[:, 5:9])
    # mem_len 6 covers both segments; the same sums in another order.
    torch.testing.assert_close(torch.cat([first.losses, second.losses], 1), long.losses, atol=1e-5, rtol=1e-5)


def test_num_items_in_batch_divides_the_sum() -> None:
    model = tiny_model()
    ids = tokens(2, 5)
    output = model(ids, labels=ids)
    for items in (20, torch.tensor(20)):
        assert torch.equal(model(ids, labels=ids, num_items_in_batch=items).loss, output.losses.sum() / 20)


@kinds
def test_nothing_to_predict_is_a_loss_of_zero(kind: str) -> None:
    model = tiny_model(**KINDS[kind])
    for ids, labels in ((tokens(2, 1), tokens(2, 1)), (tokens(2, 4), torch.full((2, 4), -100))):
        model.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


@kinds
def test_every_parameter_has_a_gradient_even_without_words_of_its_cluster(kind: str) -> None:
    model = tiny_model(**KINDS[kind])
    ids = torch.zeros(1, 3, dtype=torch.int64)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_training_returns_no_logits_unless_asked() -> None:
    model, ids = tiny_model().train(), tokens(2, 4)
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, return_logits=True).logits.shape == (2, 4, 29)
    assert model(ids).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None
    assert model(ids, labels=ids, return_logits=False).logits is None
    assert torch.equal(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_tuples_and_old_names() -> None:
    model, ids = tiny_model(), tokens(2, 4)
    output = model(ids, labels=ids)
    assert output.prediction_scores is output.logits
    loss, logits, losses, mems = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert torch.equal(losses, output.losses) and len(mems) == 2


def trainer_of(model: TransfoXLLMHeadModel, folder: Path) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(5, 6)]
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=5,
        per_device_eval_batch_size=1,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


@shifted_counts
def test_trainer_evaluates(tmp_path: Path) -> None:
    """With `labels` alone, although the model knows `shift_labels` too."""
    model, ids = tiny_model(**KINDS["wikitext"]), tokens(5, 6)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    prediction = trainer_of(model, tmp_path).predict([{"input_ids": row, "labels": row} for row in ids])
    assert prediction.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert prediction.predictions.shape == (5, 6, 29)


@shifted_counts
def test_trainer_counts_the_labels_left_after_shifting(tmp_path: Path) -> None:
    model, ids = tiny_model(**KINDS["wikitext"]), tokens(5, 6)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    # Trainer logs four decimals.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "exactly one of input_ids and inputs_embeds"),
        (dict(input_ids=tokens(2, 3), inputs_embeds=torch.zeros(2, 3, 8)), "exactly one"),
        (dict(input_ids=tokens(2, 3), mems=[torch.zeros(2, 6, 8)]), "one per layer and batch first"),
        (dict(input_ids=tokens(2, 3), mems=[torch.zeros(6, 2, 8)] * 2), r"shape \[batch=2, rows, d_model=8\]"),
        (dict(input_ids=tokens(2, 3), mems=()), "must hold 2 tensors"),
        (dict(input_ids=tokens(2, 3), attention_mask=torch.ones(2, 2)), "attention_mask must have shape"),
    ],
)
def test_wrong_inputs_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="position_ids"):
        tiny_model()(tokens(2, 3), position_ids=tokens(2, 3))


def test_mems_and_a_filled_cache_exclude_each_other() -> None:
    model, ids = tiny_model(), tokens(2, 3)
    output = model(ids, use_cache=True)
    with pytest.raises(ValueError, match="not both"):
        model(ids, mems=model(ids).mems, cache=output.cache)


def test_a_cache_has_two_names() -> None:
    """`cache` here and since transformers 5.24, `past_key_values` before."""
    model, ids = tiny_model(mem_len=8), tokens(2, 3)
    expected = model(ids, cache=model(ids, use_cache=True).cache).logits
    output = model(ids, use_cache=True)
    assert output.past_key_values is output.cache and output["past_key_values"] is output.cache
    assert torch.equal(model(ids, past_key_values=output.past_key_values).logits, expected)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=output.cache, past_key_values=output.cache)


# Modes of training


@kinds
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model, ids = tiny_model(**KINDS[kind], dropatt=0.1).train(), tokens(2, 5)
    mems = model(ids).mems
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        output = model(ids, mems=mems, labels=ids)
        output.loss.backward()
        results.append([output.loss, *output.mems, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match="use mems instead"):
        model(ids, use_cache=True)


@kinds
@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_bfloat16(kind: str, implementation: str) -> None:
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 5)
    model.set_attn_implementation(implementation)
    exact = model(ids, labels=ids)
    for half in (False, True):
        if half:
            model.bfloat16()
        model.zero_grad()
        mems = None
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=not half):
                output = model(ids, labels=ids, mems=mems)
            if mems is None:
                # bfloat16 has 8 bits; weights of 0.35 in two layers make a few per cent of that.
                torch.testing.assert_close(output.loss, exact.loss, atol=0.15, rtol=0.05)
            mems = output.mems
        assert output.logits.dtype == output.loss.dtype == torch.float32
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_dropout_is_torchs_own() -> None:
    """The same seed gives the same masks; in evaluation mode there are none."""
    model, ids = tiny_model(dropout=0.3, dropatt=0.3).train(), tokens(2, 5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    model.eval()
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)


def test_where_dropout_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On embeddings, positions, attention, its output, both layers of the feed-forward network and the last output."""
    calls = []

    def recorded(tensor: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        calls.append((tuple(tensor.shape), p if training else 0.0))
        return tensor

    monkeypatch.setattr(torch.nn.functional, "dropout", recorded)
    model, ids = tiny_model(dropout=0.25, dropatt=0.5), tokens(2, 5)
    model.set_attn_implementation("eager")
    model(ids)
    assert {p for _, p in calls} == {0.0}
    calls.clear()
    model.train()(ids)
    hidden = ((2, 5, 8), 0.25)
    layer = [((2, 2, 5, 5), 0.5), hidden, ((2, 5, 12), 0.25), hidden]
    assert calls == [hidden, ((5, 8), 0.25), *layer, *layer, hidden]


@pytest.mark.parametrize("training", (False, True))
def test_dropout_of_probabilities_in_sdpa(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.append(kwargs["dropout_p"])
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    tiny_model(dropatt=0.5).train(training)(tokens(2, 5))
    assert given == [0.5 if training else 0.0] * 2


# Stages


@kinds
@pytest.mark.parametrize("mem_init", ("masked", "zeros"))
def test_stages_that_know_only_their_own_layers(kind: str, mem_init: str) -> None:
    """As in the module docstring of modeling_transfo_xl, with one layer per stage and swapped-in parameters."""
    model = tiny_model(**KINDS[kind], mem_init=mem_init)
    config, parts = model.config, model.transformer
    memories = [initial_memory(config, 2, 1, torch.float32, torch.device("cpu")) for _ in range(config.n_layer)]
    mems: Any = TransfoXLMemory(tuple(memory[0] for memory in memories), memories[0].valid)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for segment in range(3):
        ids = tokens(2, 4, seed=segment)
        expected = model(ids, mems=mems, attention_mask=mask, labels=ids)
        mems = expected.mems
        hidden = parts.drop(parts.word_emb(ids))
        for stage in range(config.n_layer):
            memory, layer = memories[stage], parts.layers[stage]
            valid = valid_keys(hidden, memory.rows, memory.valid, mask)
            shared = None if config.untie_r else (parts.r_w_bias, parts.r_r_bias)
            context = attention_context(config, hidden, memory.rows, valid, shared)
            memories[stage] = TransfoXLMemory(
                (extended(memory[0], hidden, config.mem_len),), extended(valid[:, :0], valid, config.mem_len)
            )
            weights = {name: parameter.clone() for name, parameter in layer.named_parameters()}
            hidden, _ = functional_call(layer, weights, (hidden, context, memory[0]))
            assert torch.equal(memories[stage][0], mems[stage]) and torch.equal(memories[stage].valid, mems.valid)
        hidden = parts.final_drop(hidden)
        assert torch.equal(model.crit(hidden), expected.logits)
        loss, losses = model.crit(hidden, labels=ids)
        assert torch.equal(loss, expected.loss) and torch.equal(losses, expected.losses)


# Resizing


@kinds
@pytest.mark.parametrize("size", (33, 25))
def test_resizing(kind: str, size: int, tmp_path: Path) -> None:
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 5).clamp(max=24)
    before, tied = named(model), ties(model)
    old = {name: parameter.detach().clone() for name, parameter in before.items()}
    embeddings = model.resize_token_embeddings(size)
    assert embeddings is model.get_input_embeddings() and model.config.vocab_size == size
    assert model(ids).logits.shape[-1] == size
    torch.testing.assert_close(model(ids).logits.exp().sum(-1), torch.ones(2, 5))
    assert ties(model) == tied
    for name, parameter in named(model).items():
        rows = min(len(parameter), len(old[name]))
        assert torch.equal(parameter[:rows], old[name][:rows])
        assert parameter.isfinite().all()
    model(ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_resizing_to_multiples_and_limits() -> None:
    model = tiny_model(**KINDS["wikitext"])
    model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model.config.vocab_size == 32
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.transformer.word_emb.emb_layers[-1].num_embeddings == 12
    with pytest.raises(ValueError, match="20 tokens are too few"):
        model.resize_token_embeddings(20)


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    for kind in ("plain", "wikitext"):
        for word in (-1, 29):
            with pytest.raises(IndexError):
                tiny_model(**KINDS[kind])(torch.tensor([[1, word]]))


def test_config_files_say_how_the_memory_starts(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mem_init"] == "masked"
    assert AutoConfig.from_pretrained(tmp_path).mem_init == "masked"
