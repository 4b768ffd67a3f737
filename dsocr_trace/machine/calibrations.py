"""Calibrations as files: Parquet, one row per sample, with everything else in the schema's metadata. Needs no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cattrs import BaseValidationError
from cattrs.preconf.json import make_converter

from analytic.cost import DTYPES
from analytic.errors import DsocrTraceError, InputError
from analytic.hardware import Hardware
from analytic.operators import OPERATORS
from analytic.timing.calibration import Calibration, Sample
from analytic.timing.curves import Curves, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from analytic.operators import OperatorCall

#: Raised when a column, a key or a meaning changes.
SCHEMA_VERSION: Final = 3

SAMPLES: Final = pa.schema(
    [
        pa.field("operator", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("arguments", pa.string(), nullable=False),
        pa.field("device_ns", pa.float64(), nullable=False),
        pa.field("host_ns", pa.float64(), nullable=False),
        pa.field("spread", pa.float64(), nullable=False),
        pa.field("repeats", pa.int64(), nullable=False),
    ]
)

_KEY: Final = b"dsocr_trace.calibration"
_LEAST_SAMPLES: Final = 3
_CONVERTER: Final = make_converter(forbid_extra_keys=True)
# The data model imports this type for type checkers only.
for _kind in (Sample, Hardware, Calibration):
    attrs.resolve_types(_kind, localns={"Mapping": Mapping})


def save_calibration(calibration: Calibration, path: Path, *, force: bool = False) -> Path:
    """Write a calibration aside and rename it.

    Parameters
    ----------
    calibration
        What to write.
    path
        File to write, ending in ``.parquet``.
    force
        Whether to replace an existing file.

    Raises
    ------
    InputError
        If the file cannot be of that name, exists, or its directory does not.
    DsocrTraceError
        If it cannot be written.
    """
    check_writable(path, force=force)
    provenance = _CONVERTER.unstructure(attrs.evolve(calibration, samples=()))
    told = {"schema_version": SCHEMA_VERSION} | provenance
    rows = [attrs.asdict(sample, recurse=False) for sample in calibration.samples]
    for row in rows:
        row["arguments"] = json.dumps(dict(row["arguments"]))
    table = pa.Table.from_pylist(rows, schema=SAMPLES.with_metadata({_KEY: json.dumps(told).encode()}))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, aside, compression="zstd")
        aside.replace(path)
    except OSError as error:
        raise DsocrTraceError(
            f"cannot write {path}: {error.strerror or error}; nothing is left behind, choose another with --output"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse a file that could not be written in the end.

    Raises
    ------
    InputError
        If it does not end in ``.parquet``, exists and `force` is not set, or its directory is missing.
    """
    from dsocr_trace.exports.files import check_free  # noqa: PLC0415  reading does without all exports

    if path.suffix != ".parquet":
        raise InputError(f"{path} must end in .parquet; give the file another name with --output")
    check_free(path, force=force)


def load_calibration(path: Path) -> Calibration:
    """Read a calibration back; it is equal to the one that was written.

    Parameters
    ----------
    path
        File that ``dsocr-trace calibrate`` or `save_calibration` has written.

    Raises
    ------
    InputError
        If the file cannot be read, is no calibration, or has another schema version.
    """
    again = "make one with dsocr-trace calibrate"
    if not path.is_file():
        raise InputError(f"no calibration {path}; {again}")
    try:
        table = pq.ParquetFile(path).read()  # `read_table` would load pandas
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"calibration {path} cannot be read: {' '.join(str(error).split())}; {again}") from error
    told = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
    if told is None:
        raise InputError(f"{path} is no calibration: its metadata have no {_KEY.decode()}; {again}")
    version = told.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {version!r}, this dsocr-trace reads {SCHEMA_VERSION}; {again}")
    try:
        found = _CONVERTER.structure(told, Calibration)
        rows = table.select(SAMPLES.names).to_pylist()
    except (BaseValidationError, KeyError) as error:
        raise InputError(f"{path} is no calibration: fields are missing or unknown; {again}") from error
    samples = (Sample(**row | {"arguments": json.loads(row["arguments"])}) for row in rows)
    return attrs.evolve(found, samples=tuple(samples))


@attrs.frozen
class LeftOut:
    """How well the curves give a sample that they were not made from.

    Attributes
    ----------
    operator, dtype
        Whose samples, and the dtype that they compute in.
    samples
        How many.
    median_error
        Median over them of predicted time over measured time, or its inverse, whichever is larger, less 1.
    """

    operator: str
    dtype: str
    samples: int
    median_error: float


def left_out(calibration: Calibration) -> tuple[LeftOut, ...]:
    """Leave each sample out in turn, and predict it from the others of its operator; the worst operators first."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in calibration.samples:
        groups.setdefault((sample.operator, compute_dtype(sample.arguments)), []).append(sample)
    found = [
        LeftOut(operator, dtype, len(samples), _median_error(calibration, samples))
        for (operator, dtype), samples in groups.items()
        if len(samples) >= _LEAST_SAMPLES
    ]
    return tuple(sorted(found, key=lambda entry: -entry.median_error))


def _median_error(calibration: Calibration, samples: list[Sample]) -> float:
    def error(number: int) -> float:
        others = (*samples[:number], *samples[number + 1 :])
        predicted = Curves(attrs.evolve(calibration, samples=others)).time(_call(samples[number])).device_ns
        return abs(math.log(predicted / samples[number].device_ns))

    return math.expm1(float(np.median([error(number) for number in range(len(samples))])))


def _call(sample: Sample) -> OperatorCall:
    arguments = {
        name: DTYPES.get(value, value) if isinstance(value, str) else value for name, value in sample.arguments.items()
    }
    (call,) = OPERATORS[sample.operator](**arguments).calls
    return call


def summary(path: Path, calibration: Calibration, errors: Iterable[LeftOut]) -> dict[str, Any]:
    """What ``dsocr-trace calibrate --json`` prints."""
    told: dict[str, Any] = _CONVERTER.unstructure(attrs.evolve(calibration, samples=()))
    del told["samples"]
    left = [attrs.asdict(entry) for entry in errors]
    return {"calibration": str(path), "sample_count": len(calibration.samples)} | told | {"left_out": left}
