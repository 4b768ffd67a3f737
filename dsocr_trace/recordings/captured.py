"""What runs under a profiler in Stage 2: ``python -m dsocr_trace.recordings.captured FOLDER``.

The folder holds the job, and takes the outcome. Whatever is printed goes to a file there: a profiler records what its
program prints.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsocr_trace.runs.pipeline import RunOptions

JOB: Final = "job.json"
OUTCOME: Final = "outcome.json"
PRINTED: Final = "printed.txt"


def write_job(folder: Path, options: RunOptions, counts: Sequence[int]) -> None:
    """Leave what the child needs.

    Parameters
    ----------
    folder
        Where.
    options
        The run's options.
    counts
        How many tokens each page gets.
    """
    import cattrs  # noqa: PLC0415

    job = {"options": cattrs.unstructure(options), "counts": list(counts)}
    (folder / JOB).write_text(json.dumps(job, default=str), encoding="utf-8")


def main(folder: Path) -> None:
    """Run the job and write its outcome, or the one line that says why not."""
    printed = os.open(folder / PRINTED, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(printed, 1)
    os.dup2(printed, 2)

    from analytic.errors import DsocrTraceError  # noqa: PLC0415
    from hooks.errors import TraceError  # noqa: PLC0415

    try:
        outcome = _run(json.loads((folder / JOB).read_text(encoding="utf-8")))
    except (DsocrTraceError, TraceError) as error:
        outcome = {"failure": str(error)}
    (folder / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")


def _run(content: dict[str, Any]) -> dict[str, Any]:
    import attrs  # noqa: PLC0415
    import cattrs  # noqa: PLC0415

    from dsocr_trace.runs.pipeline import RunOptions, load_job, prepare  # noqa: PLC0415
    from stage_runners.stage2 import captured_generations  # noqa: PLC0415

    job = prepare(cattrs.structure(content["options"], RunOptions))
    model, inputs = load_job(job)
    return {"pages": [attrs.asdict(page) for page in captured_generations(model, inputs, content["counts"])]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
