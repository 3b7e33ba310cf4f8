"""benchmark.py: its contenders, its tables, and tiny runs end to end."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import benchmark
import psutil
import pytest
import torch
from benchmarking import launch, peers, report, sharded, trainers
from benchmarking.clock import Clock
from benchmarking.contenders import ContenderError, parse_contender
from benchmarking.job import Job, build_model, muon_matrices, tables
from benchmarking.options import THROUGHPUT, TIME_TO_LOSS, BenchmarkArguments
from benchmarking.pipelines import PIPELINES
from benchmarking.text import read_blocks, write_blocks
from running import RECIPES, run
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from trainer_helpers import EVERY
from transformers import GPT2Config, GPT2LMHeadModel, T5Config

from hf_ouroboros import OuroborosArguments, OuroborosTrainer

TINY = {"n_embd": 32, "n_layer": 4, "block_size": 32, "batch_size": 2, "repetitions": 1}


def contender(text: str):
    return parse_contender(text, micro_batches=4, global_batch=16, num_devices=2)


def contender_of_tiny(text: str):
    """A contender of a benchmark with `TINY`."""
    return parse_contender(text, micro_batches=4, global_batch=8, num_devices=2)


def command(folder: Path, contenders: list[str], values: dict[str, object]) -> list[str]:
    """A command line of a tiny benchmark on a text that it writes."""
    (folder / "text.txt").write_text("The snake bites its tail, and the tail does not mind. " * 400)
    values = TINY | {"train_file": folder / "text.txt", "output_dir": folder / "out"} | values
    return [str(RECIPES / "benchmark.py"), "--contenders", *contenders, *(f"--{k}={v}" for k, v in values.items())]


def test_contenders_are_read() -> None:
    plain = contender("naive")
    assert (plain.kind, plain.in_processes, plain.micro_batches, plain.settings) == ("naive", False, 4, ())
    given = contender("pipelined:M=8,learning_rate=5e-4@processes")
    assert (given.kind, given.in_processes, given.micro_batches) == ("pipelined", True, 8)
    assert given.settings == (("learning_rate", "5e-4"),) and given.is_ours and not given.is_synchronous
    assert contender("torch-zb").in_processes and contender("torch-zb:M=8").is_synchronous
    assert contender("fsdp").in_processes and contender("fsdp:M=8").is_synchronous and not contender("fsdp").is_ours
    assert not contender("1f1b:learning_rate=1").is_synchronous  # it trains something else than the naive run
    for name in THROUGHPUT + TIME_TO_LOSS:
        contender(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("navie", "unknown"),
        ("pipelined@threads", "unknown"),
        ("naive@processes", "@processes is for"),
        ("reference@processes", "@processes is for"),
        ("pipelined:M=3", "does not divide the 16 rows"),
        ("pipelined:M=x", "does not divide"),
        ("ddp:M=1", "use a multiple of 2"),
        ("fsdp:M=1", "its M=1 micro-batches can't be shared by 2 processes"),
        ("fsdp@processes", "@processes is for"),
        ("torch-1f1b:M=1", "use M=2 or more"),
        ("torch-dualpipev:M=2", "it needs a micro-batch per stage; use M=4 or more"),
        ("pipelined:optm=sgd", "'optm=sgd' is no setting"),
        ("naive:schedule=1f1b", "option of TrainingArguments"),
        ("pipelined:max_steps=0", "'max_steps=0' must be a number of updates"),
    ],
)
def test_impossible_contenders_are_named(text: str, words: str) -> None:
    with pytest.raises(ContenderError, match=re.escape(words)):
        contender(text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"updates": 5}, "use 7 or more"),
        ({"contenders": ["naive", "naive"]}, "twice"),
        ({"vocab_size": 100}, "bytes"),
        ({"model_type": "lama"}, "--model_type='lama' is unknown to Transformers"),
        ({"model_type": "llama", "config_overrides": "n_layer=3"}, "has no option 'n_layer'"),
        ({"devices": ["cuda:1", "cuda:0"]}, "cuda:0 cuda:1"),
        (
            {"lora_rank": 4, "contenders": ["naive", "torch-zbv"]},
            "'torch-zbv': it has no stages of a model with adapters",
        ),
        ({"lora_rank": 4, "optimizer": "muon", "contenders": ["naive"]}, "Muon leaves adapters alone"),
        ({"until_loss": "low", "updates": 20}, "a number or 'naive'"),
        ({"until_loss": "naive", "contenders": ["1f1b", "naive"], "updates": 20}, "name naive first"),
        ({"until_loss": "naive", "updates": 15}, "multiple of --eval_every"),
        ({"until_loss": "3", "updates": 20, "contenders": ["1f1b:max_steps=25"]}, "max_steps must be a multiple of"),
    ],
)
def test_impossible_measurements_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(ContenderError, match=words):
        BenchmarkArguments(**values).check()


def test_what_cannot_run_is_left_out_of_the_default_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not BenchmarkArguments().left_out() and len(BenchmarkArguments().parsed_contenders()) == len(THROUGHPUT)
    three = BenchmarkArguments(devices=["cpu:0", "cpu:1", "cpu:2"], updates=20)
    three.check()
    reasons = three.left_out()
    assert {"ddp", "fsdp", "torch-dualpipev"} <= set(reasons) and "torch-dualpipev:M=8" not in reasons
    assert "use a multiple of 3" in reasons["fsdp"] and "use M=6 or more" in reasons["torch-dualpipev"]
    assert set(reasons).isdisjoint(c.label for c in three.parsed_contenders())
    shallow = BenchmarkArguments(n_layer=8, config_overrides="n_layer=3")
    shallow.check()
    assert set(shallow.left_out()) == {f"torch-{n}{m}" for n in ("zb", "zbv", "dualpipev") for m in ("", ":M=8")}
    assert "it has 4 stages, the model 3 layers" in shallow.left_out()["torch-zb"]
    adapters = BenchmarkArguments(lora_rank=4)
    adapters.check()
    assert set(adapters.left_out()) == {name for name in THROUGHPUT if name.startswith("torch-")}
    monkeypatch.delattr("torch.distributed.pipelining.ScheduleDualPipeV")
    assert f"torch {torch.__version__} has no ScheduleDualPipeV" in BenchmarkArguments().left_out()["torch-dualpipev"]
    with pytest.raises(ContenderError, match="has no ScheduleDualPipeV"):
        contender("torch-dualpipev")


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("devices", [2, 3])
def test_stages_lie_where_torch_looks_for_them(name: str, devices: int) -> None:
    pipeline = PIPELINES[name]
    style = "v" if pipeline.is_v else "loop"
    found = generate_stage_to_rank_mapping(devices, devices * pipeline.stages_per_device, style)
    assert pipeline.placement(devices) == [found[stage] for stage in sorted(found)]


def test_layers_are_what_fsdp_shards_one_by_one() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=8, vocab_size=32))
    assert sharded.layers_of(model) == list(model.transformer.h)
    model._no_split_modules = None
    with pytest.raises(ContenderError, match="GPT2LMHeadModel names no layers"):
        sharded.layers_of(model)


def test_planned_lengths() -> None:
    options = BenchmarkArguments(updates=20, until_loss="naive", at_most=1.5)
    lengths = [options.planned_updates(contender(text)) for text in ("naive", "torch-1f1b", "pipelined:max_steps=40")]
    assert lengths == [20, 30, 40]
    assert BenchmarkArguments(updates=20).planned_updates(contender("torch-1f1b")) == 20
    assert BenchmarkArguments(updates=20, until_loss="3.5", at_most=1.5).planned_updates(contender("naive")) == 30


@pytest.mark.parametrize("model_type", ["gpt2", "transfo-xl", "mixtral"])
def test_muon_steps_the_same_matrices_as_ours(tmp_path: Path, model_type: str) -> None:
    options = BenchmarkArguments(model_type=model_type, n_embd=64, n_layer=3, block_size=16, optimizer="muon")
    model = build_model(Job(options, contender("naive"), 0, tmp_path, tmp_path, 1))
    args = OuroborosArguments(output_dir=str(tmp_path), use_cpu=True, delay_compensation="muon", report_to="none")
    stepped = OuroborosTrainer(model=model, args=args).create_optimizer().param_groups
    ours = {id(p) for group in stepped if group["algorithm"] == "muon" for p in group["params"]}
    names = muon_matrices(model)
    assert {id(p) for n, p in model.named_parameters() if n in names} == ours and len(names) >= 12


def test_adapters_are_what_is_trained(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra `peft`")
    options = BenchmarkArguments(model_type="llama", n_embd=64, n_layer=2, block_size=16, lora_rank=4)
    model = build_model(Job(options, contender("naive"), 0, tmp_path, tmp_path, 1))
    assert all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < 20_000


def test_rows_of_a_run_begin_like_those_of_a_longer_one(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(256)) * 8)
    options = BenchmarkArguments(train_file=str(tmp_path / "text"), block_size=16, batch_size=1, micro_batches=2)
    write_blocks(options, tmp_path / "blocks")
    long, short = (
        read_blocks(Job(options, contender("naive"), 0, tmp_path / "blocks", tmp_path, updates)) for updates in (100, 7)
    )
    assert long[0].shape == (200, 16) and torch.equal(long[0][:14], short[0])
    assert set(long[0][:, 0].tolist()) == set(range(0, 256, 16))


def made_up(name: str, speed: float, loss: float = 3.0, **more: object) -> dict[str, object]:
    return {
        "contender": name,
        "tokens_per_second": speed,
        "peak_memory_mib": [10.0],
        "memory_growth_mib": [0.5],
        "training_loss": loss,
        "eval_loss": loss,
        "losses": [loss],
        **more,
    }


def test_ratios_are_taken_within_a_repetition() -> None:
    contenders = [contender(name) for name in ("naive", "pipelined", "1f1b", "ddp")]
    results = [
        [made_up("naive", 10.0), made_up("pipelined", 19.0, loss=3.1, busy_shares=[1.0, 0.9]), made_up("1f1b", 15.0)],
        [made_up("naive", 20.0), made_up("pipelined", 36.0, loss=3.1, busy_shares=[1.0, 0.9]), made_up("1f1b", 30.0)],
        [made_up("naive", 5.0), made_up("pipelined", 10.0, loss=3.1, busy_shares=[1.0, 0.9])],
    ]
    results[2].append(made_up("1f1b", 9.0, loss=3.0004))
    results[2].append({"contender": "ddp", "failed": "rank 1 raised\nValueError: a|b"})
    lines = report.throughput_table(contenders, results, num_devices=2).splitlines()[2:]
    assert "1.90 (1.80 - 2.00) | 95% | 100%, 90% | +0.0%" in lines[1]  # 1.9 / (19/10) is the median of the three
    assert "1.50 (1.50 - 1.80) | 75%" in lines[2] and "losses differ from naive by 1.3e-04" in lines[2]
    assert "differ" not in lines[1]  # delayed: it has losses of its own
    assert "failed: rank 1 raised ValueError: a\\|b" in lines[3]


def test_targets_are_crossed_between_evaluations() -> None:
    found = {"target": 2.0, "tokens_per_update": 100, "evaluations": [(10, 5.0, 3.0), (20, 9.0, 1.0), (30, 13.0, 0.5)]}
    assert report.crossing(found) == (7.0, 15.0) and report.tokens_to_target(found) == 1500.0
    assert report.crossing(found | {"target": 3.5}) == (5.0, 10)
    assert report.crossing(found | {"target": 0.1}) is None


def test_the_clock_runs_until_the_pipeline_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = object.__new__(trainers.MeasuredOuroborosTrainer)
    trainer.clock = Clock()
    trainer.synchronize = lambda: time.sleep(0.2)
    monkeypatch.setattr(OuroborosTrainer, "evaluate", lambda self: time.sleep(2.0))
    trainer.clock.restart()
    trainer.evaluate()
    assert 0.2 <= trainer.clock.now() < 2.0


@pytest.mark.slow
def test_synchronous_contenders_agree_and_failures_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = "pipelined:optim=lomo@processes"  # a named error in both processes
    exact = ["ddp", "torch-gpipe", "torch-1f1b", "torch-zb:M=8"]
    contenders = ["naive", *exact, failing, "1f1b@processes", "pipelined"]
    monkeypatch.setattr("sys.argv", command(tmp_path, contenders, {"updates": 7}))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # otherwise it starts itself anew
    monkeypatch.setattr("signal.signal", lambda *_: None)
    benchmark.main()
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "out/results.json").read_text())
    runs = {result["contender"]: result for result in found["results"][0]}
    assert list(runs) == contenders
    assert "UnsupportedOptionError" in runs[failing]["failed"]
    assert "failed: rank" in printed and "losses differ" not in printed
    differences = found["loss_differences"]
    assert differences.keys() == {"naive", *exact, "1f1b@processes"}
    assert max(differences.values()) < 1e-6  # another order of summation
    assert runs["pipelined"]["eval_loss"] != pytest.approx(runs["naive"]["eval_loss"], rel=1e-6)  # it is delayed
    assert [len(runs[name]["peak_memory_mib"]) for name in ("naive", "ddp", "pipelined")] == [1, 2, 1]
    for name in ("torch-zb:M=8", "1f1b@processes", "pipelined"):
        assert len(runs[name]["busy_shares"]) == 2 and all(0.0 < share <= 1.0 for share in runs[name]["busy_shares"])
    assert (tmp_path / "out/runs/pipelined/timeline-pipelined.png").exists()
    assert (tmp_path / "out/results.png").stat().st_size > 10_000
    assert (tmp_path / "out/results.md").read_text().strip() in printed


@pytest.mark.slow
def test_fsdp_and_pipelines_in_a_v_agree_with_naive(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The snake bites its tail, and the tail does not mind. " * 400)
    options = BenchmarkArguments(**TINY, train_file=str(tmp_path / "text"), updates=8, warmup_updates=2)
    write_blocks(options, tmp_path / "blocks")
    naive, *others = (
        launch.run(Job(options, parsed, 0, tmp_path / "blocks", tmp_path / "run", options.updates))
        for parsed in map(contender_of_tiny, ("naive", "fsdp", "torch-zbv", "torch-zbv:M=2", "torch-dualpipev"))
    )
    assert naive["losses"][-1] < naive["losses"][0]
    for run_of_other in others:
        assert len(run_of_other["losses"]) == 8 and len(run_of_other["peak_memory_mib"]) == 2
        # another order of summation
        assert run_of_other["losses"] == pytest.approx(naive["losses"], rel=1e-6)
        assert run_of_other["eval_loss"] == pytest.approx(naive["eval_loss"], rel=1e-6)
    assert "busy_shares" not in others[0]
    assert all(0.0 < share <= 1.0 for found in others[1:] for share in found["busy_shares"])


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "transfo-xl", "llama"])
def test_models_of_contenders(tmp_path: Path, model_type: str, untied: bool) -> None:
    options = BenchmarkArguments(model_type=model_type, n_embd=64, n_layer=2, block_size=16, untied=untied)
    job = Job(options, contender("naive"), 0, tmp_path / "blocks", tmp_path, updates=1)
    first, second = (build_model(job) for _ in range(2))
    inputs, outputs = tables(first)
    assert inputs.weight.shape == outputs.weight.shape == (257, 64) and (inputs.weight is outputs.weight) != untied
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(first(input_ids=ids, labels=ids).loss, second(input_ids=ids, labels=ids).loss)


def test_contenders_train_a_model_on(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    options = BenchmarkArguments(model_name_or_path=str(tmp_path / "model"), block_size=16, untied=True)
    options.take_sizes()
    assert (options.n_embd, options.n_layer, options.vocab_size, options.untied) == (32, 2, 300, False)
    model = build_model(Job(options, contender("naive"), 0, tmp_path / "blocks", tmp_path, updates=1)).train()
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(model(input_ids=ids).logits, saved(input_ids=ids).logits)  # although in training: no dropout


def test_models_that_contenders_cannot_train_on_are_named(tmp_path: Path) -> None:
    GPT2Config(n_positions=8).save_pretrained(tmp_path / "short")
    T5Config().save_pretrained(tmp_path / "t5")
    for folder, words in (("short", "8 positions"), ("t5", "is a t5"), ("missing", ": ")):
        with pytest.raises(ContenderError, match=f"{folder}.*{words}"):
            BenchmarkArguments(model_name_or_path=str(tmp_path / folder), block_size=16).take_sizes()


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-6), *([("muon", 1e-5)] if EVERY else [])])
def test_time_to_the_loss_of_the_naive_run(tmp_path: Path, optimizer: str, tolerance: float) -> None:
    contenders = ["naive", "torch-1f1b:max_steps=8", "pipelined:M=2"]
    values = {"until_loss": "naive", "updates": 8, "eval_every": 4, "untied": True, "model_type": "transfo-xl"}
    values |= {"optimizer": optimizer, "lr_scheduler_type": "cosine", "slack": 1e-3}
    printed = run(command(tmp_path, contenders, values), tmp_path).stdout
    naive, peer, ours = json.loads((tmp_path / "out/results.json").read_text())["results"][0]
    assert [update for update, _, _ in naive["evaluations"]] == [4, 8]
    assert naive["target"] == naive["evaluations"][-1][2] * 1.001 == peer["target"] == ours["target"]
    assert [loss for _, _, loss in peer["evaluations"]] == pytest.approx(
        [loss for _, _, loss in naive["evaluations"]], rel=tolerance
    )
    seconds = [second for _, second, _ in ours["evaluations"]]
    assert seconds == sorted(seconds) and ours["evaluations"][0][0] == 4
    (row,) = (line for line in printed.splitlines() if line.startswith("| naive |"))
    tokens = report.tokens_to_target(naive)
    assert 1024 < tokens < 2048 and naive["tokens_per_update"] == 8 * 32  # on the way from update 4 to 8
    assert "| 4 | 1 of 1 |" in row and f"| {tokens:,.0f} | 1.00 (1.00 - 1.00) |" in row
    assert (tmp_path / "out/results.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(not EVERY, reason="differs little from the peers on GPT-2: HF_OUROBOROS_EVERY_CASE=1 runs it")
def test_peers_train_any_decoder(tmp_path: Path) -> None:
    """A mixture, whose losses are the naive run's."""
    contenders = ["naive", "torch-zb:M=8"]
    values = {"updates": 8, "model_type": "mixtral", "config_overrides": "num_local_experts=4"}
    printed = run(command(tmp_path, contenders, values), tmp_path).stdout
    assert "failed" not in printed and "losses differ" not in printed
    losses = [run["losses"] for run in json.loads((tmp_path / "out/results.json").read_text())["results"][0]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_peers_refuse_what_they_would_not_hand_on() -> None:
    class Sharing:
        index = 1
        config = T5Config()

        def __call__(self, batch: dict[str, torch.Tensor], received: object) -> dict[str, torch.Tensor]:
            return {"hidden": batch["input_ids"], "extra0": batch["input_ids"]}

    with pytest.raises(
        ContenderError, match=re.escape("1 tensor(s) besides the hidden state cross the end of stage 1")
    ):
        peers.check_boundaries([Sharing(), Sharing()])


@pytest.mark.slow
def test_a_late_run_is_ended_with_its_processes(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(256)) * 200)
    options = BenchmarkArguments(
        train_file=str(tmp_path / "text"), block_size=32, batch_size=1, n_embd=32, n_layer=4, time_limit=3.0
    )
    write_blocks(options, tmp_path / "blocks")
    job = Job(options, contender("torch-1f1b"), 0, tmp_path / "blocks", tmp_path / "run", updates=20_000)
    with pytest.raises(launch.RunFailed, match=r"rank 0, 1 did not end within 3 s"):
        launch.run(job)
    servers = psutil.Process().children()
    workers = [p for p in psutil.Process().children(recursive=True) if p not in servers]
    assert not psutil.wait_procs(workers, timeout=10)[1]
