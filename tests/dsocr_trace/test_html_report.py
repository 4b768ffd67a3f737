"""report.html: what it embeds equals the tables, and it needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from analytic.errors import InputError
from dsocr_trace.report.html import origins, report_html, stored_tables
from dsocr_trace.report.kinds import kind_rows, module_rows
from dsocr_trace.report.markdown import report_markdown
from dsocr_trace.report.page import data
from dsocr_trace.report.page.callgraph import folded_calls
from dsocr_trace.runs.schemas import STAGE2_TABLES
from dsocr_trace.runs.store import load

MOST_BYTES = 5_000_000


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the scripts by id."""

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts, self._inside = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id", "") if tag == "script" else None

    def handle_data(self, text):
        if self._inside is not None:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + text

    def handle_endtag(self, _):
        self._inside = None


def embedded(page):
    return json.loads(Elements(page).scripts["data"])


@pytest.fixture(scope="module")
def run(finished):
    return finished[0]


@pytest.fixture(scope="module")
def page(run):
    return (run.path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown(page):
    return {name: pd.DataFrame(columns) for name, columns in embedded(page)["tables"].items()}


def sums(frame, *columns):
    return frame[list(columns)].fillna(0).sum().astype("int64").to_dict()


def test_the_report_of_a_stored_run_is_the_one_that_the_run_wrote(run, page):
    assert report_html(run.manifest, stored_tables(run)) == page


def test_it_is_small_and_refers_to_nothing_outside(page):
    assert len(page.encode()) <= MOST_BYTES
    elements = Elements(page).found
    outside = [
        (tag, name, value)
        for tag, attributes in elements
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "data", "action"} and not value.startswith(("#", "data:"))
    ]
    assert outside == []
    (policy,) = [attrs["content"] for tag, attrs in elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "sourceMappingURL" not in page


def test_the_libraries_come_with_their_licences(page):
    for owner in ("The Apache Software Foundation", "Oli Folkerd", "Mike Bostock"):
        assert owner in page


def test_modules_are_those_of_the_ledger(run, shown):
    ledger = run.attribution[run.attribution["module_path"] != "unclassified"].reset_index(drop=True)
    columns = [name for name in shown["modules"] if name in ledger and name != "parent_path"]
    assert {"scaled_self_ns", "scaled_total_ns", "predicted_total_ns", "calls", "event_count"} <= set(columns)
    pd.testing.assert_frame_equal(shown["modules"][columns], ledger[columns], check_dtype=False)
    work = ledger["tensor_flops"] + ledger["vector_flops"]
    assert shown["modules"]["flops"].tolist() == work.tolist()
    assert shown["modules"]["bytes"].tolist() == ledger["bytes_total"].tolist()


def test_work_with_children_adds_up(shown):
    modules = shown["modules"]
    for name in ("flops", "bytes"):
        roots = modules[modules["module_path"] == ""].set_index("stage")[f"{name}_with_children"]
        assert roots.to_dict() == modules.groupby("stage")[name].sum().to_dict()


def test_kinds_operators_and_unclassified_add_up_to_the_ledger(run, shown):
    ledger = run.attribution
    named = ledger[ledger["module_path"] != "unclassified"]
    own = ["scaled_self_ns", "predicted_self_ns", "calls", "excess_ns", "idle_ns"]
    assert sums(shown["kinds"], "scaled_self_ns") == sums(ledger, "scaled_self_ns")
    assert set(named.loc[named["scaled_self_ns"] > 0, "module_path"].str.replace(r"\.\d+", "", regex=True)) <= set(
        shown["kinds"]["kind"].str.replace(r"\.\*", "", regex=True)
    )
    assert (shown["kinds"][own].fillna(0) >= 0).all(axis=None)
    assert sums(shown["unclassified"], "scaled_self_ns", "event_count") == sums(
        ledger[ledger["module_path"] == "unclassified"], "scaled_self_ns", "event_count"
    )
    columns = ("event_count", "scaled_ns", "predicted_ns", "flops", "bytes")
    assert sums(shown["operators"], *columns) == sums(run.operators, *columns)


def test_kernels_are_the_events_by_name(run, shown):
    rows, events = shown["kernels"], run.kernels
    assert not rows.duplicated(["stage", "name", "kind", "operator_category", "kernel_family"]).any()
    assert rows["event_count"].sum() == len(events)
    assert rows["measured_ns"].sum() == events["duration_ns"].sum()
    largest = rows.iloc[0]
    mine = events[(events["name"] == largest["name"]) & (events["stage"] == largest["stage"])]
    assert largest["mean_ns"] == pytest.approx(mine["duration_ns"].mean())
    assert abs(rows["scaled_ns"].sum() - run.attribution["scaled_self_ns"].sum()) <= len(run.attribution)
    assert rows["scaled_ns"].is_monotonic_decreasing


def test_calls_experts_stages_and_memory(run, shown):
    counted = run.callgraph.groupby("stage")["call_count"].sum()
    assert shown["calls"].groupby("stage")["call_count"].sum().to_dict() == counted.to_dict()
    traced = run.calls[(run.calls["pass"] == "traced") & run.calls["module_path"].str.fullmatch(r".*\.experts\.\d+")]
    experts = shown["experts"]
    found = experts.assign(module_path=experts["layer"] + ".experts." + experts["expert"].astype(str))
    called = found[found["calls"] > 0].set_index(["stage", "module_path"])["calls"]
    assert called.sort_index().to_dict() == traced.groupby(["stage", "module_path"]).size().to_dict()
    assert len(found) > len(called)
    # Each position of the prompt, and each decoded token, goes to as many experts as the router takes.
    decode, sequence = int(run.manifest["pages"][0]["decode_steps"]), run.manifest["pages"][0]["seq_len"]
    tokens = experts.groupby(["stage", "layer"])["tokens"].sum()
    taken = tokens["decode"] / decode
    assert len(set(taken)) == 1
    assert (tokens["prefill"] == sequence * taken.iloc[0]).all()
    # One page at a time: a call in a decode is one token.
    in_decode = experts[experts["stage"] == "decode"]
    assert in_decode["tokens"].tolist() == in_decode["calls"].tolist()
    assert (experts["tokens"] > 0).eq(experts["calls"] > 0).all()
    total = run.pages[run.pages["page"] == "total"].set_index("stage")
    stages = shown["stages"].set_index("stage")
    assert stages["wall_ns"].to_dict() == total["wall_ns"].to_dict()
    assert stages["idle_ns"].to_dict() == (total["wall_ns"] - total["scaled_ns"]).to_dict()
    weights = run.memory.groupby("stage")["predicted_weight_bytes"].sum()
    assert shown["memory"].set_index("stage")["predicted_weight_bytes"].to_dict() == weights.to_dict()


def test_headlines_and_answers_name_the_numbers(run, page):
    total = run.pages[run.pages["page"] == "total"].set_index("stage")
    decode = total.loc["decode"]
    text = re.sub(r"<[^>]+>", " ", page.partition("<script")[0])
    assert f"{decode['forwards'] * 1e9 / decode['wall_ns']:.3g} tokens/s" in text
    assert f"{run.manifest['coverage']['all']:.2%}" in text
    assert f"{total['wall_ns'].idxmax().capitalize()}: " in text
    for origin in ("measured", "scaled", "modelled", run.manifest["hardware"]["provenance"]):
        assert f'<span class="tag {origin}">' in page


def test_what_the_user_named_is_text_on_the_page(run):
    hostile = "</script><img src=x onerror=alert(1)>"
    manifest = run.manifest | {"notes": [hostile], "command": hostile}
    tables = stored_tables(run)
    tables["kernels"] = tables["kernels"].assign(name=hostile)
    page = report_html(manifest, tables)
    assert "img" not in {tag for tag, _ in Elements(page).found}
    assert set(embedded(page)["tables"]["kernels"]["name"]) == {hostile}


def test_a_run_without_prediction_and_without_decode_has_a_report(run):
    tables = stored_tables(run)
    predicted = ["predicted_self_ns", "predicted_total_ns", "tensor_flops", "vector_flops", "bytes_total"]
    parts = ["datasheet_ns", "ceilings_ns", "launch_ns", "shape_ns", "predicted_device_ns", "unexplained_ns"]
    tables["gap"] = tables["gap"].assign(**dict.fromkeys(parts, np.nan))
    tables["attribution"] = tables["attribution"].assign(**dict.fromkeys(predicted, np.nan))
    tables["predictions"] = tables["predictions"].iloc[:0]
    tables["memory"] = tables["memory"].iloc[:0]
    pages = tables["pages"]
    decode = pages["stage"] == "decode"
    pages = pages.assign(predicted_ns=np.nan, predicted_device_ns=np.nan, tensor_flops=np.nan)
    pages.loc[decode, ["forwards", "profiled_forwards", "wall_ns", "scaled_ns"]] = 0
    tables["pages"] = pages
    manifest = run.manifest | {"overhead": {"pairs": 0, "ratio": None, "quartiles": None}}
    page = report_html(manifest, tables)
    assert "tokens/s" not in page.partition("<script")[0]
    assert 'id="roof-chart"' not in page
    assert set(embedded(page)["tables"]["kinds"]["predicted_self_ns"]) == {None}
    assert set(embedded(page)["tables"]["experts"]["tokens"]) == {None}
    # What was measured is still split.
    assert sum(embedded(page)["tables"]["gap"]["measured_ns"]) == run.gap["measured_ns"].sum()
    text = report_markdown(manifest, tables)
    assert "Tracing cost: not measured" in text
    assert "## What to optimise first" not in text


def test_too_many_rows_are_cut_to_the_largest_and_counted(run, monkeypatch):
    tables = stored_tables(run)
    whole = module_rows(tables["attribution"], tables["predictions"], tables["gap"])
    monkeypatch.setitem(data.MOST_ROWS, "modules", 40)
    content = data.page_data(run.manifest, tables, whole, kind_rows(whole, tables["gap"]))
    kept = content["tables"]["modules"]
    assert content["left_out"]["modules"] == len(whole) - 40
    assert sorted(kept["scaled_total_ns"]) == sorted(whole["scaled_total_ns"].nlargest(40))
    paths = set(zip(kept["stage"], kept["module_path"], strict=True))
    parents = {key for key in zip(kept["stage"], kept["parent_path"], strict=True) if key[1] is not None}
    assert parents <= paths


def test_calls_are_folded_by_chains_of_classes():
    edges = [
        ("prefill", None, "", None, "Model", 1),
        ("prefill", "", "a.0", "Model", "Block", 1),
        ("prefill", "", "a.1", "Model", "Block", 1),
        ("prefill", "a.0", "a.0.f", "Block", "Linear", 2),
        ("prefill", "a.1", "a.1.f", "Block", "Linear", 2),
        ("prefill", "", "shared", "Model", "Norm", 1),
        ("prefill", "a.0", "shared", "Block", "Norm", 3),
        ("prefill", "shared", "shared.f", "Norm", "Linear", 4),
        ("vision", "", "v", "Model", "Vision", 5),
    ]
    columns = ["stage", "parent_path", "child_path", "parent_class", "child_class", "call_count"]
    rows = folded_calls(pd.DataFrame(edges, columns=columns))
    name = rows["module_class"]
    above = [None if pd.isna(parent) else name[parent] for parent in rows["parent_id"]]
    found = set(zip(rows["stage"], above, name, rows["modules"], rows["call_count"], strict=True))
    # The shared norm was reached from the model first: what it calls stands there, once.
    assert found == {
        ("vision", None, "Vision", 1, 5),
        ("prefill", None, "Model", 1, 1),
        ("prefill", "Model", "Block", 2, 2),
        ("prefill", "Model", "Norm", 1, 1),
        ("prefill", "Block", "Linear", 2, 4),
        ("prefill", "Block", "Norm", 1, 3),
        ("prefill", "Norm", "Linear", 1, 4),
    }
    assert (rows["parent_id"].dropna() < rows.loc[rows["parent_id"].notna(), "id"]).all()


def test_the_command_writes_anew_and_leaves_what_exists(invoke, run, page, tmp_path):
    refused = invoke("report", run.path)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    written = invoke("report", run.path, "--output", tmp_path / "page.html")
    assert written.stdout.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert invoke("report", run.path, "--format", "md", "--output", tmp_path / "page.md").exit_code == 0
    assert (tmp_path / "page.md").read_text() == (run.path / "report.md").read_text()
    assert invoke("report", run.path, "--force").exit_code == 0
    assert (run.path / "report.html").read_text(encoding="utf-8") == page


def test_a_run_without_a_column_that_came_later_has_a_report(run, invoke, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(run.path, older)
    run.kernels.drop(columns="kernel_family").to_parquet(older / "kernels.parquet")
    assert invoke("report", older, "--force").exit_code == 0
    kernels = embedded((older / "report.html").read_text(encoding="utf-8"))["tables"]["kernels"]
    assert sum(kernels["event_count"]) == len(run.kernels)
    assert set(kernels["kernel_family"]) == {None}


def test_the_gap_is_that_of_the_table(run, shown):
    gap = shown["gap"].set_index("stage")
    table = run.gap.groupby("stage").sum(numeric_only=True)
    for name in table:
        assert gap[name].to_dict() == table[name].to_dict()
    # From the datasheet to the clock, each part on top of the one before.
    predicted = gap[["datasheet_ns", "ceilings_ns", "launch_ns", "shape_ns"]].sum(axis=1)
    assert (predicted == gap["predicted_device_ns"]).all()
    assert (predicted + gap["unexplained_ns"] + gap["host_gap_ns"] == gap["wall_self_ns"]).all()
    parts = list(table.columns.intersection(shown["kinds"].columns))
    assert {"launch_ns", "wall_self_ns"} <= set(parts)
    # Kinds that did nothing on the device and have no share of its idle time are left out.
    for name in ("datasheet_ns", "shape_ns", "unexplained_ns"):
        assert shown["kinds"][name].sum() == pytest.approx(table[name].sum(), abs=0.01 * table["wall_self_ns"].sum())


def test_where_the_numbers_are_from(run):
    predictions = run.predictions.assign(source="calibrated")
    far = predictions["predicted_device_ns"].idxmax()
    predictions.loc[far, "source"] = "extrapolated"
    share = predictions["predicted_device_ns"][far] / predictions["predicted_device_ns"].sum()
    calibrated = {
        "device": "this", "source": "calibrated", "file": "c.parquet", "measured_at": "2026-01-02T03:04:05+00:00",
        "notes": ["it was noisy"], "tensor_flops_per_s": 3e11, "memory_bytes_per_s": 2e10,
    }  # fmt: skip
    manifest = run.manifest | {"prediction": calibrated}
    found = dict(origins(manifest, predictions))
    assert list(found)[:3] == ["measured", "scaled", "modelled"]
    assert "2026-01-02 03:04 UTC" in found["calibrated"]
    assert f"{share:.1%} of the predicted device time" in found["extrapolated"]
    assert manifest["hardware"]["provenance"] in found
    page = report_html(manifest, stored_tables(run) | {"predictions": predictions})
    assert "it was noisy" in page
    assert [roof["source"] for roof in embedded(page)["roofs"]] == [manifest["hardware"]["provenance"], "calibrated"]
    assert embedded(page)["roofs"][1]["tensor_flops_per_s"] == 3e11
    main = "calibrated" if share < 0.5 else "extrapolated"
    assert embedded(page)["predicted"] == main
    assert f'<span class="tag {main}">' in page


@pytest.fixture
def stage2(run):
    """What Stage 2 leaves on a GPU."""
    named = run.attribution[run.attribution["module_path"] != "unclassified"]
    rows = named[["stage", "module_path", "calls"]].assign(
        ranges=named["calls"], agrees=True, stage1_event_count=named["event_count"],
        stage2_event_count=named["event_count"], stage1_self_ns=named["measured_self_ns"],
        stage2_self_ns=named["measured_self_ns"] + 7,
    )  # fmt: skip
    counters = pd.DataFrame([dict.fromkeys(STAGE2_TABLES["counters"].names, 1)]).assign(name="gemm", module_path="m")
    summary = {
        "tools": {"nsys": "2024.2", "ncu": "2024.3"},
        "captured": {
            "ranges_of_modules": 5, "other_ranges": 1, "events": 8, "report": None, "report_bytes": 4000,
        },
        "agreement": {"modules": 120, "modules_differing": 2, "calls": 5, "ranges": 5},
        "overhead": {"traced_ns": 100, "captured_ns": 150, "ratio": 1.5},
        "attribution": {"events": 8, "total_ns": 80, "coverage": 0.9, "unclassified": {}},
        "events_agreement": {"event_share": 0.75, "time_share": None, "withheld": "75.00% of the events"},
    }  # fmt: skip
    return summary, {"stage2": rows, "counters": counters}


def test_stage_2_is_on_the_page(run, stage2, tmp_path):
    summary, rows = stage2
    page = report_html(run.manifest | {"stage2": summary}, stored_tables(run) | rows)
    text = re.sub(r"<[^>]+>", " ", page.partition("<script")[0])
    for fact in ("nsys 2024.2, ncu 2024.3", "118 of 120 modules", "90.00% of it in named modules", "1.50 times"):
        assert fact in text
    assert "neither speaks for the other: 75.00% of the events" in text
    shown = embedded(page)["tables"]
    assert sum(shown["stage2"]["stage2_self_ns"]) == rows["stage2"]["stage2_self_ns"].sum()
    assert shown["counters"]["name"] == ["gemm"]
    assert "118 of 120" in report_markdown(run.manifest | {"stage2": summary}, stored_tables(run))
    # Stored tables bring them along.
    shutil.copytree(run.path, tmp_path / "two")
    for name, frame in rows.items():
        frame.to_parquet(tmp_path / "two" / f"{name}.parquet")
    assert set(STAGE2_TABLES) <= set(stored_tables(load(tmp_path / "two")))


def test_a_stage_2_that_failed_says_why(run):
    page = report_html(run.manifest | {"stage2": {"failure": "nsys is <too> old"}}, stored_tables(run))
    assert "nsys is &lt;too&gt; old" in page
    assert 'id="table-stage2"' not in page


def test_without_stage_2_there_is_no_section(page):
    assert 'id="stage2"' not in page


@pytest.fixture
def older(run, tmp_path):
    """A run as it was written before there was a gap table."""
    path = shutil.copytree(run.path, tmp_path / "older")
    (path / "gap.parquet").unlink()
    run.pages.drop(columns="predicted_device_ns").to_parquet(path / "pages.parquet")
    manifest = json.loads((path / "run.json").read_text())
    del manifest["prediction"]
    (path / "run.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    return load(path)


def test_an_older_run_has_a_report_without_the_gap(older):
    page = report_html(older.manifest, stored_tables(older))
    assert 'id="gap-chart"' not in page
    assert "this run has no gap table" in page
    assert "written as schema version 1" in page
    assert "Read the note above." in page
    assert embedded(page)["tables"]["stages"]["predicted_device_ns"] == [None] * 3
    assert "From the datasheet" not in report_markdown(older.manifest, stored_tables(older))


def test_a_run_of_this_version_that_lacks_a_table_is_refused(older):
    manifest = json.loads((older.path / "run.json").read_text())
    (older.path / "run.json").write_text(json.dumps(manifest | {"schema_version": 2}))
    with pytest.raises(InputError, match=r"gap.parquet is missing or damaged"):
        stored_tables(load(older.path))
