"""Many runs in one frame, here and in other engines."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import dsocr_trace
from analytic.errors import InputError
from dsocr_trace.runs.many import MANIFEST_COLUMNS
from dsocr_trace.runs.schemas import TABLES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "comparing.md"


def edited(path: Path, **fields) -> None:
    manifest = path / "run.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields))


@pytest.fixture
def results(finished, tmp_path) -> Path:
    """Two runs, and a file that is none."""
    for name in ("one", "two"):
        shutil.copytree(finished[0].path, tmp_path / "results" / name)
    edited(tmp_path / "results" / "two", dtype="float16")
    (tmp_path / "results" / "README.md").write_text("no run")
    return tmp_path / "results"


@pytest.mark.parametrize("table", TABLES)
def test_every_table_of_all_runs_is_one_frame(results, finished, table):
    frame = dsocr_trace.load_all(results / "*", table)
    assert list(frame.columns) == [*MANIFEST_COLUMNS, *TABLES[table].names]
    single = finished[0].table(table)
    assert frame.groupby("run_id").size().to_dict() == {"one": len(single), "two": len(single)}
    assert frame.loc[frame["run_id"] == "two", "dtype"].unique().tolist() == ["float16"]


def test_sums_of_each_run_are_kept(results, finished):
    frame = dsocr_trace.load_all(results / "*")
    whole = finished[0].attribution["measured_self_ns"].sum()
    assert frame.groupby("run_id")["measured_self_ns"].sum().tolist() == [whole, whole]


def test_directories_by_name(results):
    assert dsocr_trace.load_all([results / "two"], "pages")["run_id"].unique().tolist() == ["two"]
    with pytest.raises(InputError, match="is not a run directory"):
        dsocr_trace.load_all([results / "README.md"])


def test_other_schema_versions_are_left_out_with_a_warning(results):
    edited(results / "two", schema_version=0)
    with pytest.warns(UserWarning, match=r"left out: .*two has schema version 0, this dsocr-trace reads"):
        frame = dsocr_trace.load_all(results / "*")
    assert frame["run_id"].unique().tolist() == ["one"]


def test_nothing_to_read_is_one_line(results):
    with pytest.raises(InputError, match="no runs of schema version"):
        dsocr_trace.load_all(results)
    with pytest.raises(InputError, match="no table 'calories'; choose one of modules"):
        dsocr_trace.load_all(results / "*", "calories")
    (results / "one" / "pages.parquet").unlink()
    with pytest.raises(InputError, match=r"pages.parquet is missing or damaged"):
        dsocr_trace.load_all(results / "*", "pages")
    (results / "two" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"the manifest of .*two is damaged: .*; make the run again"):
        dsocr_trace.load_all(results / "*")


def documented(library: str, results: Path, monkeypatch) -> dict:
    """What the documentation's example leaves in its variables."""
    monkeypatch.chdir(results.parent)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if re.search(rf"^import {library}\b", block, re.MULTILINE)]
    variables: dict = {}
    exec(compile(code, PAGE.name, "exec"), variables)  # noqa: S102  our own page
    return variables


def test_the_example_with_pandas(results, finished, monkeypatch):
    found = documented("dsocr_trace", results, monkeypatch)
    decode = finished[0].attribution.query("stage == 'decode'")["scaled_self_ns"].sum()
    assert found["by_run"]["two", "float16", "decode"] == decode
    assert set(found["pages"]["run_id"]) == {"one", "two"}


def test_duckdb_reads_the_runs_without_us(results, finished, monkeypatch):
    pytest.importorskip("duckdb")
    found = documented("duckdb", results, monkeypatch)
    heaviest = finished[0].attribution["scaled_self_ns"].max()
    assert found["slowest"]["scaled_self_ns"].tolist()[:2] == [heaviest, heaviest]
    settings = found["settings"].set_index("run_id")
    assert settings["dtype"].to_dict() == {"one": finished[0].manifest["dtype"], "two": "float16"}
    assert set(settings["workload"]) == {"dsocr-smoke-v1"}


@pytest.mark.filterwarnings("default")
def test_dask_reads_the_runs_without_us(results, finished, monkeypatch):
    pytest.importorskip("dask.dataframe")
    found = documented("dask.dataframe", results, monkeypatch)
    expected = finished[0].kernels.groupby("name")["duration_ns"].sum().to_dict()
    assert found["total"]["one"].to_dict() == expected
    assert found["total"]["two"].to_dict() == expected
