"""Options, overrides and text of the recipes, without training."""

from __future__ import annotations

from pathlib import Path

import pretrain_lm
import pytest
from common import OptionError, count_characters, limit_bytes, parse_options, read_overrides
from running import RECIPES
from transformers import GPT2Config, LlamaConfig

from hf_ouroboros import UnsupportedOptionError
from hf_ouroboros.data import byte_tokenizer


def parse(arguments: list[str]):
    return parse_options(pretrain_lm.ScriptArguments, pretrain_lm.DEFAULTS, arguments)


def test_stdlib_config_spells_out_the_defaults() -> None:
    script, args = parse([])
    from_file, file_args = parse(["--config", str(RECIPES / "configs/gpt2_stdlib.yaml")])
    assert from_file.max_train_bytes == pretrain_lm.CORPUS_BYTES
    assert from_file.config_overrides == pretrain_lm.OVERRIDES["gpt2"]
    from_file.max_train_bytes = from_file.config_overrides = None
    assert from_file == script
    assert {**file_args.to_dict(), "logging_dir": None} == {**args.to_dict(), "logging_dir": None}


def test_configs_have_known_options_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune_lm

    for path in sorted((RECIPES / "configs").glob("*.yaml")):
        module = finetune_lm if "completion" in path.name else pretrain_lm
        command = ["--config", str(path), "--devices", "cpu:0", "cpu:1", "--bf16", "false", "--num_stages", "3"]
        _, args = parse_options(module.ScriptArguments, module.DEFAULTS, command)
        assert args.devices == ["cpu:0", "cpu:1"]  # the command line wins, also over a list


def test_config_values_are_typed_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-4\ndevice_map: [2, 1, 1]\ntrain_file: [a, b]\nblock_size: 16\nseed: null\n")
    script, args = parse([f"--config={path}", "--block_size", "24"])
    assert (args.learning_rate, args.device_map, script.train_file, script.block_size) == (
        1e-4,
        "[2, 1, 1]",
        ["a", "b"],
        24,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "'learning_rat', which is no option"),
        ("- a", "must hold 'option: value'"),
        ("a: [", "is not YAML"),
        (None, "does not exist"),
    ],
)
def test_bad_configs_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=message):
        parse(["--config", str(path)])


def test_config_types_and_choices_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    for text, message in (("block_size: many", "--block_size"), ("schedule: fast", "--schedule")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            parse(["--config", str(path)])
        assert message in capsys.readouterr().err


def test_unsupported_options_fail_early() -> None:
    with pytest.raises(UnsupportedOptionError, match="fp16_full_eval"):
        parse(["--fp16_full_eval", "true"])
    with pytest.raises(OptionError, match="an option of training can't be used"):
        parse(["--lr_scheduler_kwargs", "{x"])


def test_overrides_have_the_type_of_the_configuration() -> None:
    found = read_overrides(
        " n_layer=3, resid_pdrop=0,layer_norm_epsilon=1e-6, scale_attn_weights=false,activation_function=relu",
        GPT2Config(),
    )
    assert found == {
        "n_layer": 3,
        "resid_pdrop": 0.0,
        "layer_norm_epsilon": 1e-6,
        "scale_attn_weights": False,
        "activation_function": "relu",
    }
    assert [type(value) for value in found.values()] == [int, float, float, bool, str]
    nested = read_overrides(
        "rope_parameters={rope_type: default, rope_theta: 5000.0},num_hidden_layers=2", LlamaConfig()
    )
    assert nested == {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layers=3", "no option 'n_layers'"),
        ("n_layer", "not of the form"),
        ("n_layer=2.5", "n_layer must be int, got '2.5'"),
        ("n_layer=true", "n_layer must be int"),
        ("resid_pdrop=none", "resid_pdrop must be float"),
        ("scale_attn_weights=1", "must be bool"),
    ],
)
def test_bad_overrides_are_named(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_overrides(text, GPT2Config())


def test_limit_bytes_cuts_whole_characters() -> None:
    assert list(limit_bytes(["abc", "äöü", "x"], 6)) == ["abc", "ä"]
    assert list(limit_bytes(["abc", "x"], 3)) == ["abc"]
    assert list(limit_bytes(["abc", "x"], None)) == ["abc", "x"]


def test_characters_are_bytes_under_the_byte_tokenizer() -> None:
    assert count_characters(["aä", "b"], byte_tokenizer()) == (4, "byte")
