"""An Nsight Systems SQLite export, opened for reading only: which tables and columns it has, and what they hold.

Which of them a file has depends on the version that wrote it and on what was recorded, so nothing is taken for granted.
Tables are read through Arrow: a million rows as Python objects would take three times as long.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, Self

import adbc_driver_sqlite.dbapi as sqlite
import pyarrow as pa

from hooks.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

_BATCH_ROWS: Final = 65_536
_IDS_PER_QUERY: Final = 10_000


class NsysFile:
    """The file's tables, read one at a time. Use it in a ``with`` block.

    Parameters
    ----------
    path
        A file that ``nsys export --type sqlite`` wrote.

    Attributes
    ----------
    tables
        Columns of each table, by its name.

    Raises
    ------
    TraceError
        If the file cannot be read, is not SQLite, is damaged, or is still being written.
    """

    tables: dict[str, frozenset[str]]

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                start = file.read(16)
        except OSError as error:
            raise TraceError(f"{path} cannot be opened: {error.strerror}") from error
        if start != b"SQLite format 3\0":
            raise TraceError(f"{path} is not an SQLite file; export it with: nsys export --type sqlite REPORT.nsys-rep")
        for suffix in ("-wal", "-journal"):
            unfinished = path.with_name(path.name + suffix)
            if unfinished.exists() and unfinished.stat().st_size:
                raise TraceError(
                    f"{path} is still being written ({unfinished.name}); wait for nsys, or export it again"
                )

    def __enter__(self) -> Self:
        with self._complaints():
            # Immutable: SQLite then leaves no file beside it, not even a lock.
            self._connection = sqlite.connect(f"{self._path.resolve().as_uri()}?mode=ro&immutable=1")
        try:
            names = self._names("sqlite_master WHERE type = 'table'")
            self.tables = {name: self._columns(name) for name in names}
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def read(
        self,
        table: str,
        needed: Sequence[str],
        optional: Sequence[str] = (),
        *,
        text: str | None = None,
        where: str = "1",
    ) -> pa.Table:
        """Read integer columns of a table, and one of text.

        Parameters
        ----------
        table
            Its name; a table that does not exist is empty.
        needed, optional
            Columns that must be there, and those that read as null where they are not.
        text
            An optional column of text; undecodable bytes are replaced.
        where
            Which rows.

        Raises
        ------
        TraceError
            If a needed column is missing, or the file is damaged.
        """
        there = self.tables.get(table, frozenset(needed))
        if missing := [column for column in needed if column not in there]:
            raise TraceError(
                f"{self._path}: table {table} has no column {', '.join(missing)}; this version's layout is not known, "
                "export the report with an Nsight Systems of 2022.4 to 2026"
            )
        columns = [
            f'CAST("{column}" AS INTEGER) AS "{column}"' if column in there else f'NULL AS "{column}"'
            for column in (*needed, *optional)
        ]
        if text is not None:
            # Never null: the type of a column is that of its first rows.
            columns.append(
                f'COALESCE(CAST("{text}" AS BLOB), x\'\') AS "{text}"' if text in there else f"x'' AS \"{text}\""
            )
        source = f'"{table}" WHERE {where}' if table in self.tables else "(SELECT 1) WHERE 0"
        rows = self._query(f"SELECT {', '.join(columns)} FROM {source}")  # noqa: S608 - names of this package only
        names = [*needed, *optional]
        read = {name: rows[name].cast(pa.int64()) for name in names}
        if text is not None:
            read[text] = _text(rows[text])
        return pa.table(read)

    def strings(self, ids: Sequence[int]) -> dict[int, str]:
        """Texts by their number in ``StringIds``, and no others: that table holds the program's environment too."""
        found: dict[int, str] = {}
        for first in range(0, len(ids), _IDS_PER_QUERY):
            chosen = ", ".join(map(str, ids[first : first + _IDS_PER_QUERY]))
            rows = self.read("StringIds", ["id"], text="value", where=f"id IN ({chosen})")
            found.update(zip(rows["id"].to_pylist(), rows["value"].to_pylist(), strict=True))
        return found

    def export_fact(self, name: str) -> str | None:
        """What the file says of its own export under ``name``, such as ``EXPORT_SCHEMA_VERSION``."""
        for table in ("META_DATA_EXPORT", "EXPORT_META_DATA"):
            if {"name", "value"} <= self.tables.get(table, frozenset()):
                facts = self.read(table, [], text="value", where=f"name = '{name}'")["value"].to_pylist()
                if facts:
                    return str(facts[0])
        return None

    def _columns(self, table: str) -> frozenset[str]:
        quoted = table.replace("'", "''")
        return frozenset(self._names(f"pragma_table_info('{quoted}')"))

    def _names(self, source: str) -> list[str]:
        names: list[str] = _text(self._query(f"SELECT CAST(name AS BLOB) AS name FROM {source}")["name"]).to_pylist()  # noqa: S608
        return names

    def _query(self, statement: str) -> pa.Table:
        with self._complaints(), self._connection.cursor() as cursor:
            cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(_BATCH_ROWS)})
            cursor.execute(statement)
            return cursor.fetch_arrow_table()

    @contextlib.contextmanager
    def _complaints(self) -> Iterator[None]:
        """Say in one line what SQLite or Arrow could not read."""
        try:
            yield
        except (sqlite.Error, pa.ArrowException, UnicodeDecodeError, OSError) as error:
            reason = str(error).partition("\n")[0]  # the query follows
            raise TraceError(
                f"{self._path} cannot be read, it may be cut off: {reason}; copy or export it again"
            ) from error


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        decoded: list[Any] = [value.decode(errors="replace") for value in column.to_pylist()]
        return pa.chunked_array([pa.array(decoded, pa.string())])
