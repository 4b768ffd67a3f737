"""Many runs as one frame."""

from __future__ import annotations

import glob
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from analytic.errors import InputError
from dsocr_trace.runs.schemas import SCHEMA_VERSION, TABLES
from dsocr_trace.runs.store import MANIFEST, Run

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Columns that every row gets beside those of its table.
MANIFEST_COLUMNS: Final = (
    "run_id", "started_at", "workload", "model", "variant", "dtype", "attention", "device_name", "hardware",
    "git_commit",
)  # fmt: skip


def load_all(runs: str | Path | Iterable[str | Path], table: str = "attribution") -> pd.DataFrame:
    """Read one table of many runs into one frame.

    Parameters
    ----------
    runs
        A pattern such as ``results/*``, of which everything that is no run directory is passed over; or the
        directories themselves.
    table
        Name of the table, see `dsocr_trace.runs.schemas.TABLES`.

    Returns
    -------
    pandas.DataFrame
        The rows of all runs, ordered by run id; `MANIFEST_COLUMNS` first, then the table's own, units as there. A run
        of another schema version is left out with a warning.

    Raises
    ------
    InputError
        If there is no such table or no run, or a run is damaged.
    """
    if table not in TABLES:
        raise InputError(f"no table {table!r}; choose one of {', '.join(TABLES)}")
    frames = []
    for run in _found(runs):
        problem = other_version(run)
        if problem:
            warnings.warn(f"left out: {problem}", stacklevel=2)
        else:
            frames.append(_labelled(run, table))
    if not frames:
        raise InputError(f"no runs of schema version {SCHEMA_VERSION} in {runs}; name run directories, like results/*")
    return pd.concat(frames, ignore_index=True)


def other_version(run: Run) -> str | None:
    """Why a run cannot be read together with those that this version writes; None if it can.

    Raises
    ------
    InputError
        If its manifest is damaged.
    """
    try:
        version = run.manifest.get("schema_version")
    except (json.JSONDecodeError, OSError) as error:
        raise InputError(f"the manifest of {run.path} is damaged: {error}; make the run again") from error
    if version == SCHEMA_VERSION:
        return None
    return f"{run.path} has schema version {version}, this dsocr-trace reads {SCHEMA_VERSION}; make the run again"


def _found(runs: str | Path | Iterable[str | Path]) -> list[Run]:
    if isinstance(runs, str | Path):
        # pathlib takes no absolute patterns.
        paths = [Path(path) for path in sorted(glob.glob(str(runs)))]  # noqa: PTH207
        return [Run(path) for path in paths if (path / MANIFEST).is_file()]
    return [Run(Path(path)) for path in runs]


def _labelled(run: Run, table: str) -> pd.DataFrame:
    manifest: dict[str, Any] = run.manifest
    named = manifest | {
        "run_id": run.path.resolve().name,
        "workload": manifest["workload"]["id"],
        "device_name": manifest["device"]["name"],
        "hardware": manifest["hardware"]["name"],
    }
    labels = pd.DataFrame({name: named[name] for name in MANIFEST_COLUMNS}, index=[0])
    rows = run.table(table).reindex(columns=TABLES[table].names)
    return labels.merge(rows, how="cross")
