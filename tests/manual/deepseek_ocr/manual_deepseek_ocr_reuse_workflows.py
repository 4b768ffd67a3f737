"""Reuse the analytic model: what-if over devices, workloads and batch sizes, and the same reports read elsewhere.

Needs no torch. The reader at the end is another process that knows nothing of dsocr-trace, only JSON.
"""

from __future__ import annotations

import csv
import subprocess
import sys

from artifacts import STANDARD, folder, parser, show

import dsocr_trace
from dsocr_trace.exports.builder import forecast_report

HARDWARE = ("rtx-5090", "h100-sxm", "h200")
WHAT_IFS = {
    "as it is": {},
    "four pages at once": {"batch_size": 4},
    "no tiles": {"crop_grid": "none"},
    "busiest routing": {"routing": "worst"},
}

#: A capacity planner's own script: twice the memory bandwidth, and nothing else changed.
READER = """
import json, sys

def nodes(node):
    yield node
    for child in node["children"]:
        yield from nodes(child)

for path in sys.argv[1:]:
    report = json.load(open(path))
    own = [stage["own"] for node in nodes(report["root"]) for stage in node["stages"]]
    total = sum(part["predicted_ns"] for part in own + report["sampling"]) / 1e6
    memory = sum(cost["predicted_ns_by_bound"].get("memory", 0) for cost in own) / 1e6
    assert abs(total - report["summary"]["predicted_total_time_ms"]) < 1e-6, path
    held = report["model"]["weight_bytes"] + sum(cost["kv_cache_bytes"] for cost in own)
    print(f"  {report['report_id']}  {total:10.3f} ms; twice the bandwidth: at least {total - memory / 2:10.3f} ms; "
          f"weights and cache {held / 1e9:.3f} GB")
"""

LOOK_AT = """
  comparison.csv, one line per device and what-if
    - More bandwidth makes decode faster in step; more arithmetic makes vision faster.
    - Four pages at once take less than four times as long: weights are read once for all.
    - Without tiles, vision is cheaper, and the prompt shorter.
    - The busiest routing is never faster than the balanced one.
  The lines of the other process
    - Its totals are those of the reports: a spreadsheet or a planner needs nothing but the file.
"""


def main() -> int:
    """Predict all combinations, compare, and let another process read the reports."""
    options = parser(__doc__)
    options.add_argument("--workload", default=STANDARD, metavar="ID", help=f"what to vary [{STANDARD}]")
    given = options.parse_args()
    where, paths, rows = folder(given), [], []
    for hardware in dict.fromkeys((given.hardware, *HARDWARE)):
        for what_if, settings in WHAT_IFS.items():
            report = forecast_report(dsocr_trace.predict(given.workload, hardware, settings=settings))
            path = where / f"{hardware}-{what_if.replace(' ', '-')}.json"
            paths.append(dsocr_trace.save_report(report, path, force=True))
            times = {entry.stage: entry.total.predicted_ns / 1e6 for entry in dsocr_trace.load_report(path).root.stages}
            pages = report.workload.batch_size
            rows.append(
                {"hardware": hardware, "what_if": what_if, "pages": pages}
                | {f"{stage}_ms": round(time, 3) for stage, time in times.items()}
                | {"ms_per_page": round(sum(times.values()) / pages, 3), "report_id": report.report_id}
            )
    with (where / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print((where / "comparison.csv").read_text(encoding="utf-8"))
    print("Read by another process", flush=True)
    subprocess.run([sys.executable, "-I", "-c", READER, *map(str, paths)], check=True)  # noqa: S603
    show(where, LOOK_AT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
