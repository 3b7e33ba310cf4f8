"""Initialising the owned parameters: the values and the random numbers of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from hf_ouroboros.errors import UnsupportedModelError, UnsupportedOptionError
from hf_ouroboros.partition import initialising
from hf_ouroboros.partition.initialising import draw_in_pieces, initialise_owned
from hf_ouroboros.partition.ownership import names_of_parameters

# Odd sizes, so that no tensor's size is a multiple of 16 by chance.
SIZES = dict(vocab_size=61, hidden_size=30, num_hidden_layers=3, num_attention_heads=3)
TOKENS = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
ROTARY = dict(intermediate_size=37, num_key_value_heads=1, max_position_embeddings=32, **SIZES, **TOKENS)
CONFIGS: dict[str, Callable[[bool], PreTrainedConfig]] = {
    "gpt2": lambda tied: gpt2_config(tie_word_embeddings=tied),
    "llama": lambda tied: LlamaConfig(**ROTARY, tie_word_embeddings=tied),
    "qwen2": lambda tied: Qwen2Config(**ROTARY, tie_word_embeddings=tied),
    "opt": lambda tied: OPTConfig(
        ffn_dim=37, max_position_embeddings=32, word_embed_proj_dim=22, **SIZES, **TOKENS, tie_word_embeddings=tied
    ),
    # initialised by trunc_normal_, which draws again and again until all values are within bounds
    "modernbert-decoder": lambda tied: ModernBertDecoderConfig(
        intermediate_size=37, cls_token_id=0, sep_token_id=0, **SIZES, **TOKENS, tie_word_embeddings=tied
    ),
}


def gpt2_config(**values: Any) -> GPT2Config:
    sizes = dict(vocab_size=61, n_embd=30, n_layer=3, n_head=3, n_positions=17, bos_token_id=0, eos_token_id=0)
    return GPT2Config(**{**sizes, **values})


def parts(model: nn.Module) -> Iterator[set[str]]:
    """Sets of names to own: all, none, both ends, and sets that cut through layers."""
    names = [name for name, _ in model.named_parameters()]
    half = len(names) // 2
    yield from map(set, (names, [], names[:half], names[half:], names[::2], names[1::2], ["lm_head.weight"]))


def assert_initialises_alike(
    config: PreTrainedConfig, owned: set[str], build: Callable[..., PreTrainedModel], **kwargs: Any
) -> PreTrainedModel:
    """Owned values, buffers, tying and the generator afterwards are those of the whole model."""
    torch.manual_seed(3)
    whole = build(copy.deepcopy(config), **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    part = initialise_owned(config, owned.__contains__, build, **kwargs)
    assert torch.equal(state, torch.get_rng_state())
    assert part.training == whole.training
    assert [names for _, names in names_of_parameters(part)] == [names for _, names in names_of_parameters(whole)]
    for (expected, names), (found, _) in zip(names_of_parameters(whole), names_of_parameters(part), strict=True):
        assert (expected.shape, expected.dtype, expected.stride()) == (found.shape, found.dtype, found.stride())
        assert expected.requires_grad == found.requires_grad
        assert found.is_meta != bool(owned.intersection(names))
        assert found.is_meta or torch.equal(expected, found)
    buffers = dict(part.named_buffers())
    for name, expected in whole.named_buffers():
        assert torch.equal(expected, buffers[name])
    return part


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("piece", [initialising.PIECE, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_whole_model(
    name: str, tied: bool, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialising, "PIECE", piece)
    config = CONFIGS[name](tied)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    for owned in parts(skeleton):
        assert_initialises_alike(config, owned, AutoModelForCausalLM.from_config, dtype=dtype)


def test_by_a_model_class() -> None:
    config = gpt2_config()
    owned = {"transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"}
    part = assert_initialises_alike(config, owned, GPT2LMHeadModel)
    assert type(part) is GPT2LMHeadModel
    assert part.lm_head.weight is part.transformer.wte.weight


def test_parts_make_the_whole() -> None:
    config = gpt2_config()
    torch.manual_seed(0)
    whole = GPT2LMHeadModel(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    expected = whole(ids).logits
    for parity in (0, 1):
        torch.manual_seed(0)
        part = initialise_owned(config, lambda name, p=parity: len(name) % 2 == p, GPT2LMHeadModel)
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if len(name) % 2 == parity:
                    parameter.fill_(float("nan")).copy_(part.get_parameter(name))
    assert torch.equal(whole(ids).logits, expected)


def test_the_dry_construction_leaves_the_configuration_alone() -> None:
    def build(config: GPT2Config) -> GPT2LMHeadModel:
        config.n_layer += 1
        return GPT2LMHeadModel(config)

    config = gpt2_config(n_layer=1)
    part = initialise_owned(config, lambda name: True, build)
    assert len(part.transformer.h) == 2
    assert part.config is config


# ---- random numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", ["normal_", "uniform_"])
@pytest.mark.parametrize("own_generator", [True, False])
def test_pieces_use_the_generator_as_the_whole_does(
    fill: str, dtype: torch.dtype, own_generator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialising, "PIECE", 64)
    memory = torch.empty(64 + 16, dtype=dtype)
    for numel in (1, 5, 16, 17, 63, 64, 65, 79, 80, 81, 128, 143, 144, 1000, 1003):
        generator = torch.Generator() if own_generator else torch.default_generator
        generator.manual_seed(numel)
        getattr(torch.empty(numel, dtype=dtype), fill)(generator=generator)
        expected = generator.get_state()
        generator.manual_seed(numel)
        draw_in_pieces(fill, numel, memory, generator if own_generator else None)
        assert torch.equal(expected, generator.get_state())


class Odd(PreTrainedModel):
    """A model that initialises in all the ways that the libraries' own models don't."""

    config_class = GPT2Config
    base_model_prefix = "odd"

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.turned = nn.Parameter(torch.empty(9, 7).t())  # not contiguous: drawn by another algorithm
        self.tiny = nn.Parameter(torch.empty(3, 5))  # less than 16 elements: likewise
        self.narrow = nn.Parameter(torch.empty(40, 5))
        self.first = nn.Linear(8, 4)
        self.twin = nn.Linear(8, 4)
        self.twin.weight = self.first.weight  # tied by hand
        self.third = nn.Linear(8, 4)
        self.third.weight = self.first.weight  # and untied again
        self.third.weight = nn.Parameter(torch.ones(4, 8))
        self.seen = nn.Parameter(torch.randn(11))
        self.fitted = nn.Parameter(torch.rand_like(self.narrow) * self.narrow.shape[0])
        self.register_parameter("none", None)
        self.wide = nn.Linear(nn.Linear(6, 5).out_features, 31)  # a module that is not kept
        self.register_buffer("noise", torch.rand(4, device="cpu"))
        self.add_more()
        self.post_init()

    def add_more(self) -> None:
        """For the variants below."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.normal_(self.turned)
            nn.init.normal_(self.tiny)
            nn.init.trunc_normal_(self.narrow, std=1.0, a=-0.5, b=0.5)
        elif module is self.wide:
            module.weight.data.normal_(mean=1.0)
            nn.init.xavier_uniform_(module.weight)
            module.bias.uniform_()
            module.bias.mul_(module.bias.abs().max())


