"""Old checkpoints, of transformers 4 and of the original repository, to what transformers 5 loads."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from transfo_xl_cases import KINDS, tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ouroboros.cli import main
from hf_ouroboros.errors import OutputFileError
from hf_ouroboros.models.transfo_xl import TransfoXLLMHeadModel
from hf_ouroboros.models.transfo_xl.conversion import convert
from hf_ouroboros.models.transfo_xl.errors import ConversionError

WORDS = ["<eos>", "<unk>", *(f"word{i}" for i in range(27))]
# The original repository shares relative biases; what else its state dicts don't tell has to be given.
UNTOLD = dict(mem_len=6, clamp_len=-1, same_length=False, pre_lnorm=False)
ORIGINALS = {
    "plain": {},
    "narrow": dict(d_embed=6),
    "wikitext": dict(cutoffs=[8, 20]),
    "wikitext_narrow": dict(cutoffs=[8, 20], d_embed=6),
    "billion": dict(cutoffs=[8, 20], div_val=2),
    "divided_untied_projections": dict(cutoffs=[8, 20], div_val=2, proj_share_all_but_first=False),
    "divided_untied": dict(cutoffs=[8, 20], div_val=2, tie_word_embeddings=False),
    "divided_uncut": dict(div_val=2),
}


def original_state(model: TransfoXLLMHeadModel) -> dict[str, torch.Tensor]:
    """The parameters as the original repository names and orders them."""
    state = {name.removeprefix("transformer."): tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("crit.cluster_weight", "crit.cluster_bias"):
        if name in state:
            state[name] = state[name].flip(0)
    return state | {"pos_emb.inv_freq": torch.ones(4)}


def assert_same_function(one: TransfoXLLMHeadModel, other: TransfoXLLMHeadModel) -> None:
    first, second = (dict(model.named_parameters(remove_duplicate=False)) for model in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert len(list(one.parameters())) == len(list(other.parameters()))
    ids = tokens(2, 5)
    assert torch.equal(one.eval()(ids).logits, other.eval()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_4(kind: str, tmp_path: Path) -> None:
    model = tiny_model(**KINDS[kind], mem_init="zeros")
    source, target = tmp_path / "old", tmp_path / "new"
    source.mkdir()
    values = model.config.to_dict()
    del values["mem_init"]
    (source / "config.json").write_text(json.dumps(values))
    torch.save(model.state_dict() | {"transformer.pos_emb.inv_freq": torch.ones(4)}, source / "pytorch_model.bin")
    vocabulary = {"idx2sym": WORDS, "sym2idx": {word: i for i, word in enumerate(WORDS)}}
    (source / "vocab.pkl").write_bytes(pickle.dumps(vocabulary))
    convert(source, target)
    assert sorted(path.suffix for path in target.iterdir()).count(".safetensors") == 1
    assert not [path for path in target.iterdir() if path.suffix not in (".json", ".safetensors")]
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.config.mem_init == "zeros"
    assert_same_function(model, loaded)
    inputs = AutoTokenizer.from_pretrained(target)("word3 word0", return_tensors="pt")
    assert inputs.input_ids.tolist() == [[5, 2, 0]]
    assert loaded.generate(**inputs, max_new_tokens=2, eos_token_id=None).shape == (1, 5)


@pytest.mark.parametrize("kind", ORIGINALS)
def test_state_dicts_of_the_original_repository(kind: str, tmp_path: Path) -> None:
    model = tiny_model(**ORIGINALS[kind], untie_r=False)
    torch.save(original_state(model), tmp_path / "model.pt")
    given = dict(UNTOLD)
    if model.config.div_val == 1 and model.config.cutoffs:
        with pytest.raises(ConversionError, match="don't tell cutoffs"):
            convert(tmp_path, tmp_path / "new", given)
        given["cutoffs"] = model.config.cutoffs
    convert(tmp_path, tmp_path / "new", given)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.config.mem_init == "masked"
    assert_same_function(model, loaded)


def test_what_parameters_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    torch.save(original_state(tiny_model(untie_r=False)), tmp_path / "model.pt")
    with pytest.raises(ConversionError, match="mem_len, clamp_len, same_length, pre_lnorm"):
        convert(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("legacy", (False, True))
@pytest.mark.parametrize("kind", ("plain", "wikitext_narrow", "billion"))
def test_whole_modules_of_the_original_repository(kind: str, legacy: bool, tmp_path: Path) -> None:
    model = tiny_model(**ORIGINALS[kind], untie_r=False)
    torch.save(pickled_module(model), tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    del sys.modules["mem_transformer"]
    with pytest.raises(ConversionError, match="allow_stubs"):
        convert(tmp_path, tmp_path / "new")
    loaded, _ = convert(tmp_path, tmp_path / "new", allow_stubs=True)
    told = dict(mem_len=5, clamp_len=4, dropout=0.25, dropatt=0.125, same_length=False, mem_init="masked")
    assert {name: getattr(loaded.config, name) for name in told} == told
    model.config.mem_len, model.config.clamp_len = 5, 4
    assert_same_function(model, loaded)


def pickled_module(model: TransfoXLLMHeadModel) -> nn.Module:
    """A module of a class that can't be imported where it is read, put together like the original's."""
    module_type = types.ModuleType("mem_transformer")
    sys.modules["mem_transformer"] = module_type
    for name in ("MemTransformerLM", "Part"):
        setattr(module_type, name, type(name, (nn.Module,), {"__module__": "mem_transformer"}))
    root = module_type.MemTransformerLM()
    for name, tensor in original_state(model).items():
        *parents, leaf = name.split(".")
        part = root
        for parent in parents:
            if parent not in part._modules:
                part.add_module(parent, module_type.Part())
            part = part._modules[parent]
        part.register_parameter(leaf, nn.Parameter(tensor))
    root.mem_len, root.clamp_len, root.same_length, root.ext_len, root.attn_type = 5, 4, 0, 0, 0
    root.drop = nn.Dropout(0.25)
    root.word_emb.cutoffs = [*model.config.cutoffs, model.config.vocab_size]
    root.layers.get_submodule("0.dec_attn").pre_lnorm = False
    root.layers.get_submodule("0.dec_attn").dropatt = nn.Dropout(0.125)
    return root


def test_vocabulary_alone_and_from_a_pickled_corpus(tmp_path: Path) -> None:
    module_type = types.ModuleType("data_utils")
    sys.modules["data_utils"] = module_type
    for name in ("Corpus", "Vocab"):
        setattr(module_type, name, type(name, (), {"__module__": "data_utils"}))
    corpus = module_type.Corpus()
    corpus.vocab = module_type.Vocab()
    corpus.vocab.__dict__.update(idx2sym=WORDS, sym2idx={word: i for i, word in enumerate(WORDS)}, lower_case=True)
    corpus.train = torch.arange(4)
    torch.save(corpus, tmp_path / "cache.pt")
    del sys.modules["data_utils"]
    model, tokenizer = convert(tmp_path, tmp_path / "new", allow_stubs=True)
    assert model is None and tokenizer("WORD3").input_ids == [5, 0]
    assert not (tmp_path / "new" / "config.json").exists()


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="neither a checkpoint"):
        convert(tmp_path, tmp_path / "new")
    model = tiny_model(**KINDS["wikitext"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        convert(tmp_path, tmp_path / "new")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="mismatched keys"):
        convert(tmp_path, tmp_path / "new", {"d_inner": 13})
    with pytest.raises(ConversionError, match=r"missing keys: .*layers\.2\."):
        convert(tmp_path, tmp_path / "new", {"n_layer": 3})
    with pytest.raises(ConversionError, match=r"unexpected keys: .*layers\.1\."):
        convert(tmp_path, tmp_path / "new", {"n_layer": 1})
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ConversionError, match="has 2 words, the model 29"):
        convert(tmp_path, tmp_path / "new")
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="neither a state dict nor a module"):
        convert(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def run(*arguments: str) -> int:
    return main(["convert-transfo-xl", *arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "old", tmp_path / "new"
    tiny_model().save_pretrained(source)
    (source / "vocab.txt").write_text("\n".join(WORDS))
    assert run(str(source), str(target), "--config", '{"mem_len": 9}', "--no_eos") == 0
    output = capsys.readouterr().out
    assert "parameters in" in output and "29 words in" in output
    assert AutoModelForCausalLM.from_pretrained(target).config.mem_len == 9
    assert AutoTokenizer.from_pretrained(target)("word0").input_ids == [2]
    shutil.rmtree(source)
    source.mkdir()
    assert run(str(source), str(target)) == 1
    assert "error: " in capsys.readouterr().err
    for wrong in ("[]", "mem_len=9"):
        with pytest.raises(SystemExit):
            run(str(source), str(target), "--config", wrong)
    assert "--config" in capsys.readouterr().err


def test_the_parser_needs_no_torch() -> None:
    """`hf-ouroboros plan` and `env` shall not wait for transformers' import."""
    code = "import sys, hf_ouroboros.models.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_target_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "old", tmp_path / "new"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(WORDS))
    target.write_text("mine")
    assert run(str(source), str(target)) == 1
    told = capsys.readouterr()
    assert "is a file, not a folder" in told.err and not told.out
    assert target.read_text() == "mine"


