"""Run a workload from end to end, and say what a reviewer should look at.

``python manual_standard_run.py [WORKLOAD] [OPTION]...``: options behind the workload go to ``dsocr-trace run``.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

STANDARD = "dsocr-standard-v1"

LOOK_AT = """
What to look at
  report.md, "Can it be trusted"
    - Coverage: above 99 % with the full-size model. What is missing stands under "Unclassified", with reasons.
    - Tracing cost: a few percent of a decode step. More, or less than nothing: the machine was busy; run again.
    - Clocks: agree within a few microseconds.
    - No note that surprises you.
  report.md, "Per-stage timings and MFU"
    - No stage is predicted to take longer than it took (Pred./dev. at most 1).
    - On a GPU: device time is not above wall time.
  report.md, "Top modules" and "Top kernels"
    - The heaviest modules are ones that you expect, and the heaviest kernels are what they launch.
  attribution.parquet, with pandas
    - The root's scaled_total_ns and the unclassified rows add up to the stage's device time.
"""


def main() -> int:
    """Run, then print the artifacts and the list."""
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        print(__doc__)
        return 0
    workload = given.pop(0) if given and not given[0].startswith("-") else STANDARD
    command = [sys.executable, "-m", "dsocr_trace", "run", "--workload", workload, *given]
    print(f"$ dsocr-trace {shlex.join(command[3:])}", flush=True)
    finished = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if finished.returncode:
        return finished.returncode
    summary = json.loads(finished.stdout)
    folder = Path(summary["run_dir"]).resolve()
    print(f"\nArtifacts in {folder}")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name:<22}{path.stat().st_size:>12,} bytes")
    print(f"\ncoverage {summary['coverage']:.2%}, traced over plain {summary['overhead_ratio']}")
    print(f"first tokens {summary['tokens'][:8]}")
    print(LOOK_AT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
