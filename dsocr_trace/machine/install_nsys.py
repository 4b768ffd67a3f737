"""``make nsys``: Debian's Nsight Systems, unpacked into a folder of the checkout.

Nothing outside that folder changes: apt gets its own list of sources and its own state, and packages are unpacked, not
installed. It needs no root.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from hooks.errors import TraceError
from hooks.nsight import TOOLS, find_tool, probe_ranges, silent_nvtx

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The second holds what the first runs inside of a profiled process; the third is the only library that it lacks.
_PACKAGES: Final = ("nsight-systems", "nsight-systems-target", "libssh-4")
#: Debian's free packages do not contain it.
_COMPONENTS: Final = "main contrib non-free"
_MIRROR: Final = "http://deb.debian.org/debian"
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: Its own release has what is known to work; a newer Debian has a newer one.
_DEFAULT_RELEASE: Final = "bookworm"
_BY_HAND: Final = "put the nsys of https://developer.nvidia.com/nsight-systems on PATH instead"


@click.command()
@click.option("--optional", is_flag=True, help="Say why it cannot be had, and end well nevertheless.")
def main(*, optional: bool) -> None:
    """Get Nsight Systems unless it is here."""
    try:
        click.echo(_installed() or _install())
    except TraceError as error:
        click.echo(f"no Nsight Systems: {error}", err=True)
        sys.exit(0 if optional else 1)


def _installed() -> str | None:
    found = find_tool("nsys")
    return f"Nsight Systems {found.version}: {found.path}" if found and not found.too_old else None


def _install() -> str:
    """Fetch, unpack aside, try, and only then give it its place."""
    _require_debian()
    fetched = _fetch(TOOLS / "apt")
    aside = TOOLS / "unpacking"
    shutil.rmtree(aside, ignore_errors=True)
    click.echo(f"unpacking {len(fetched)} packages into {TOOLS} (about 600 MB) ...", err=True)
    for package in fetched:
        _run(["dpkg", "-x", str(package), str(aside)])
    # The two packages expect to find each other here once they are installed.
    libraries = Path("usr/lib/x86_64-linux-gnu/nsight-systems")
    (aside / libraries / "host-linux-x64").symlink_to("../../nsight-systems/host-linux-x64")
    place = TOOLS / "nsys"
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)
    link = TOOLS / "bin" / "nsys"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..") / "nsys" / libraries / "target-linux-x64" / "nsys")
    return _tried()


def _tried() -> str:
    found = find_tool("nsys")
    if found is None:
        raise TraceError(f"the one unpacked into {TOOLS} does not run; remove that folder and {_BY_HAND}")
    if not probe_ranges(found):
        raise TraceError(silent_nvtx(found) or f"{found.path} records no NVTX range on this machine; {_BY_HAND}")
    shutil.rmtree(TOOLS / "apt")
    return f"Nsight Systems {found.version}: {found.path}"


def _require_debian() -> None:
    missing = [name for name in ("apt-get", "dpkg") if shutil.which(name) is None]
    if missing or not _KEYRING.exists() or platform.machine() != "x86_64":
        lacks = ", ".join(missing) or (_KEYRING.name if platform.machine() == "x86_64" else "an x86-64 processor")
        raise TraceError(f"it comes from Debian's packages, and this machine lacks {lacks}; {_BY_HAND}")


def _fetch(folder: Path) -> list[Path]:
    """Download the packages; those that are there already are checked and kept."""
    packages, cache, lists = folder / "packages", folder / "cache", folder / "lists"
    for made in (packages, cache / "archives" / "partial", lists / "partial"):
        made.mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    sources.write_text(f"deb [signed-by={_KEYRING}] {_MIRROR} {_release()} {_COMPONENTS}\n", encoding="utf-8")
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": lists,
        "Dir::Cache": cache,
        # Else root hands the download to a user that may not write here.
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
        "Acquire::http::Timeout": "20",
        "Acquire::Retries": "2",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    click.echo(f"fetching Debian's Nsight Systems (about 180 MB) from {_MIRROR} ...", err=True)
    _run(["apt-get", "-qq", *options, "update"])
    _run(["apt-get", "-qq", *options, "download", *_PACKAGES], packages)
    return sorted(packages.glob("*.deb"))


def _release() -> str:
    """Name of the Debian that runs here, or that of the one that was tried."""
    system = platform.freedesktop_os_release()
    return system.get("VERSION_CODENAME", _DEFAULT_RELEASE) if system.get("ID") == "debian" else _DEFAULT_RELEASE


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    done = subprocess.run(  # noqa: S603 - fixed words and paths of this folder
        command,
        cwd=folder,
        env=os.environ | {"LC_ALL": "C"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        error = next((line for line in said if line.startswith("E:")), said[-1])
        raise TraceError(f"{command[0]} failed ({error.removeprefix('E: ')}); {_BY_HAND}")


if __name__ == "__main__":
    main()
