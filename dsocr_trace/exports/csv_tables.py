"""A run's tables as comma-separated values."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Final

from dsocr_trace.exports.tables import arrow_table

if TYPE_CHECKING:
    from dsocr_trace.runs.store import Run

#: What stands for null, as an empty text is a value: the path of the root.
NULL: Final = "NULL"


def csv_archive(run: Run) -> bytes:
    """Pack every table of a run as one CSV file each into a zip archive; equal runs give equal bytes.

    A table equals its Parquet file when read back with
    ``pandas.read_csv(file, keep_default_na=False, na_values=["NULL"])``.

    Parameters
    ----------
    run
        What to export.

    Raises
    ------
    InputError
        If a table is missing or damaged.
    """
    import pandas as pd  # noqa: PLC0415  reports of predictions do without

    from dsocr_trace.runs.schemas import STAGE2_TABLES, TABLES  # noqa: PLC0415

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (*TABLES, *(name for name in STAGE2_TABLES if (run.path / f"{name}.parquet").exists())):
            frame = arrow_table(run, name).to_pandas(types_mapper=pd.ArrowDtype)
            # A member of this date, zip's first, does not depend on when it was made.
            member = zipfile.ZipInfo(f"{name}.csv")
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, frame.to_csv(index=False, na_rep=NULL, lineterminator="\n"))
    return packed.getvalue()
