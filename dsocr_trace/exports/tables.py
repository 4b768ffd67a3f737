"""The tables of a run as the exports read them: whole numbers stay whole, which pandas makes floats beside nulls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analytic.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from dsocr_trace.runs.store import Run


def arrow_table(run: Run, name: str) -> pa.Table:
    """Read one table.

    Raises
    ------
    InputError
        If it is missing or damaged.
    """
    import pyarrow as pa  # noqa: PLC0415  reports of predictions do without
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        return pq.read_table(run.path / f"{name}.parquet")
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"run {run.path} is incomplete: {error}; give another run") from error


def rows(run: Run, name: str) -> list[dict[str, Any]]:
    """Read the rows of one table; a null is None.

    Raises
    ------
    InputError
        If it is missing or damaged.
    """
    found: list[dict[str, Any]] = arrow_table(run, name).to_pylist()
    return found
