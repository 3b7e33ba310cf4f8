"""Every command with any arguments, and with any content of the files that it reads: it does what it says, or says why not."""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import JSON, TEXTS, cleaned, command, fuzzed, replaced
from helpers import tiny_gpt2
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from hf_ouroboros import cli
from hf_ouroboros.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel
from hf_ouroboros.simulate.simulator import StageCost, simulate

SIZES = ["--batch", "1", "--seq", "8"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a timeline, an old checkpoint, and names that stand in the way."""
    folder = tmp_path_factory.mktemp("original")
    tiny_gpt2().config.save_pretrained(folder / "model")
    found = simulate("lockstep", [0, 1, 0], [StageCost(0.5, 1.0), StageCost(1.0, 2.0), StageCost(0.5, 1.0)], 2)
    (folder / "run.json").write_text(json.dumps(found.timeline.to_chrome_trace()))
    sizes = {"d_model": 8, "d_embed": 8, "n_head": 2, "d_head": 4, "d_inner": 8, "n_layer": 2, "vocab_size": 29}
    model = TransfoXLLMHeadModel(TransfoXLConfig(**sizes, cutoffs=[], div_val=1, tie_projs=[False], mem_len=4))
    (folder / "old").mkdir()
    model.config.save_pretrained(folder / "old")
    torch.save(model.state_dict(), folder / "old" / "pytorch_model.bin")
    words = ["<eos>", *(f"word{i}" for i in range(28))]
    vocabulary = {"idx2sym": words, "sym2idx": {word: i for i, word in enumerate(words)}}
    (folder / "old" / "vocab.pkl").write_bytes(pickle.dumps(vocabulary))
    (folder / "file").write_bytes(b"\xff\x00 no text")
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    return folder


@pytest.fixture(scope="module")
def place(original: Path) -> Path:
    """The copy of it in which commands are run."""
    return Path(shutil.copytree(original, original.with_name("place"), symlinks=True))


@pytest.fixture(autouse=True)
def _cache_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ouroboros.planning.measure.CACHE", place / "cache")


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture in eight is really drawn: they take more time than all the rest."""
    real, calls = Figure.savefig, itertools.count()

    def savefig(figure: Figure, path: Path, **options: object) -> None:
        real(figure, path, **options) if next(calls) % 8 == 0 else Path(path).write_bytes(b"picture")

    monkeypatch.setattr(Figure, "savefig", savefig)


# ---- arguments ----

PATHS = ["model", "run.json", "old", "file", "folder", "dangling", "new", "new/deep/x", "file/below", "/dev/zero", "/dev/null",
         "/proc/self/x", "x" * 300, "new.png", "new.html", "folder/p.png", ".", "..", ""]  # fmt: skip
OVERRIDES = ["n_layer=3", "n_layer=0", "n_layer=-1", "n_layer=1000000000", "n_layer=x", "n_embd=7", "n_embd=0", "n_head=0",
             "n_head=3", "vocab_size=0", "vocab_size=-1", "vocab_size=10000000000000", "n_positions=4", "n_inner=x", "dtype=int8",
             "dtype=bfloat16", "tie_word_embeddings=false", "activation_function=none", "resid_pdrop=9", "pad_token_id=99",
             "id2label={0: 1}", "n_layer=2,n_embd=16", "attn_implementation=x", "model_type=llama"]  # fmt: skip
LIKELY: dict[str, list[str]] = {
    "model": ["model", "model/config.json", "gpt2", "llama", "nobody/nothing", "bert", "mamba", "transfo-xl", *PATHS],
    "config_overrides": OVERRIDES,
    "devices": ["t4", "2xt4", "3xrtx3090", "9xl4", "4x10tflops/8gb", "0xt4", "1000000000xt4", "1x0tflops/8gb", "1x9tflops/1e9gb",
                "cpu:0", "cpu:1", "cuda:0", "cpu:99999999999", "0.001tflops/0.001gb"],
    "kind": ["t4", "2xt4", "cpu:0", "9tflops/8gb", "0.001tflops/0.001gb"],
    "file": ["run.json", "model/config.json", *PATHS],
    "output": PATHS,
    "source": ["old", *PATHS],
    "target": [path for path in PATHS if path != ".."],
    "config": ["{}", '{"mem_len": 2}', '{"n_layer": 3}', '{"n_layer": 1000000000}', '{"d_inner": null}', '{"cutoffs": [3, 9]}'],
    "micro_batches": ["1", "3", "8", "64"],
    "counts": ["1", "2", "5", "16"],
    "seq": ["1", "8", "64", "16777216"],
    "batch": ["1", "2", "1048576"],
}  # fmt: skip
ANY_NUMBER = [
    "0",
    "1",
    "2",
    "-1",
    "1e-7",
    "0.5",
    "25",
    "nan",
    "inf",
    "-inf",
    "1e300",
    "1000000000",
    "1e999",
    "0x10",
    "1_0",
]
# What is quick, and does not end in an error.
BASE = {"plan": ["model", "--devices", "2xt4", "--micro_batches", "2", *SIZES],
        "simulate": ["model", *SIZES, "--counts", "2", "--schedules", "1f1b"],
        "trace": ["run.json"], "convert-transfo-xl": ["old", "new"], "env": []}  # fmt: skip


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    return next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


@st.composite
def command_lines(draw: st.DrawFn, name: str) -> list[str]:
    """Sensible arguments of a command, some of them exchanged or added."""
    actions = [action for action in parsers()[name]._actions if action.dest != "help"]
    words = list(BASE[name])
    positional = [action for action in actions if not action.option_strings]
    for i, action in enumerate(positional):
        if draw(st.integers(0, 3)) == 0:
            words[i] = draw(_word(action))
    options = [action for action in actions if action.option_strings]
    for action in draw(st.lists(st.sampled_from(options), min_size=words == BASE[name], max_size=3)) if options else []:
        words.append(action.option_strings[-1])
        if action.nargs == 0:
            continue
        least, most = (action.nargs,) * 2 if isinstance(action.nargs, int) else (1, 3 if action.nargs == "+" else 1)
        words += draw(st.lists(_word(action), min_size=least, max_size=most))
    if draw(st.integers(0, 15)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(TEXTS))
    return words


def _word(action: argparse.Action) -> st.SearchStrategy[str]:
    likely = [*map(str, action.choices or ()), *LIKELY.get(action.dest, ())]
    return st.one_of(*([st.sampled_from(likely)] * 3 if likely else []), st.sampled_from(ANY_NUMBER), TEXTS)


def test_every_command_is_fuzzed() -> None:
    assert parsers().keys() == BASE.keys()


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.parametrize("name", BASE)
def test_arguments(name: str, place: Path, original: Path) -> None:
    @fuzzed(share={"trace": 1.5, "convert-transfo-xl": 1.5, "env": 0.2}.get(name, 1.0))
    @given(command_lines(name))
    def run(words: list[str]) -> None:
        with cleaned(place, original):
            outcome = command(place, name, *words)
            if outcome.status == 0 and name != "env" and not {"-h", "--help"} & set(words):
                assert outcome.files, words

    run()


# ---- contents of files ----

PATH_INTO = st.lists(st.integers(0, 40), min_size=1, max_size=4)


@fuzzed()
@given(st.lists(st.tuples(PATH_INTO, JSON), min_size=1, max_size=3), st.sampled_from(["new.png", "new.html"]))
def test_timelines(place: Path, original: Path, changes: list, output: str) -> None:
    content = json.loads((place / "run.json").read_text())
    for path, new in changes:
        content = replaced(content, path, new)
    with cleaned(place, original):
        (place / "other.json").write_text(_json(content))
        outcome = command(place, "trace", "other.json", "--output", output)
        assert (outcome.status == 0) == (outcome.files == {output})


@pytest.mark.slow
@pytest.mark.usefixtures("few_pictures")
@fuzzed(share=1.5)
@given(st.lists(st.tuples(PATH_INTO, JSON), min_size=1, max_size=3), st.sampled_from(["gpt2", "llama", "bert"]))
def test_configurations(place: Path, original: Path, changes: list, model_type: str) -> None:
    content = json.loads((place / "model" / "config.json").read_text()) | {"model_type": model_type}
    for path, new in changes:
        content = replaced(content, path, new)
    with cleaned(place, original):
        (place / "config.json").write_text(_json(content))
        command(place, "plan", "config.json", "--devices", "2xt4", *SIZES, "--output", "new")


@fuzzed(share=1.5)
@given(
    st.sampled_from(["run.json", "model/config.json", "old/config.json", "old/pytorch_model.bin", "old/vocab.pkl"]),
    st.one_of(st.integers(0, 2000), st.none()),
    st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4)), max_size=4),
    st.booleans(),
)
def test_damaged_files(place: Path, original: Path, name: str, length: int | None, changes: list, stubs: bool) -> None:
    content = bytearray((place / name).read_bytes()[:length])
    for position, new in changes:
        position %= len(content) + 1
        content[position : position + len(new)] = new
    with cleaned(place, original):
        (place / name).write_bytes(content)
        if name == "run.json":
            command(place, "trace", name, "--output", "new.png")
        elif name.startswith("model"):
            command(place, "plan", "model", "--devices", "t4", *SIZES, "--output", "new")
        else:
            command(place, "convert-transfo-xl", "old", "new", *(["--allow_stubs"] if stubs else []))


