"""NVIDIA's profilers on this machine: where they are, which version, and what a recording may see of the user.

A recording of Nsight Systems holds the environment of what it profiles, and of every other process that its user may
look at. So a profiler is started with the few variables that Python, torch and CUDA need and none that may be a secret,
and, where the machine allows it, in a process namespace of its own, where no other process is to be seen.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from hooks.errors import TraceError
from hooks.nvtx_ranges import DOMAIN
from hooks.readers.nsys import read_nsys_report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Where ``make nsys`` puts Nsight Systems: in the checkout.
TOOLS: Final = Path(__file__).resolve().parent.parent / ".nsight"
#: Looked through after PATH; the second is where CUDA's installer puts both profilers.
_FOLDERS: Final = ("/usr/local/cuda/bin", str(TOOLS / "bin"))

#: The oldest of each whose files are read, and the full name.
_KNOWN: Final = {"nsys": ("Nsight Systems", (2022, 4)), "ncu": ("Nsight Compute", (2022, 3))}

#: The last release of the nvtx package that every supported Nsight Systems records, and the first Nsight Systems that
#: records later ones.
_NVTX_FOR_ALL: Final = (0, 2, 11)
_NSYS_FOR_ANY_NVTX: Final = (2024, 1)

_PASSED_ON: Final = re.compile(
    r"PATH|HOME|LANG|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|HF_HOME|HF_HUB_OFFLINE|HF_MODULES_CACHE|"
    r"(LC|CUDA|CUDNN|CUBLAS|NVIDIA|PYTHON|TORCH|PYTORCH|ATEN|OMP|GOMP|KMP|MKL|OPENBLAS|TRITON)(_?[A-Z0-9][A-Z0-9_]*)?"
)
_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY|AUTH|COOKIE")

#: A process namespace, with shared memory of its own: Nsight Systems keeps files there by process id, and ids repeat.
_NAMESPACE: Final = (
    *("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"),
)

_PROBE: Final = f"import nvtx\nwith nvtx.annotate('probe', domain={DOMAIN!r}): pass"


@attrs.frozen
class Tool:
    """One of NVIDIA's profilers, as installed here."""

    name: str
    path: Path
    version: str

    @property
    def too_old(self) -> str | None:
        """What to know if its files cannot be read: it is older than what is supported."""
        title, oldest = _KNOWN[self.name]
        if _numbers(self.version) >= oldest:
            return None
        return f"{title} {self.version} ({self.path}) is too old: {'.'.join(map(str, oldest))} or newer is needed"


def find_tool(name: str) -> Tool | None:
    """Find ``nsys`` or ``ncu``: on PATH, in CUDA's folder, then where ``make nsys`` puts it.

    Returns
    -------
    Tool or None
        None if there is none that runs.
    """
    found = shutil.which(name, path=os.pathsep.join([*os.get_exec_path(), *_FOLDERS]))
    version = None if found is None else _version(found)
    return None if found is None or version is None else Tool(name, Path(found), version)


def require_tool(name: str) -> Tool:
    """Find a profiler that can be used.

    Raises
    ------
    TraceError
        If there is none, or it is too old; says how to get it.
    """
    found = find_tool(name)
    if found is None:
        raise TraceError(f"{_KNOWN[name][0]} ({name}) is not here; {install_hint(name)}")
    if found.too_old:
        raise TraceError(f"{found.too_old}; {install_hint(name)}")
    return found


def install_hint(name: str) -> str:
    """How to get a profiler."""
    if name == "nsys":
        return "install it with: make nsys, or put the nsys of https://developer.nvidia.com/nsight-systems on PATH"
    return "install it with: apt-get install nsight-compute (Debian, non-free), or take the CUDA toolkit's, on PATH"


def silent_nvtx(nsys: Tool) -> str | None:
    """Say why this Nsight Systems would hear nothing of the installed nvtx package, going by versions; else None.

    From 0.2.12 on the package is silent under Nsight Systems before 2024.
    """
    installed = metadata.version("nvtx")
    if _numbers(installed) <= _NVTX_FOR_ALL or _numbers(nsys.version) >= _NSYS_FOR_ANY_NVTX:
        return None
    return f"nvtx {installed} is silent under Nsight Systems {nsys.version}; run: pip install nvtx==0.2.11"


def probe_ranges(nsys: Tool) -> int:
    """Record one range of this Python, which takes about two seconds, and count what is read back.

    Raises
    ------
    TraceError
        If nothing is recorded at all, or it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="dsocr-trace-") as folder:
        report = Path(folder) / "probe.nsys-rep"
        command = [str(nsys.path), "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none", f"--output={report}"]
        profile([*command, sys.executable, "-c", _PROBE], Path(folder))
        if not report.exists():
            raise TraceError(f"{nsys.path} records nothing on this machine; run it by hand: {nsys.path} status -e")
        return len(read_nsys_report(report, nsys.path).ranges)


def profile(command: Sequence[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Run a profiler with the variables of `scrubbed` and its temporary files in ``scratch``; what it says is kept."""
    return subprocess.run(  # noqa: S603 - made of checked options
        command,
        env=scrubbed(os.environ) | {"TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
    )


def isolation() -> tuple[str, ...]:
    """Words before a command line that hide all other processes from it; none where this machine does not allow it.

    Namespaces need util-linux, and a kernel or container that lets users make them.
    """
    try:
        done = subprocess.run([*_NAMESPACE, "true"], capture_output=True, check=False)  # noqa: S603 - fixed words
    except OSError:
        return ()
    return () if done.returncode else _NAMESPACE


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave only variables that Python, torch and CUDA work by, and none whose name sounds like a secret."""
    return {
        name: value for name, value in environment.items() if _PASSED_ON.fullmatch(name) and not _SECRET.search(name)
    }


def _version(path: str) -> str | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\d{4}(\.\d+)+", done.stdout)
    return match[0] if match and not done.returncode else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
