from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest

import dsocr_trace
from analytic.errors import DsocrTraceError, InputError
from dsocr_trace.runs import store
from dsocr_trace.runs.store import RunWriter


def test_nothing_shows_before_publish_and_nothing_stays_after_discard(tmp_path):
    writer = RunWriter(tmp_path / "runs", "one")
    writer.manifest({"a": 1})
    assert not (tmp_path / "runs" / "one").exists()
    writer.discard()
    assert list((tmp_path / "runs").iterdir()) == []


def test_publish_gives_the_name_and_discard_leaves_it(tmp_path):
    writer = RunWriter(tmp_path, "one")
    writer.manifest({"a": 1})
    assert writer.publish() == tmp_path / "one"
    writer.discard()
    assert dsocr_trace.load(tmp_path / "one").manifest == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_an_existing_run_is_left_alone(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="exists and is left as it is; choose another name with --run-id"):
        RunWriter(tmp_path, "one")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "/abs", ""])
def test_a_run_id_is_a_plain_name(tmp_path, name):
    with pytest.raises(InputError, match="--run-id"):
        RunWriter(tmp_path, name)


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cannot write runs to .*Not a directory; choose another directory with --output"
    ):
        RunWriter(tmp_path / "file" / "runs", "one")


def test_a_nearly_full_disk_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_ROOM_BYTES", 10**18)
    with pytest.raises(DsocrTraceError, match="MB left, a run may take") as caught:
        RunWriter(tmp_path, "one")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_table_gets_its_schema(tmp_path):
    writer = RunWriter(tmp_path, "one")
    writer.table("memory", pd.DataFrame({"stage": ["decode"], "module_path": [""], "predicted_weight_bytes": [3]}))
    writer.manifest({})
    run = dsocr_trace.load(writer.publish())
    assert run.memory.predicted_weight_bytes.tolist() == [3]
    assert run.memory.measured_weight_bytes.isna().all()


def test_a_table_that_does_not_fit_its_schema_is_refused(tmp_path):
    writer = RunWriter(tmp_path, "one")
    with pytest.raises(pa.ArrowException):
        writer.table("memory", pd.DataFrame({"stage": ["decode"], "predicted_weight_bytes": ["three"]}))


def test_loading_something_else(tmp_path):
    with pytest.raises(InputError, match=r"is not a run directory: it has no run.json"):
        dsocr_trace.load(tmp_path)


def test_unknown_tables_are_named(finished):
    run, _ = finished
    with pytest.raises(AttributeError, match="the tables are modules, calls"):
        run.nonsense  # noqa: B018
    assert "kernels" in dir(run)
