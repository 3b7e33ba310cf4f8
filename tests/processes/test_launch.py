"""Started as users start it: torchrun, accelerate launch, its configuration files, and launches that can't work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from loopback_hub import running_hub
from transformers import AutoModelForCausalLM

from hf_ouroboros import ProcessLaunchError
from hf_ouroboros.processes.launch import check_launch, check_started

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
PYTHON = Path(sys.executable).name
RECIPE = str(ROOT / "recipes" / "pretrain_lm.py")
SMALL = (
    "--max_train_bytes 20000 --sample_tokens 0 --max_steps 6 --eval_steps 3 --disable_tqdm true --block_size 32 "
    "--config_overrides n_layer=3,n_embd=16,n_head=2"
).split()


def launch(*command: str, within: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess:
    """A console script of this environment, where nothing of an outer launch is left."""
    clean = {k: v for k, v in within.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    environment = clean | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    program = str(Path(sys.executable).parent / command[0])
    return subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, timeout=150)


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]


@pytest.mark.slow
def test_launchers_give_the_same_run(tmp_path: Path) -> None:
    """Threads in one process, torchrun, and accelerate with the packaged configuration: the same losses and files.

    torchrun's processes push: the parts of both arrive as one model, and load by its name.
    """
    pushing = ["--push_to_hub", "true", "--hub_model_id", "tester/parts", "--hub_strategy", "every_save"]
    pushing += ["--save_strategy", "steps", "--save_steps", "3"]
    config = str(CONFIGS / "cpu_2_processes.yaml")
    with running_hub() as hub:
        of_hub = hub.env(tmp_path / "home")
        runs = {
            "threads": launch(PYTHON, *command(tmp_path / "threads")),
            "torchrun": launch(
                *("torchrun", "--standalone", "--nproc_per_node", "2", *command(tmp_path / "torchrun"), *pushing),
                within=of_hub,
            ),
            "accelerate": launch(
                *("accelerate", "launch", "--config_file", config, "--main_process_port", "0"),
                *command(tmp_path / "accelerate"),
            ),
        }
        for name, done in runs.items():
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("parameters in 3 stages") == 1, done.stdout  # the main process's words only
            assert done.stdout.count("tokens per second") == 1
            AutoModelForCausalLM.from_pretrained(tmp_path / name)
            files = {path.name for path in (tmp_path / name).iterdir()}
            assert {"README.md", "timeline.png", "timeline.json"} <= files
        pushed = hub.files("tester/parts").keys()
        assert {"README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json"} <= pushed
        load = "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('tester/parts')"
        done = launch(PYTHON, "-c", load, within=of_hub)
        assert done.returncode == 0, done.stderr
    expected = losses(tmp_path / "threads")
    assert len(expected) == 2
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "accelerate") == expected


def command(folder: Path) -> list[str]:
    """The recipe and its options, for a folder of results."""
    return [RECIPE, *SMALL, "--output_dir", str(folder)]


@pytest.mark.slow
def test_replicas_of_the_hybrid_configuration(tmp_path: Path) -> None:
    """The packaged configuration is for GPUs; on CPUs its processes find each other all the same."""
    config = str(CONFIGS / "hybrid_2x2.yaml")
    launcher = ("accelerate", "launch", "--config_file", config, "--main_process_port", "0")
    options = ["--data_parallel_replicas", "2", "--per_device_train_batch_size", "2"]
    done = launch(*launcher, *command(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    assert "parameters per device: cpu:0" in done.stdout and "cpu:2" not in done.stdout
    assert len(losses(tmp_path)) == 2


@pytest.mark.slow
def test_accelerate_that_starts_one_process_of_two(tmp_path: Path) -> None:
    done = launch("accelerate", "launch", "--cpu", "--num_processes", "2", RECIPE, "--output_dir", str(tmp_path))
    assert done.returncode != 0
    assert "ProcessLaunchError: accelerate launch was asked for 2 processes but started one" in done.stderr
    assert "torchrun --nproc_per_node N" in done.stderr
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProcessLaunchError, match="WORLD_SIZE=2, but the processes don't know each other"):
        check_started(1)
    check_started(2)


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        (["python", "accelerate", "launch", "--cpu", "--num-processes=2", "run.py"], True),
        (["python", "accelerate", "launch", "--config_file", "two.yaml", "run.py"], True),
        (["python", "accelerate", "launch", "--num_processes", "1", "run.py", "--num_processes", "5"], False),
        (["python", "accelerate", "launch", "--config_file", "absent.yaml", "run.py"], False),
        (["python", "something", "--num_processes", "2", "run.py"], False),
    ],
)
def test_what_accelerate_was_asked_for(
    command: list[str], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two.yaml").write_text("num_processes: 2\ndistributed_type: MULTI_CPU\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(sys, "argv", ["run.py", "--num_processes", "5"])
    monkeypatch.setattr("psutil.Process.parent", lambda self: type("Parent", (), {"cmdline": lambda self: command})())
    if refused:
        with pytest.raises(ProcessLaunchError, match="asked for 2 processes but started one"):
            check_launch()
    else:
        check_launch()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_configurations(path: Path) -> None:
    """accelerate reads them, and each names itself in its own launch line."""
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2 and str(config.distributed_type).endswith("MULTI_GPU")
    assert f"--config_file recipes/accelerate_configs/{path.name}" in path.read_text()
