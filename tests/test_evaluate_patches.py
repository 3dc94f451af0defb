"""What a report says of the patches in a merged model: counts per layer, and what rounding left of them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import save_file

from safepatch_core import MergeResult, merge, survive
from safepatch_core.errors import InputError
from safepatch_core.evaluating import EvalConfig, evaluate, patches
from safepatch_core.evaluating.patches import layers_of, survival
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.reading import read_tensor
from safepatch_core.merging.manifest import read_manifest
from tests.tiny_lm import tiny_llama, write_lm


def patched_lm(folder: Path, seed: int) -> Path:
    """The tiny model in float32, every weight by up to 0.4% another: about a step of bfloat16."""
    model, generator = tiny_llama(), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data *= 1 + 0.004 * (2 * torch.rand(parameter.shape, generator=generator) - 1)
    model.save_pretrained(folder)
    return folder


def merged(root: Path, out: str, base: str = "base", **options: Any) -> MergeResult:
    """Two patches merged into the model `base`; `options` are keys of the recipe."""
    each = [{"name": n, "source": n, "top": top, "retain": 0.7} for n, top in (("safety", 0.3), ("over-safety", 0.2))]
    path = root / f"{out}.yaml"
    path.write_text(yaml.safe_dump({"base": base, "patches": each} | options))
    return merge(path, root / out, backend="reference")


def sources(root: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    write_lm(root / "base", dtype)
    for seed, name in enumerate(("safety", "over-safety")):
        patched_lm(root / name, seed)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 base, two patches of it, and `merged`; tests that change any of it take a copy."""
    root = tmp_path_factory.mktemp("merge")
    sources(root)
    merged(root, "merged")
    return root


def measured(root: Path, model: str = "merged", **changes: Any) -> dict[str, Any]:
    (root / "asked.jsonl").write_text('{"question": "How is tea made?"}\n')
    given = {
        "model": root / model,
        "baseline": root / "base",
        "out": root / "report",
        "harmful": root / "asked.jsonl",
    }
    given |= {"max_length": 128, "stride": 64, "max_new_tokens": 2, "threads": 1} | changes
    report = evaluate(EvalConfig.model_validate(given), quiet=True, force=True)
    assert report.data == json.loads((root / "report" / "report.json").read_bytes())
    return report.data


