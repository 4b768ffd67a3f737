"""What the manual scripts share: where their artifacts go, and how they are listed."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TINY = "dsocr-smoke-v1"
STANDARD = "dsocr-standard-v1"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every script has."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--output", type=Path, metavar="DIR", help="where artifacts go; a temporary folder if not given")
    found.add_argument("--hardware", default="rtx-5090", metavar="NAME", help="device to predict for [rtx-5090]")
    return found


def folder(options: argparse.Namespace) -> Path:
    """The folder for artifacts, made if absent."""
    if options.output is None:
        return Path(tempfile.mkdtemp(prefix="dsocr-trace-"))
    options.output.mkdir(parents=True, exist_ok=True)
    return Path(options.output).resolve()


def command(*arguments: object) -> str:
    """Run ``dsocr-trace`` with these arguments; its standard output. Ends the script where the command fails."""
    words = [str(argument) for argument in arguments]
    print(f"$ dsocr-trace {shlex.join(words)}", flush=True)
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "dsocr_trace", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def show(where: Path, look_at: str) -> None:
    """List the artifacts, and say what to look at."""
    print(f"\nArtifacts in {where}")
    for path in sorted(path for path in where.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(where)!s:<44}{path.stat().st_size:>12,} bytes")
    print(f"\nWhat to look at\n{look_at.rstrip()}")
