"""The console script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ouroboros.cli import environment, main


def test_env(capsys: pytest.CaptureFixture) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("python", "hf_ouroboros", "torch", "transformers", "accelerate", "accelerators", "cpu threads"):
        assert word in text
    assert text.strip() == environment()


def test_env_with_a_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_ouroboros.cli

    def version(name: str) -> str:
        raise hf_ouroboros.cli.PackageNotFoundError(name)

    monkeypatch.setattr(hf_ouroboros.cli, "version", version)
    assert "not installed" in environment()


@pytest.mark.parametrize("arguments", [[], ["fly"]], ids=str)
def test_wrong_commands(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "env" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "env" in capsys.readouterr().out


def test_installed_command() -> None:
    path = shutil.which("hf-ouroboros", path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip("hf_ouroboros is not installed in this environment")
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "hf-ouroboros" in done.stdout
