"""The committed runs open, hold together, and are what this version writes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dsocr_trace.runs.invariants import check_run
from dsocr_trace.runs.schemas import SCHEMA_VERSION, TABLES
from dsocr_trace.runs.store import load

RUNS = sorted(Path(__file__).parents[2].glob("results/reference-*"))


def test_there_is_one_for_newcomers():
    assert "reference-standard-cpu" in {path.name for path in RUNS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_reference_run(path):
    run = load(path)
    assert run.manifest["schema_version"] == SCHEMA_VERSION
    for name, schema in TABLES.items():
        assert pq.read_schema(path / f"{name}.parquet").remove_metadata().equals(schema), name
    flops = {stage: sums["flops"] for stage, sums in run.manifest["conserved"].items() if "flops" in sums}
    sums = check_run({name: run.table(name) for name in ("attribution", "kernels", "gap", "pages")}, flops)
    assert sums == run.manifest["conserved"]
    assert all(share >= 0.99 for share in run.manifest["coverage"].values())