def bits(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a checkpoint as integers."""
    checkpoint = open_checkpoint(folder)
    return {
        name: np.frombuffer(read_tensor(entry, checkpoint.identity_of(entry)), f"<u{entry.nbytes // entry.entries}")
        for name, entry in checkpoint.tensors.items()
    }


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0.99, 1.0), ("bfloat16", 0.3, 0.7)])
def test_the_report_tells_what_the_merge_told(
    tmp_path: Path, dtype: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also cut into other files than the base, and compared in small pieces."""
    monkeypatch.setattr(patches, "PIECE", 1000)
    sources(tmp_path, getattr(torch, dtype))
    told = merged(tmp_path, "merged", max_shard_size="40KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    found = measured(tmp_path)["survival"]["model"]
    assert (found["acted"], found["changed"], found["surviving"]) == (told.acted, told.changed, told.surviving)
    assert least < found["surviving"] <= most and found["dtypes"] == [dtype]

    before, after = bits(tmp_path / "base"), bits(tmp_path / "merged")
    changed: Counter[int | None] = Counter()
    for name in before:
        layer = re.search(r"layers\.(\d+)\.", name)
        changed[int(layer[1]) if layer else None] += int(np.count_nonzero(before[name] != after[name]))
    assert [(of["layer"], of["changed"]) for of in found["layers"]] == [(0, changed[0]), (1, changed[1])]
    assert changed[None] == 0 < min(changed[0], changed[1])
    manifest = json.loads((tmp_path / "merged" / "safepatch.json").read_bytes())
    for of in found["layers"]:
        names = [n for n in manifest["patches"][0]["tensors"] if f".{of['layer']}." in n]
        assert of["entries"] == sum(before[name].size for name in names)
        assert of["acted"] == sum(p["tensors"][name]["applied"] for p in manifest["patches"] for name in names)

    line = f"merged: stored bits changed at {told.changed:,d} of {told.acted:,d} entries that patches act on "
    line += f"({told.surviving:.1%}); the others' steps are lost in rounding to {dtype}"
    assert f"\n- {line}\n" in (tmp_path / "report" / "report.md").read_text()
    assert line.replace("'", "&#39;") in (tmp_path / "report" / "report.html").read_text()


def test_every_merged_model_has_a_line(source: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(source, tmp_path / "own"))
    told = merged(root, "other", scope="model", seed=1)
    shutil.copytree(root / "base", root / "plain")
    data = measured(root, more_models=[root / "other", root / "plain"])
    assert list(data["survival"]) == ["model", "model_2"] == list(data["patches"])
    assert data["survival"]["model_2"]["changed"] == told.changed != data["survival"]["model"]["changed"]
    lines = (root / "report" / "report.md").read_text().splitlines()
    assert [line.split(":")[0] for line in lines if "stored bits" in line] == ["- merged", "- other"]


def test_without_its_base_nothing_is_said(source: Path, tmp_path: Path) -> None:
    """No baseline; a model merged from another base; one merged from a merge, measured against either."""
    root = Path(shutil.copytree(source, tmp_path / "own"))
    shutil.copytree(root / "base", root / "elsewhere")
    (root / "first").mkdir()
    shutil.move(root / "merged", root / "first" / "merged")
    merged(root, "second", base="first/merged", seed=1)
    for changes in (
        {"baseline": None, "model": root / "first" / "merged"},
        {"baseline": root / "elsewhere", "model": root / "first" / "merged"},
        {"model": root / "second"},
        {"baseline": root / "first" / "merged", "model": root / "second"},
    ):
        data = measured(root, **changes)
        assert data["patches"]["model"] and data["survival"] == {}, changes
        assert "stored bits" not in "".join(path.read_text() for path in (root / "report").glob("report.*"))


def test_what_later_quantisations_would_leave(source: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(source, tmp_path / "own"))
    found = measured(root, survive="fp8-channel, int4-g32")["survival"]["model"]["later"]
    told = survive(root / "merged", root / "base", ["fp8-channel", "int4-g32"])
    assert list(found) == ["fp8-channel", "int4-g32"]
    for name, of in told.formats.items():
        assert found[name]["whole"] == of.whole.total.facts()
        assert found[name]["patches"] == {patch: share.total.facts() for patch, share in of.patches.items()}
        assert set(found[name]["patches"]) == {"safety", "over-safety"}
    whole = told.formats["int4-g32"].whole.total
    line = f"merged: int4-g32 would leave {whole.survival:.3f} (cosine {whole.cosine:.3f}) of the change, "
    assert line in (root / "report" / "report.md").read_text().replace("\\", "")
    assert line in (root / "report" / "report.html").read_text()
    with pytest.raises(ValidationError, match="survive: allowed are fp8-block"):
        measured(root, survive="int3")


Tensors = dict[str, torch.Tensor]


def small(root: Path, base: Tensors, out: Tensors, applied: list[dict[str, int]], combine: str = "difference") -> Any:
    """`survival` of made-up checkpoints, whose manifest says of each patch how many entries it acted on."""
    for name, tensors in (("base", base), ("merged", out)):
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
    every = [
        {
            "name": f"p{i}",
            "tensors": {t: {"entries": base[t].numel(), "selected": n, "applied": n} for t, n in of.items()},
        }
        for i, of in enumerate(applied)
    ]
    path = root / "merged" / "safepatch.json"
    path.write_text(json.dumps({"recipe": {"base": "base", "combine": combine}, "patches": every}))
    return survival(read_manifest(path), root / "merged", root / "base")


BASE = {"h.0.w": torch.arange(6.0), "norm": torch.ones(2), "ids": torch.arange(3), "none": torch.zeros(0, 4)}
OUT = {**BASE, "h.0.w": torch.tensor([0, 1.5, 2.5, 3, 4, 5])}


def test_entries_are_counted_by_their_bits(tmp_path: Path) -> None:
    """-0 is stored otherwise than 0, a NaN as itself; entries that two patches share are no two entries."""
    base = {**BASE, "h.0.w": torch.tensor([0.0, 0.0, float("nan"), 3, 4, 5])}
    out = {**BASE, "h.0.w": torch.tensor([-0.0, -0.0, float("nan"), 3, 4, 6])}
    found = small(tmp_path, base, out, [{"h.0.w": 3, "none": 0}, {"h.0.w": 1, "none": 0}])
    assert (found["acted"], found["changed"], found["surviving"]) == (4, 3, 0.75)
    assert found["layers"] == [
        {"layer": 0, "entries": 6, "acted": 4, "changed": 3},
        {"layer": None, "entries": 0, "acted": 0, "changed": 0},
    ]


@pytest.mark.parametrize(
    ("out", "applied", "combine", "told"),
    [
        (OUT, [{"h.0.w": 2}], "difference", True),
        (OUT, [{"h.0.w": 1}], "difference", False),  # more entries differ than the patches acted on
        ({**OUT, "norm": torch.tensor([1, 1.5])}, [{"h.0.w": 2}], "difference", False),  # so does another tensor
        ({**OUT, "ids": torch.tensor([0, 1, 3])}, [{"h.0.w": 2}], "difference", False),
        ({k: v.half() for k, v in OUT.items()}, [{"h.0.w": 2}], "difference", False),
        ({**OUT, "h.0.w": OUT["h.0.w"].reshape(2, 3)}, [{"h.0.w": 2}], "difference", False),
        ({"h.0.v": OUT["h.0.w"], "norm": OUT["norm"]}, [{"h.0.w": 2}], "difference", False),
        ({**OUT, "tied": OUT["norm"].clone()}, [{"h.0.w": 2}], "difference", False),
        (BASE, [{"h.0.w": 0}], "difference", False),  # nothing was patched: there is no share
        (OUT, [{"h.0.w": 2, "norm": 0}, {"h.0.w": 0, "norm": 1}], "sum", True),
        (OUT, [{"h.0.w": 2}, {"h.0.w": 1}], "sum", False),  # on three entries or on two
        (OUT, [{"h.0.w": 2}, {"h.0.w": 1}], "ties", False),
    ],
)
def test_what_the_checkpoints_cannot_show_is_not_told(
    tmp_path: Path, out: Tensors, applied: list[dict[str, int]], combine: str, told: bool
) -> None:
    assert (small(tmp_path, BASE, out, applied, combine) is not None) == told


def test_a_manifest_is_read_for_what_was_patched_per_layer(tmp_path: Path) -> None:
    counts = {"eligible": 9, "selected": 3, "applied": 1}
    tensors = {
        "model.layers.10.mlp.up_proj.weight": {"entries": 100, **counts},
        "model.layers.2.mlp.up_proj.weight": {"entries": 50, **counts},
        "model.layers.2.mlp.down_proj.weight": {"entries": 50, **counts},
        "lm_head.weight": {"entries": 7, **counts},
    }
    recipe = {"base": "b", "combine": "difference"}
    path = tmp_path / "safepatch.json"
    path.write_text(json.dumps({"recipe": recipe, "patches": [{"name": "safety", "tensors": tensors}]}))
    assert layers_of(read_manifest(path)) == [
        {
            "name": "safety",
            "layers": [
                {"layer": 2, "entries": 100, "selected": 6, "applied": 2},
                {"layer": 10, "entries": 100, "selected": 3, "applied": 1},
                {"layer": None, "entries": 7, "selected": 3, "applied": 1},
            ],
        }
    ]
    for broken in (
        "{",
        "[]",
        {"recipe": recipe, "patches": []},
        {"recipe": recipe, "patches": [{"name": "x"}]},
        {"recipe": recipe, "patches": [{"name": "x", "tensors": {"t": {}}}]},
        {"recipe": recipe, "patches": [{"name": "x", "tensors": {}}, {"name": "y", "tensors": tensors}]},
        {"patches": [{"name": "x", "tensors": tensors}]},
    ):
        path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
        with pytest.raises(InputError, match="not the manifest of a merge"):
            read_manifest(path)