OPCODES = [
    bytes([code])
    for code in b"().012FIJKLMNPQRSTUVXabcdeghijlopqrstu}]\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x92\x93\x94\x95"
]
PIECES = [*OPCODES, b"\x80\x02", b"}", b"]", b"K\x01", b"I5\n", b"X\x01\x00\x00\x00a", b"q\x00", b"h\x00", b"r\xff\xff\xff\xff",
          b"ccollections\nCounter\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n", b"cos\nsystem\n", b"cx\ny\n", b")R", b"\x85R",
          b"X\x07\x00\x00\x00idx2sym", b"X\x07\x00\x00\x00sym2idx", b"u", b"s", b"h\x00h\x00\x86q\x00", b"2\x86"]  # fmt: skip


@fuzzed(share=2.0)
@given(st.lists(st.sampled_from(PIECES), max_size=40), st.booleans())
def test_pickles(place: Path, original: Path, pieces: list[bytes], stubs: bool) -> None:
    with cleaned(place, original):
        (place / "source").mkdir()
        (place / "source" / "vocab.pkl").write_bytes(b"".join(pieces) + b".")
        command(place, "convert-transfo-xl", "source", "new", *(["--allow_stubs"] if stubs else []))


def _json(content: object) -> str:
    text = json.dumps(content)
    return text.encode("utf-8", "replace").decode()
