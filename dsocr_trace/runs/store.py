"""Run directories: written aside and renamed when complete, read back as pandas frames."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analytic.errors import DsocrTraceError, InputError
from dsocr_trace.runs.schemas import STAGE2_TABLES, TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MANIFEST: Final = "run.json"
#: A full-size run takes about a fifth of this.
_ROOM_BYTES: Final = 50_000_000


class FolderWriter:
    """A directory in the making: written aside, so that nothing half-written is ever seen under its name.

    Parameters
    ----------
    path
        The directory; those above it are made.
    schemas
        Schema of each table that it may hold, by name.

    Raises
    ------
    InputError
        If it cannot be written to.
    DsocrTraceError
        If the disk is nearly full.
    """

    def __init__(self, path: Path, schemas: Mapping[str, pa.Schema]) -> None:
        self.path = path
        self._schemas = schemas
        root = path.parent
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=root))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(
                f"cannot write runs to {root}: {reason}; choose another directory with --output"
            ) from error
        free = shutil.disk_usage(root).free
        if free < _ROOM_BYTES:
            self.discard()
            raise DsocrTraceError(
                f"{root} has {free / 1e6:.0f} MB left, a run may take {_ROOM_BYTES / 1e6:.0f} MB; "
                "free some, or choose another directory with --output"
            )

    @property
    def folder(self) -> Path:
        """Where it is being built."""
        return self._aside

    def table(self, name: str, rows: pa.Table | pd.DataFrame) -> None:
        """Write one table, its columns in the order and types of its schema."""
        schema = self._schemas[name]
        if isinstance(rows, pd.DataFrame):
            rows = pa.Table.from_pandas(rows.reindex(columns=schema.names), schema=schema, preserve_index=False)
        whole = [field.name for field in schema if pa.types.is_integer(field.type)]
        with self._explained():
            pq.write_table(
                rows.select(schema.names).cast(schema),
                self._aside / f"{name}.parquet",
                compression="zstd",
                # Times and ids grow from row to row: stored as differences they take half the room.
                use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)],
                column_encoding=dict.fromkeys(whole, "DELTA_BINARY_PACKED"),
            )

    def text(self, name: str, content: str) -> None:
        """Write one text file."""
        with self._explained():
            (self._aside / name).write_text(content, encoding="utf-8")

    def publish(self, *, replace: bool = False) -> Path:
        """Give the complete directory its name; what stands there is removed if `replace` is set, else an error."""
        with self._explained():
            for path in self._aside.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            self._aside.chmod(0o755)
            if replace and self.path.exists():
                # Only an empty directory can be renamed over.
                self.path.rename(self._aside / ".replaced")
            self._aside.rename(self.path)
            shutil.rmtree(self.path / ".replaced", ignore_errors=True)
        return self.path

    def discard(self) -> None:
        """Remove what was written aside; does nothing after `publish`."""
        shutil.rmtree(self._aside, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise DsocrTraceError(
                f"cannot write {self.path}: {reason}; nothing is left behind, choose another place with --output"
            ) from error


class RunWriter(FolderWriter):
    """A run directory in the making.

    Parameters
    ----------
    root
        Directory that holds runs; made if absent.
    run_id
        Name of the new run's directory.

    Raises
    ------
    InputError
        If the run exists, the name is not a plain one, or the directory cannot be written to.
    DsocrTraceError
        If the disk is nearly full.
    """

    def __init__(self, root: Path, run_id: str) -> None:
        if Path(run_id).name != run_id or run_id.startswith("."):
            raise InputError(
                f"run id {run_id!r} must be a plain name without slashes or leading dot; choose with --run-id"
            )
        path = root / run_id
        if path.exists():
            raise InputError(f"run {path} exists and is left as it is; choose another name with --run-id")
        super().__init__(path, TABLES | STAGE2_TABLES)

    def manifest(self, content: dict[str, Any]) -> None:
        """Write the manifest."""
        self.text(MANIFEST, json.dumps(content, indent=2) + "\n")


class Run:
    """A finished run.

    Each table of the run directory is an attribute: ``run.attribution``, ``run.kernels``, ... (see
    `dsocr_trace.runs.schemas.TABLES`), read when first asked for.

    Parameters
    ----------
    path
        The run's directory.

    Raises
    ------
    InputError
        If there is no run there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / MANIFEST).is_file():
            raise InputError(f"{path} is not a run directory: it has no {MANIFEST}")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The run's manifest."""
        content: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        return content

    def table(self, name: str) -> pd.DataFrame:
        """Read one table."""
        path = self.path / f"{name}.parquet"
        try:
            return pd.read_parquet(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{path} is missing or damaged, so {self.path} is no complete run; make it again"
            ) from error

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name not in TABLES | STAGE2_TABLES:
            raise AttributeError(f"a run has no table {name!r}; the tables are {', '.join(TABLES | STAGE2_TABLES)}")
        if name in STAGE2_TABLES and not (self.path / f"{name}.parquet").exists():
            raise AttributeError(f"this run has no table {name!r}: only runs with --stage 2 can have it")
        frame = self.table(name)
        self.__dict__[name] = frame
        return frame

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *TABLES]


def load(path: str | Path) -> Run:
    """Open a run directory.

    Parameters
    ----------
    path
        The run's directory, such as ``results/RUN_ID``.

    Raises
    ------
    InputError
        If there is no run there.
    """
    return Run(Path(path))
