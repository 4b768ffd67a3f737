"""What this machine can do, and for each missing part the command that installs it. Works without torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import pynvml

from hooks.errors import TraceError
from hooks.nsight import find_tool, install_hint, probe_ranges, silent_nvtx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hooks.nsight import Tool

#: The first that is supported, and the first that is not.
_PYTHON: Final = ((3, 11), (3, 14))
#: Settings of the loaded driver; one says whether only administrators may read counters.
_DRIVER_PARAMETERS: Final = Path("/proc/driver/nvidia/params")


@attrs.frozen
class Check:
    """One part of the machine.

    Attributes
    ----------
    part
        Its name.
    found
        What is there.
    fix
        The command or step that helps; None if the part is as it should be.
    required
        Whether ``dsocr-trace run`` cannot do without.
    """

    part: str
    found: str
    fix: str | None = None
    required: bool = False

    @property
    def state(self) -> str:
        """``ok``, ``missing`` if no run is possible without it, else ``limited``."""
        if self.fix is None:
            return "ok"
        return "missing" if self.required else "limited"


def examine(output: Path, *, probe: bool = False) -> list[Check]:
    """Look at every part. Nothing is changed on the machine.

    Parameters
    ----------
    output
        Where runs would be written.
    probe
        Record one NVTX range too, which takes about two seconds.
    """
    nsys = find_tool("nsys")
    return [
        _python(),
        _results(output),
        _driver(),
        *_torch(),
        _nsys(nsys),
        _nvtx(nsys, probe=probe),
        _ncu(),
    ]


def is_ready(checks: Sequence[Check]) -> bool:
    """Say whether runs are possible: nothing that is required is missing."""
    return all(check.state != "missing" for check in checks)


def _python() -> Check:
    supported = _PYTHON[0] <= sys.version_info[:2] < _PYTHON[1]
    return Check(
        "python", platform.python_version(), None if supported else "install Python 3.11 to 3.13", required=True
    )


def _results(output: Path) -> Check:
    """Look at the nearest folder that is there: the rest would be made."""
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check("results", f"{output} can be written to", required=True)
    except OSError as error:
        found = f"{output} cannot be written to ({error.strerror})"
        return Check("results", found, "choose another folder: run --output DIR", required=True)


def _driver() -> Check:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Check(
            "driver", f"none ({error})", "on a machine with an NVIDIA GPU, install its driver: nvidia.com/drivers"
        )
    try:
        count = pynvml.nvmlDeviceGetCount()
        return Check("driver", f"NVIDIA {pynvml.nvmlSystemGetDriverVersion()}, {count} GPUs")
    finally:
        pynvml.nvmlShutdown()


def _torch() -> list[Check]:
    if importlib.util.find_spec("torch") is None:
        found = "not installed: only predict, sweep and reports work"
        return [Check("torch", found, "pip install torch", required=True)]
    try:
        from dsocr_trace.machine.doctor_torch import examine_torch  # noqa: PLC0415
    except (ImportError, OSError) as error:
        found = f"does not load: {str(error).splitlines()[0]}"
        return [Check("torch", found, "pip install --force-reinstall torch", required=True)]
    return examine_torch()


def _nsys(nsys: Tool | None) -> Check:
    if nsys is None:
        return Check("nsys", "not here: no run --stage 2", install_hint("nsys"))
    return Check("nsys", f"{nsys.version}, {nsys.path}", install_hint("nsys") if nsys.too_old else None)


def _nvtx(nsys: Tool | None, *, probe: bool) -> Check:
    """Versions tell whether ranges are recorded; a probe proves it."""
    version = metadata.version("nvtx")
    if nsys is None or nsys.too_old:
        return Check("nvtx", f"{version}, not tried: needs nsys")
    silence = silent_nvtx(nsys)
    if not probe:
        return Check("nvtx", f"{version}, by its version {'silent' if silence else 'heard'} under this nsys", silence)
    try:
        ranges = probe_ranges(nsys)
    except TraceError as error:
        return Check("nvtx", f"{version}, the probe failed", str(error))
    if ranges:
        return Check("nvtx", f"{version}, its range was recorded")
    return Check("nvtx", f"{version}, its range was not recorded", silence or install_hint("nsys"))


def _ncu() -> Check:
    ncu = find_tool("ncu")
    if ncu is None:
        return Check("ncu", "not here: no hardware counters", install_hint("ncu"))
    if ncu.too_old:
        return Check("ncu", f"{ncu.version}, {ncu.path}", install_hint("ncu"))
    if counters_restricted():
        return Check(
            "ncu",
            f"{ncu.version}, {ncu.path}; only administrators may read counters",
            "run as root, or load the module nvidia with NVreg_RestrictProfilingToAdminUsers=0",
        )
    return Check("ncu", f"{ncu.version}, {ncu.path}")


def counters_restricted(parameters: Path = _DRIVER_PARAMETERS) -> bool:
    """Say whether the driver lets only administrators read counters, and this user is none.

    Parameters
    ----------
    parameters
        The driver's file of settings; it is not there without a driver.
    """
    text = parameters.read_text(encoding="utf-8") if parameters.is_file() else ""
    return re.search(r"^RmProfilingAdminOnly: 1$", text, re.MULTILINE) is not None and os.geteuid() != 0
