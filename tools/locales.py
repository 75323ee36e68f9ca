"""Writes locales/en/nodeDefs.json, the English names and tooltips by which ComfyUI translates, from the node classes.

Run as `make locales`; a test compares the file with the classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

FILE = Path(__file__).resolve().parents[1] / "locales" / "en" / "nodeDefs.json"


def definitions() -> dict[str, Any]:
    """Display name, description, inputs and outputs of every node."""
    return {
        name: {
            "display_name": NODE_DISPLAY_NAME_MAPPINGS[name],
            "description": cls.DESCRIPTION,
            "inputs": {
                key: {"name": key, "tooltip": entry[1]["tooltip"]}
                for part in ("required", "optional")
                for key, entry in cls.INPUT_TYPES().get(part, {}).items()
            },
            "outputs": {
                str(number): {"name": output, "tooltip": tooltip}
                for number, (output, tooltip) in enumerate(zip(cls.RETURN_NAMES, cls.OUTPUT_TOOLTIPS, strict=True))
            },
        }
        for name, cls in sorted(NODE_CLASS_MAPPINGS.items())
    }


def main() -> None:
    """Write the file anew."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(definitions(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
