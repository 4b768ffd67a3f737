"""Performance and memory report of DeepSeek-OCR: one run, its report, and the same workload predicted for a device.

The tiny model with its 8 tokens by default; the full-size model and the standard workload with --full.
"""

from __future__ import annotations

import json
import sys

import attrs
from artifacts import STANDARD, TINY, command, folder, parser, show, write_json

import dsocr_trace
from dsocr_trace.exports.builder import forecast_report, run_report

LOOK_AT = """
  run/report.md
    - "Can it be trusted": coverage is above 90 %, what is missing has a reason, the tracing cost is a few percent.
    - "Per-stage timings and MFU" and "Top modules": stages and modules are those that you expect to be heavy.
    - Memory: weights, activations and cache per stage are plausible for this model.
  report-run.json, the report of the run as other tools read it
    - summary: predicted and measured total and their ratio, and the ten heaviest modules with their shares.
    - A second run of this script gives shares of the same order: they can be planned with.
  report-prediction.json, the same workload on the device that was asked for
    - The heaviest modules are the same ones, or you can say why not (other peaks, other batch).
  summary.json
    - Both summaries in one file, for a slide.
"""


def main() -> int:
    """Run, predict, and sum up."""
    options = parser(__doc__)
    options.add_argument("--full", action="store_true", help="full-size model: minutes on a CPU, about 9 GB")
    options.add_argument("--device", default="auto", help="where to run [auto]")
    given = options.parse_args()
    where, workload = folder(given), STANDARD if given.full else TINY
    ran = json.loads(
        command("run", "--workload", workload, "--device", given.device, "--output", where, "--run-id", "run", "--json")
    )
    reports = {
        "run": run_report(dsocr_trace.load(where / "run")),
        "prediction": forecast_report(dsocr_trace.predict(workload, given.hardware)),
    }
    for name, report in reports.items():
        dsocr_trace.save_report(report, where / f"report-{name}.json", force=True)
    write_json(where / "summary.json", {name: attrs.asdict(report.summary) for name, report in reports.items()})
    print(f"\n{workload}: {ran['coverage']:.1%} of the measured time is in named modules")
    for name, report in reports.items():
        summary = report.summary
        print(f"\n{name} ({report.hardware.name}, {report.model.variant}, {report.model.dtype})")
        print(f"  predicted {summary.predicted_total_time_ms:12.3f} ms")
        if summary.measured_total_time_ms is not None:
            print(f"  measured  {summary.measured_total_time_ms:12.3f} ms")
        for top in summary.top_modules[:5]:
            print(f"  {top.share_of_model_time:6.1%}  {top.stage:<8}{top.name:<14}{top.module_id}")
    show(where, LOOK_AT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
