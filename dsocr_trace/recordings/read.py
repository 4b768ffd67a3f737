"""The one door to what other tools recorded: nothing behind it knows which tool it was."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from analytic.errors import InputError
from hooks.errors import NothingRecordedError, TraceError
from hooks.nsight import find_tool
from hooks.readers.kineto import read_kineto
from hooks.readers.ncu import read_ncu
from hooks.readers.nsys import read_nsys, read_nsys_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hooks.recording import Recording

#: How files of each kind begin. A CSV of Nsight Compute may have lines of the profiled program before it.
_STARTS: Final = (
    (re.compile(rb"SQLite format 3\x00"), read_nsys),
    (re.compile(rb"\x1f\x8b"), read_kineto),
    (re.compile(rb"(\xef\xbb\xbf)?\s*[{\[]"), read_kineto),
    (re.compile(rb'(.*\n)*?(\xef\xbb\xbf)?(==(PROF|WARNING|ERROR)==|"?ID"?,"?Process ID"?,)'), read_ncu),
)
_LOOKED_AT_BYTES: Final = 1 << 20
_KINDS: Final = (
    "an Nsight Systems export (.sqlite) or report (.nsys-rep), an Nsight Compute CSV or report (.ncu-rep), "
    "a torch.profiler trace (.json, .json.gz)"
)


def read_recording(path: Path) -> Recording:
    """Read a trace of any kind that can be read; its content tells which, and for reports the ending of the name.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    InputError
        If it cannot be read, or is of no kind that can.
    TraceError
        If there is nothing in it, or it is a report whose program is missing or too old.
    """
    start = _start(path)
    if path.suffix in _REPORTS:
        return _REPORTS[path.suffix](path)
    reader = next((reader for pattern, reader in _STARTS if pattern.match(start)), None)
    if reader is None:
        raise InputError(f"{path} is of no kind that can be read; give {_KINDS}")
    try:
        return reader(path)
    except NothingRecordedError:
        raise
    except TraceError as error:
        raise InputError(str(error)) from error


def _start(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a file: {_KINDS}")
    try:
        with path.open("rb") as file:
            start = file.read(_LOOKED_AT_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give {_KINDS}") from error
    if not start:
        raise InputError(f"{path} is empty; record it again, and give {_KINDS}")
    return start


def _nsys_report(path: Path) -> Recording:
    tool = find_tool("nsys")
    return read_nsys_report(path, tool.path if tool else None)


def _ncu_report(path: Path) -> Recording:
    tool = find_tool("ncu")
    return read_ncu(path, ncu=tool.path if tool else None)


#: Readers of the formats that only their own program can read, by ending.
_REPORTS: Final[dict[str, Callable[[Path], Recording]]] = {".nsys-rep": _nsys_report, ".ncu-rep": _ncu_report}
