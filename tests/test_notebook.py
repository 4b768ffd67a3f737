"""The notebook runs, on a small run too, and what it shows is what it computes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsocr_trace.cli import cli

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
# pyzmq and tornado have warnings of their own.
pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def executed():
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.executed


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The kernel is a process of its own, in the notebook's folder."""
    path = os.pathsep.join(filter(None, (str(FOLDER.parents[1]), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("results")
    arguments = ["run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--run-id", "small", "--quiet"]
    result = CliRunner().invoke(cli, [*arguments, "--output", str(root)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return root / "small"


def outputs(notebook, kind):
    """What the cells show of a MIME type, by the cell's number."""
    return {
        number: output["data"][kind]
        for number, cell in enumerate(notebook.cells)
        for output in cell.get("outputs", ())
        if kind in output.get("data", {})
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_another_run(executed, small_run, path):
    found = executed(path, run=str(small_run))
    assert "dsocr-smoke-v1" in " ".join(outputs(found, "text/plain").values())
    stored = nbformat.read(path, as_version=4)
    for kind in ("text/plain", "text/html", "image/png"):
        assert outputs(found, kind).keys() == outputs(stored, kind).keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_this_version(executed, path):
    stored, found = nbformat.read(path, as_version=4), executed(path)
    for kind in ("text/plain", "text/html"):
        assert outputs(found, kind) == outputs(stored, kind), "run: python docs/notebooks/execute.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small(path):
    assert path.stat().st_size < 200_000
