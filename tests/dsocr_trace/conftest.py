from __future__ import annotations

import json
from typing import TYPE_CHECKING

import attrs
import pytest
from click.testing import CliRunner

from analytic.workload import load_workload
from dsocr_trace.cli import cli
from dsocr_trace.runs.store import Run, load
from stage_runners.pages import synthetic_page

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Result]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)

    return run


@pytest.fixture
def page_files(tmp_path) -> list[Path]:
    """A page that is cut into tiles, and a small one that is not."""
    workload = load_workload("dsocr-smoke-v1")
    sizes = {"tall.png": (640, 1280), "small.png": (600, 400)}
    for name, (width, height) in sizes.items():
        sized = attrs.evolve(workload, page_width=width, page_height=height)
        synthetic_page(sized, seed=1).image.save(tmp_path / name)
    return [tmp_path / name for name in sizes]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, invoke) -> tuple[Run, dict]:
    """A run of the small workload with fewer profiled steps than steps, and its summary."""
    root = tmp_path_factory.mktemp("results")
    result = invoke(
        "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--output", root, "--run-id", "smoke",
        "--profile-steps", 3, "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return load(root / "smoke"), json.loads(result.stdout)
