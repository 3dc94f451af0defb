"""What a fix tells about itself, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from safepatch_core.commands.cli import cli
from safepatch_core.fixes.info import info, layer_of, verify_fix
from tests.fix_cases import changed, random_tensor, write_both, write_fix


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def fix(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    names = [f"model.layers.{i}.{part}.weight" for i in (0, 2, 10) for part in ("q", "up")] + ["lm_head.weight"]
    base = {name: random_tensor(rng, "BF16", 100, 100) for name in names}
    merged = {name: changed(rng, t, np.arange(100 * (i + 1)), "small") for i, (name, t) in enumerate(base.items())}
    write_both(tmp_path, base, merged)
    return write_fix(tmp_path / "fix.safetensors", base, merged, {"base": "org/model", "seed": 0})


def test_per_layer_and_tensor(fix: Path) -> None:
    found = info(fix)
    counts = {layer: share.changes for layer, share in found.layers.items()}
    assert list(counts.items()) == [
        ("lm_head.weight", 700),
        ("model.layers.0", 300),
        ("model.layers.2", 700),
        ("model.layers.10", 1100),
    ]
    assert found.layers["model.layers.0"].share == 300 / 20000
    assert found.total.changes == 2800 and len(found.tensors) == 7 and found.size == fix.stat().st_size
    told = json.loads(run("info", fix, "--json").stdout)
    assert told["layers"]["model.layers.2"] == {"entries": 20000, "changes": 700}
    assert told["recipe"] == {"base": "org/model", "seed": 0} and told["id"] == found.id
    listed = run("info", fix, "--tensors").stdout
    assert "model.layers.10.up.weight             600 of         10,000    6.000%" in listed
    assert run("info", fix, "--quiet").stdout == ""


def test_layers_are_found_in_names() -> None:
    assert layer_of("model.layers.3.mlp.experts.7.up.weight") == "model.layers.3"
    assert layer_of("transformer.h.12.attn.c_attn.weight") == "transformer.h.12"
    assert layer_of("lm_head.weight") == "lm_head.weight"


def test_picture_and_card(fix: Path, tmp_path: Path) -> None:
    result = run("info", fix, "--svg", tmp_path / "a.svg", "--card", tmp_path / "README.md", "--quiet")
    assert result.exit_code == 0, result.output
    run("info", fix, "--svg", tmp_path / "b.svg", "--quiet")
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    bars = [
        float(bar.get("width", ""))
        for bar in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert len(bars) == 4 and max(bars) == bars[0] == 420
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/model" and "safepatch-fix" in head["tags"] and str(tmp_path) not in card


def test_verify(fix: Path, tmp_path: Path) -> None:
    assert run("verify", fix).stdout == "ok: 2,800 entries of 7 tensors\n"
    for base, state in (("base", "not carried"), ("merged", "carried")):
        told = json.loads(run("verify", fix, "--base", tmp_path / f"{base}.safetensors", "--json").stdout)
        assert told == {"ok": True, "tensors": 7, "changes": 2800, "state": state, "problems": []}
    blob = bytearray(fix.read_bytes())
    blob[-1] ^= 0xFF
    fix.write_bytes(blob)
    result = run("verify", fix, "--base", tmp_path / "base.safetensors")
    assert result.exit_code == 65 and "model.layers.2.up.weight" in result.stderr
    verdict = verify_fix(fix, tmp_path / "base.safetensors")
    assert not verdict.ok and len(verdict.problems) == 1
    fix.write_bytes(blob[:-1])
    assert run("verify", fix).exit_code == 65
