"""The JSON Schema that is shipped is the recipe's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import safepatch_core
from safepatch_core.merging.recipe import PatchSpec, Recipe
from safepatch_core.spec import COMBINE

SHIPPED = Path(safepatch_core.__file__).with_name("recipe.schema.json")


def test_the_file_is_the_recipes_schema() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "safepatch_core", "schema"], capture_output=True, text=True, check=True
    )
    assert SHIPPED.read_text() == told.stdout, "safepatch schema > safepatch_core/recipe.schema.json"


def test_an_editor_knows_every_key_and_no_other() -> None:
    schema = json.loads(SHIPPED.read_text())
    for model, found in ((Recipe, schema), (PatchSpec, schema["$defs"]["PatchSpec"])):
        keys = {field.alias or name for name, field in model.model_fields.items()}
        assert set(found["properties"]) == keys - {"origin"}
        assert found["additionalProperties"] is False
    for model in (schema, *schema["$defs"].values()):
        for key, of in model["properties"].items():
            assert of.get("description"), f"{key}: a line in merging/keys.py"
    assert schema["properties"]["combine"]["enum"] == list(COMBINE)
    assert (schema["required"], schema["$defs"]["PatchSpec"]["required"]) == (["base", "patches"], ["name", "source"])
