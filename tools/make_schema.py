"""Write schema/recipe.schema.json, which editors use; with `--check`, only report whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from lowvram_chat.recipe.yaml_file import json_schema

PATH = Path(__file__).parent.parent / "schema" / "recipe.schema.json"

if __name__ == "__main__":
    if "--check" not in sys.argv:
        PATH.write_text(json_schema(), encoding="utf-8")
    elif not PATH.is_file() or PATH.read_text(encoding="utf-8") != json_schema():
        sys.exit(f"{PATH.name}: not current. Run python tools/make_schema.py.")
