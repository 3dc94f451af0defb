"""`safepatch report`: what fixes and merges change, side by side."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from safepatch_core import InputError, ReportResult, UsageError, merge, report
from safepatch_core.commands.cli import cli
from safepatch_core.fixes.info import kind_of
from safepatch_core.fixes.reading import open_fix
from tests.browser import BROWSER, browser
from tests.fix_cases import changed, random_tensor, unsigned, write_checkpoint, write_fix
from tests.oracle import Tensor

Tensors = dict[str, Tensor]
LARGE = 16 * 65536 + 70_000  # entries: more than one window, and a block that is not full


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def sides(seed: int = 0) -> tuple[Tensors, Tensors, Tensors]:
    """A base and two changes of it, of entries of 1, 2 and 4 bytes."""
    rng = np.random.default_rng(seed)
    base = {
        "model.layers.0.self_attn.q_proj.weight": random_tensor(rng, "BF16", LARGE),
        "model.layers.10.self_attn.q_proj.weight": random_tensor(rng, "F32", 300, 300),
        "model.layers.2.mlp.experts.3.up.weight": random_tensor(rng, "U8", 500, 100),
        "model.norm.weight": random_tensor(rng, "BF16", 640),
        "lm_head.weight": random_tensor(rng, "F16", 64, 64),
    }
    first = {name: changed(rng, t, 0.05) for name, t in base.items() if name != "lm_head.weight"}
    second = {name: changed(rng, t, 0.1) for name, t in base.items() if name != "model.norm.weight"}
    # In part the same change, so that both flip the same bits there.
    for name in first.keys() & second.keys():
        half = len(first[name].data) // 2
        t = first[name]
        second[name] = Tensor(t.dtype, t.shape, t.data[:half] + second[name].data[half:])
    return base, base | first, base | second


def positions(base: Tensors, other: Tensors) -> dict[str, Any]:
    return {name: unsigned(base[name]) != unsigned(t) for name, t in other.items()}


def expected(base: Tensors, a: Tensors, b: Tensors) -> dict[str, Any]:
    """Overlap by brute force."""
    one, two = positions(base, a), positions(base, b)
    shared = {name: int((one[name] & two[name]).sum()) for name in base}
    alike = sum(int((one[name] & two[name] & (unsigned(a[name]) == unsigned(b[name]))).sum()) for name in base)
    return {
        "shared": sum(shared.values()),
        "union": sum(int((one[name] | two[name]).sum()) for name in base),
        "alike": alike,
        "tensors": {name: n for name, n in shared.items() if n},
    }


def overlap(result: ReportResult) -> dict[str, Any]:
    (of,) = result.overlaps
    assert of.iou == of.shared / of.union
    return {"shared": of.shared, "union": of.union, "alike": of.alike, "tensors": dict(of.tensors)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    base, a, b = sides()
    for name, tensors in (("base", base), ("one", a), ("two", b)):
        write_checkpoint(root / name, tensors)
    write_fix(root / "a.safetensors", base, a, recipe(top=0.03))
    write_fix(root / "b.safetensors", base, b, recipe(top=0.1, seed=7))
    return root


def recipe(top: float, **more: Any) -> dict[str, Any]:
    patches = [{"name": "safety", "source": "s", "top": top}, {"name": "over-safety", "source": "o", "top": 0.02}]
    return {"base": "org/model", "patches": patches, "combine": "difference", **more}


@pytest.mark.parametrize("pair", [("a.safetensors", "b.safetensors"), ("a.safetensors", "two"), ("one", "two")])
def test_overlap_is_that_of_the_positions(made: Path, pair: tuple[str, str]) -> None:
    base, a, b = sides()
    below = None if pair[1].startswith("b") else made / "base"
    result = report([made / name for name in pair], base=below)
    assert overlap(result) == expected(base, a, b)
    for item, other in zip(result.items, (a, b), strict=True):
        counts = {name: int(of.sum()) for name, of in positions(base, other).items()}
        assert item.tensors == {name: n for name, n in counts.items() if n}
        assert item.changes == sum(counts.values())


def test_shares_are_of_all_that_any_of_them_changes(made: Path) -> None:
    result = report([made / "a.safetensors", made / "b.safetensors"])
    a, b = (result.layers(item) for item in result.items)
    assert list(a) == list(b) == ["lm_head.weight", *(f"model.layers.{i}" for i in (0, 2, 10)), "model.norm.weight"]
    assert a["lm_head.weight"].changes == 0 and a["lm_head.weight"].entries == 64 * 64
    assert result.total(result.items[0]).entries == sum(result.entries.values()) == LARGE + 90000 + 50000 + 640 + 4096
    kinds = result.kinds(result.items[0])
    assert kinds["self_attn.q_proj"].entries == LARGE + 90000 and kinds["mlp.experts.*.up"].entries == 50000
    assert kind_of("lm_head.weight") == "lm_head" and kind_of("h.3.attn.c_attn.bias") == "attn.c_attn.bias"


def test_recipes_side_by_side(made: Path) -> None:
    told = json.loads(run("report", made / "a.safetensors", made / "b.safetensors", "--json").stdout)
    assert told["recipe_differences"] == ["patches.safety.top", "seed"]
    assert told["items"][1]["recipe"] == recipe(top=0.1, seed=7)
    assert told["overlaps"][0]["iou"] == pytest.approx(told["overlaps"][0]["shared"] / told["overlaps"][0]["union"])
    listed = run("report", made / "a.safetensors", made / "b.safetensors").stdout.splitlines()
    assert len(listed) == 3 and f"{told['overlaps'][0]['shared']:,d} entries in common" in listed[2]
    assert run("report", made / "a.safetensors", "--quiet").output == ""


def merged(root: Path, combine: str) -> Path:
    rng = np.random.default_rng(3)
    values = {f"l.{i}.w.weight": rng.standard_normal((40, 40)).astype(np.float32) for i in range(3)}

    def tensors(moved: float) -> Mapping[str, Tensor]:
        return {n: Tensor("F32", v.shape, (v + moved * rng.standard_normal(v.shape)).astype("<f4").tobytes())
                for n, v in values.items()}  # fmt: skip

    for name, by in (("model", 0.0), ("s", 0.1), ("o", 0.1)):
        write_checkpoint(root / name, tensors(by))
    made = recipe(top=0.2, combine=combine) | {"base": "model"}
    (root / "r.yaml").write_text(yaml.safe_dump(made))
    merge(root / "r.yaml", root / "out", threads=1)
    return root / "out"


def test_a_merge_by_its_manifest_and_beside_its_base(tmp_path: Path) -> None:
    out = merged(tmp_path, "difference")
    (alone,) = report([out]).items
    (beside,) = report([out], base=tmp_path / "model").items
    manifest = json.loads((out / "safepatch.json").read_text())
    applied = {p["name"]: p["total"]["applied"] for p in manifest["patches"]}
    assert (alone.counted, beside.counted) == ("acted on", "changed")
    assert alone.changes == beside.changes == sum(applied.values()) > 0  # in F32 nothing is lost in rounding
    assert {name: of["applied"] for name, of in beside.patches.items()} == applied
    assert alone.files == {name: of["sha256"] for name, of in manifest["files"].items()}
    assert alone.recipe == manifest["recipe"]


def test_a_manifest_alone_has_no_overlap(tmp_path: Path) -> None:
    out = merged(tmp_path, "difference")
    assert run("build", tmp_path / "r.yaml", "-o", tmp_path / "fix.safetensors", "--threads", 1).exit_code == 0
    both = [out, tmp_path / "fix.safetensors"]
    assert report(both).overlaps == ()
    report(both, tmp_path / "page.html")
    assert "its overlap is not" in (tmp_path / "page.html").read_text()
    (of,) = report(both, base=tmp_path / "model").overlaps
    assert of.shared == of.union == of.alike > 0  # the same merge


def test_patches_that_act_together_need_the_base(tmp_path: Path) -> None:
    out = merged(tmp_path, "sum")
    with pytest.raises(InputError, match="doesn't tell on how many entries: found combine: sum, expected --base"):
        report([out])
    assert report([out], base=tmp_path / "model").items[0].changes > 0


def test_what_apply_wrote_is_compared_with_its_base(made: Path, tmp_path: Path) -> None:
    assert run("apply", made / "a.safetensors", "--to", made / "base", "-o", tmp_path / "out").exit_code == 0
    with pytest.raises(InputError, match="not the manifest of a merge"):
        report([tmp_path / "out"])
    result = report([tmp_path / "out", made / "a.safetensors"], base=made / "base")
    assert result.overlaps[0].iou == 1.0 and result.items[0].kind == "checkpoint"


def test_bad_input(made: Path, tmp_path: Path) -> None:
    a = made / "a.safetensors"
    with pytest.raises(UsageError, match="nothing to report on"):
        report([])
    with pytest.raises(UsageError, match="named twice"):
        report([a, made / "one" / ".." / "a.safetensors"])
    with pytest.raises(InputError, match="no such file"):
        report([a, tmp_path / "none"])
    with pytest.raises(InputError, match="not the output of a merge: no safepatch.json"):
        report([made / "one"])
    (shard, *_) = sorted((made / "one").glob("*.safetensors"))
    with pytest.raises(InputError, match="not a fix file"):
        report([shard])
    rng = np.random.default_rng(0)
    small = {"lm_head.weight": random_tensor(rng, "F16", 8)}
    wrong = write_fix(
        tmp_path / "c.safetensors", small, {"lm_head.weight": changed(rng, small["lm_head.weight"], [3])}
    )
    with pytest.raises(InputError, match="not of the base of b.safetensors: found 8 entries, expected 4096"):
        report([made / "b.safetensors", wrong])
    with pytest.raises(InputError, match="not the tensor that the fix touches"):
        report([wrong], base=made / "base")


def test_a_broken_fix_is_named(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes((made / "a.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match="broken.safetensors"):
        report([path])
    with open_fix(made / "a.safetensors") as fix:
        gap = fix.tensors["model.layers.10.self_attn.q_proj.weight"].gap
    blob = bytearray((made / "a.safetensors").read_bytes())
    blob[gap.start + gap.nbytes - 1] = 255  # a skip, after which nothing comes
    path.write_bytes(blob)
    out = tmp_path / "page.html"
    result = run("report", path, made / "b.safetensors", "-o", out)
    assert isinstance(result.exception, InputError) and "layers.10.self_attn.q_proj" in str(result.exception)
    assert not out.exists()


def test_an_existing_page_stays(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(InputError, match="the output exists; --force replaces it"):
        report([made / "a.safetensors"], page)
    with pytest.raises(InputError):
        report([made / "a.safetensors", tmp_path / "none"], page, force=True)
    assert page.read_text() == "mine"
    for wrong, why in ((made / "a.safetensors", "is an input"), (tmp_path, "is a directory")):
        with pytest.raises(InputError, match=why):
            report([made / "a.safetensors"], wrong, force=True)
    report([made / "a.safetensors"], page, force=True)
    assert page.read_text().startswith("<!doctype html>")


def test_same_names_are_told_apart_by_their_paths(made: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    copy = tmp_path / "x" / "a.safetensors"
    copy.write_bytes((made / "a.safetensors").read_bytes())
    result = report([made / "a.safetensors", copy])
    assert [item.name for item in result.items] == [str(made / "a.safetensors"), str(copy)]


def test_reporting_imports_no_torch(made: Path) -> None:
    script = f"import sys; from safepatch_core import report; report([{str(made / 'a.safetensors')!r}], "
    script += f"{str(made / 'torchless.html')!r}); sys.exit('torch' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.fixture(scope="module")
def html(made: Path) -> str:
    """Three side by side, one of a name that attacks the page."""
    nasty = made / "<img src=http:  onerror=alert(1)>.safetensors"
    base, a, b = sides()
    about = recipe(top=0.5, note="<script>alert(1)</script>\u202e")
    write_fix(nasty, base, a, about)
    names = [made / "a.safetensors", made / "b.safetensors", nasty]
    report(names, made / "page.html", force=True)
    text = (made / "page.html").read_text()
    report(names, made / "again.html", force=True)
    assert (made / "again.html").read_text() == text
    return text


def test_the_page_is_one_file_and_escapes_names(html: str) -> None:
    assert "<script" not in html and "<img" not in html and "\u202e" not in html
    assert not re.findall(r"<(?:link|iframe|object|embed|form|base)\b|https?://", html)
    for wanted in ("intersection over union", "patches.safety.top", "≠", "q_proj", "Checksums"):
        assert wanted in html


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_a_browser_shows_it_whole(html: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(html)
    with browser(tmp_path / "profile") as page:
        page.size(1280)
        page.call("Page.navigate", url=file.as_uri())
        page.wait("Page.loadEventFired")
        for scheme in ("light", "dark"):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            for width in (1280, 390):
                page.size(width)
                assert page.value("innerWidth") == width
                assert page.value("document.documentElement.scrollWidth") <= width
                assert page.value(
                    "[...document.querySelectorAll('dl, dd, h1, h3, .models, .scroll, .split')]"
                    ".every(e => e.getBoundingClientRect().right <= innerWidth)"
                )
        seen = page.pixels(".split")
        assert len(np.unique(seen.reshape(-1, 3), axis=0)) >= 3  # only the one, both, only the other
        asked = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
        loud = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        assert [e for e in page.events if e.get("method") in loud] == []
