"""Export the analytic report of every workload profile as JSON and YAML, read all of them back, compare and validate.

Needs no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
from artifacts import command, folder, parser, show

import dsocr_trace
from analytic.workload import profile_names
from dsocr_trace.exports.analytic_report import SCHEMA_VERSION, walk

SCHEMA = Path(__file__).resolve().parents[3] / "docs" / "schemas" / f"analytic-model-report-v{SCHEMA_VERSION}.json"

LOOK_AT = """
  The table above
    - Every line says equal and valid.
    - Modules: those of the tree; nodes: what is left once equal neighbours are folded.
  Any of the .yaml files
    - Under root, names and nesting are those of the model; model.layers.0 stands apart from model.layers.[1-11].
    - repetition: experts are parfor, layers and blocks are for.
    - Every stage has calls, its own and its total cost, and operators with their categories.
    - workload, hardware and routing_source say all that is needed to compute the same numbers again.
"""


def main() -> int:
    """Export, read back, compare, validate."""
    options = parser(__doc__)
    options.add_argument("--workloads", nargs="+", default=profile_names(), metavar="ID", help="which profiles [all]")
    given = options.parse_args()
    where = folder(given)
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    lines, good = [], True
    for name in given.workloads:
        paths = [where / f"{name}.{ending}" for ending in ("json", "yaml")]
        for path in paths:
            command("predict", "--workload", name, "--hardware", given.hardware, "--export", path, "--force")
        from_json, from_yaml = (dsocr_trace.load_report(path) for path in paths)
        equal = from_json == from_yaml
        valid = validator.is_valid(json.loads(paths[0].read_text(encoding="utf-8")))
        nodes = list(walk(from_json.root))
        lines.append(
            f"  {name:<20}{from_json.report_id:<18}{sum(node.instances for node in nodes):>8,}{len(nodes):>7}"
            f"{from_json.summary.predicted_total_time_ms:>14.3f}  "
            f"{'equal' if equal else 'DIFFERENT'}, {'valid' if valid else 'INVALID'}"
        )
        good = good and equal and valid
    print(f"\n  {'workload':<20}{'report':<18}{'modules':>8}{'nodes':>7}{'predicted ms':>14}")
    print("\n".join(lines))
    show(where, LOOK_AT)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