ODD = (
    "turned",
    "tiny",
    "narrow",
    "first.weight",
    "twin.weight",
    "third.weight",
    "seen",
    "fitted",
    "wide.weight",
    "wide.bias",
)


@pytest.mark.parametrize(
    "owned", [set(), *({name} for name in ODD), set(ODD[::2]), set(ODD)], ids=lambda owned: " ".join(sorted(owned))
)
def test_odd_ways_to_initialise(owned: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialising, "PIECE", 32)
    assert_initialises_alike(gpt2_config(), owned, Odd)


# ---- refusals ----


class Copying(Odd):
    def add_more(self) -> None:
        self.copied = nn.Parameter(torch.empty(40, 5))
        nn.init.normal_(self.narrow)
        with torch.no_grad():
            self.copied.copy_(self.narrow)


class Cloning(Odd):
    def add_more(self) -> None:
        self.other = copy.deepcopy(self.wide)


class Sharing(Odd):
    def add_more(self) -> None:
        self.part = nn.Parameter(torch.empty(0))
        self.part.data = self.narrow.data[:3]


class Fickle(Odd):
    def add_more(self) -> None:
        if not self.tiny.is_meta:
            self.late = nn.Parameter(torch.empty(2))


@pytest.mark.parametrize(
    "build, owned, message",
    [
        (Copying, {"copied"}, "copies a parameter that this process does not own"),
        (Cloning, {"other.weight"}, "makes its parameter other.weight of other parameters"),
        (Sharing, {"part"}, "makes its parameter part of other parameters"),
        (Fickle, {"tiny"}, "does not register the same parameters on the meta device"),
    ],
)
def test_models_that_need_foreign_values_are_refused(build: type[Odd], owned: set[str], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        initialise_owned(gpt2_config(), owned.__contains__, build)


def test_what_needs_no_foreign_values_is_not_refused() -> None:
    assert_initialises_alike(gpt2_config(), {"copied", "narrow"}, Copying)
    assert_initialises_alike(gpt2_config(), {"tiny", "wide.weight"}, Cloning)


def test_another_default_device_is_refused() -> None:
    with torch.device("meta"), pytest.raises(UnsupportedOptionError, match="the default device is meta"):
        initialise_owned(gpt2_config(), lambda name: True)


def test_nothing_stays_behind() -> None:
    hooks = nn.modules.module._global_parameter_registration_hooks
    initialise_owned(gpt2_config(), lambda name: False, GPT2LMHeadModel)
    with pytest.raises(UnsupportedModelError):
        initialise_owned(gpt2_config(), {"copied"}.__contains__, Copying)
    assert not hooks
    assert not torch.overrides._get_current_function_mode_stack()
