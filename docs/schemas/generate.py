"""Write the JSON Schema of the analytic report, from its classes: ``python docs/schemas/generate.py``."""  # noqa: INP001

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec

from dsocr_trace.exports.analytic_report import SCHEMA_VERSION, AnalyticModelReport

PATH = Path(__file__).with_name(f"analytic-model-report-v{SCHEMA_VERSION}.json")


def schema() -> dict[str, Any]:
    """JSON Schema (Draft 2020-12); like the reader, it knows no fields but those of the classes."""
    found = msgspec.json.schema(AnalyticModelReport)
    for definition in found["$defs"].values():
        definition["description"] = inspect.cleandoc(definition["description"])
        definition["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def main() -> None:
    """Write the file beside this script."""
    PATH.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