def test_all_files_or_none(tmp_path: Path) -> None:
    source, target = tmp_path / "old", tmp_path / "new"
    tiny_model().save_pretrained(source)
    (source / "vocab.txt").write_text("\n".join(WORDS))
    (target / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(OutputFileError, match=r"tokenizer\.json' is a folder"):
        convert(source, target)
    assert [path.name for path in target.iterdir()] == ["tokenizer.json"]
    convert(source, source)  # over itself
    assert AutoTokenizer.from_pretrained(source)("word0").input_ids == [2, 0]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"n_layer": "x"}', b'{"n_layer": 1000000000}',
                b'{"d_inner": 1000000000}', b'{"cutoffs": 5}', b'{"d_model": null}', b'{"n_head": 0}'],
)  # fmt: skip
def test_malformed_configurations(content: bytes, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    try:
        content = json.dumps(own | json.loads(content)).encode()
    except (ValueError, TypeError, RecursionError):
        pass
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConversionError, match="config"):
        convert(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "vocab.pkl", "vocab.txt"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"PK\x03\x04" + b"x" * 60, b"\x80\x02K\x01.", b"\x80\x02}."])
def test_damaged_files(name: str, content: bytes, tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    for stubs in (False, True):
        if name == "vocab.txt" and b"\xff" not in content and content:
            continue  # words, whatever they mean
        with pytest.raises(ConversionError, match=f"{name}|no words"):
            convert(tmp_path, tmp_path / "new", allow_stubs=stubs)


def test_one_number_viewed_as_many(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    state = {name: torch.zeros(1).as_strided((2**20, 2**20), (0, 0)) for name in model.state_dict()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"holds tensors of [0-9,]+ bytes in a file of"):
        convert(tmp_path, tmp_path / "new")


def test_modules_that_hold_each_other(tmp_path: Path) -> None:
    module_type = types.ModuleType("mem_transformer")
    sys.modules["mem_transformer"] = module_type
    module_type.Part = type("Part", (), {"__module__": "mem_transformer"})
    for loop in (False, True):
        root = part = module_type.Part()
        for _ in range(60):
            part._modules, part._parameters = {"a": module_type.Part()}, {}
            part._modules["b"] = part._modules["a"]
            part = part._modules["a"]
        part._modules, part._parameters = ({"a": root} if loop else {}), {}
        torch.save(root, tmp_path / "model.pt")
        with pytest.raises(ConversionError, match="hold each other without end|hold themselves|again and again"):
            convert(tmp_path, tmp_path / "new", allow_stubs=True)
    del sys.modules["mem_transformer"]
