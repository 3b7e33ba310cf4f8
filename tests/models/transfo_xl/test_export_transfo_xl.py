"""Export: plain weights by default, code only where it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transfo_xl_cases import KINDS, tiny_model, tokens
from transformers import AutoModelForCausalLM

from hf_ouroboros.models.transfo_xl.export import export


def test_only_this_export_has_code(tmp_path: Path) -> None:
    model = tiny_model(**KINDS["wikitext"])
    export(model, tmp_path / "plain")
    export(model, tmp_path / "code", with_code=True)
    model.save_pretrained(tmp_path / "later")
    assert [path.name for path in (tmp_path / "code").glob("*.py")]
    for folder in ("plain", "later"):
        assert not list((tmp_path / folder).glob("*.py"))
        assert "auto_map" not in (tmp_path / folder / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(loaded(tokens(2, 4)).logits, model(tokens(2, 4)).logits)


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.4"), reason="doesn't tie weights of models with code"
)
def test_the_code_runs_without_the_package(tmp_path: Path) -> None:
    model = tiny_model(**KINDS["wikitext"])
    export(model, tmp_path / "code", with_code=True)
    script = """
import sys, torch
sys.modules["hf_ouroboros"] = None  # an import of it would fail
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.tensor([[1, 9, 25, 3]])
torch.save([model(ids).logits.detach(), model.generate(ids, max_new_tokens=3, do_sample=False)], sys.argv[2])
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "code"), str(tmp_path / "result")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    ids = torch.tensor([[1, 9, 25, 3]])
    logits, generated = torch.load(tmp_path / "result", weights_only=True)
    assert torch.equal(logits, model(ids).logits)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=3, do_sample=False))
