"""report.html in a browser: what is on the screen, and that zoom, search, sort and filter work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pypdfium2
import pytest

from dsocr_trace.report.html import report_html, stored_tables
from dsocr_trace.runs.schemas import STAGE2_TABLES
from dsocr_trace.runs.store import load

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on the path; install one of {', '.join(NAMES)}")

FULL_SIZE = Path(__file__).parents[2] / "results" / "reference-standard-cpu"
MOST_BYTES = 5_000_000
MOST_NODES = 10_000

both_runs = pytest.mark.parametrize("opened", ["small", "full"], indirect=True)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Containers often have no user namespaces, which the sandbox needs.
        running = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


class Opened:
    """A page that is ready, and all that it said, asked for and threw meanwhile."""

    def __init__(self, browser, path, **settings):
        self.context = browser.new_context(**({"viewport": {"width": 1600, "height": 1000}} | settings))
        self.page, self.troubles, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.troubles.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.documentElement.dataset.ready")

    def middle(self, *names):
        """Where the block lies that `names` lead to from the root, in pixels of the viewport."""
        chart = self.page.locator("#tree-chart")
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        x, y = self.page.evaluate(
            """(names) => {
              const icicle = dsocrTrace.icicle;
              let node = icicle.tree;
              for (const name of names) node = node.children.find((child) => child.name === name);
              const { start, end } = icicle.zoomed;
              const middle = (Math.max(node.start, start) + Math.min(node.end, end)) / 2;
              return icicle.chart.convertToPixel({ xAxisIndex: 0, yAxisIndex: 0 }, [middle, node.level + 0.5]);
            }""",
            names,
        )
        return box["x"] + x, box["y"] + y

    def now(self):
        return self.page.inner_text("#tree-now")

    def filter(self, table, column, text):
        title = self.page.locator(f"#table-{table} .tabulator-col[tabulator-field={column}] input")
        title.fill("")
        title.press_sequentially(text)
        self.page.wait_for_timeout(500)

    def cells(self, table, column):
        return self.page.locator(
            f"#table-{table} .tabulator-row .tabulator-cell[tabulator-field={column}]"
        ).all_inner_texts()


@pytest.fixture(scope="module")
def stored(finished, tmp_path_factory):
    """A small run, and the committed full-size one with a report of this version."""
    path = tmp_path_factory.mktemp("pages") / "full.html"
    full = load(FULL_SIZE)
    path.write_text(report_html(full.manifest, stored_tables(full)), encoding="utf-8")
    return {"small": (finished[0], finished[0].path / "report.html"), "full": (full, path)}


@pytest.fixture
def opened(request, browser, stored):
    run, path = stored[getattr(request, "param", "full")]
    page = Opened(browser, path)
    page.run, page.path = run, path
    yield page
    page.context.close()
    assert page.troubles == []
    assert page.requests == [path.as_uri()]


@pytest.fixture
def named(opened):
    ledger = opened.run.attribution
    return ledger[ledger["module_path"] != "unclassified"]


@both_runs
def test_it_is_small_and_says_when_it_is_ready(opened, record_testsuite_property):
    assert opened.path.stat().st_size <= MOST_BYTES
    assert opened.page.evaluate("document.querySelectorAll('*').length") <= MOST_NODES
    # How long it took is for the reader of the test report: a busy machine decides on it, not the page.
    ready_ms = opened.page.get_attribute("html", "data-ready")
    record_testsuite_property(f"{opened.path.stem}_ready_ms", ready_ms)


@both_runs
def test_the_tree_has_the_times_of_the_ledger(opened, named):
    found = opened.page.evaluate(
        """Object.fromEntries(
          dsocrTrace.icicle.tree.children.map((stage) => [stage.name, [stage.measured, stage.predicted]])
        )"""
    )
    ledger = opened.run.attribution
    measured = ledger.groupby("stage")["scaled_self_ns"].sum()
    predicted = named[named["module_path"] == ""].set_index("stage")["predicted_total_ns"]
    assert found == {stage: [measured[stage], predicted[stage]] for stage in measured.index}
    rest = opened.page.evaluate(
        """dsocrTrace.icicle.tree.children
          .flatMap((stage) => stage.children.filter((node) => node.isRest))
          .map((node) => node.value)"""
    )
    assert sum(rest) == ledger.loc[ledger["module_path"] == "unclassified", "scaled_self_ns"].sum()


def test_a_click_zooms_in_and_escape_out(opened, named):
    opened.page.click("#tree-stage button[value=decode]")
    assert opened.page.inner_text("#tree-crumbs").split("\n")[-1] == "decode"
    opened.page.mouse.click(*opened.middle("decode", "(root)", "model", "model.layers", "model.layers.1"))
    crumbs = opened.page.inner_text("#tree-crumbs").split("\n")
    assert crumbs[-3:] == ["model", "layers", "1"]
    assert opened.now().startswith("model.layers.1 ")
    assert named.loc[named["module_path"] == "model.layers.1", "module_class"].iloc[0] in opened.now()
    opened.page.focus("#tree-chart")
    opened.page.keyboard.press("Escape")
    assert opened.now().startswith("model.layers ")
    opened.page.click("#tree-crumbs button >> nth=0")
    assert opened.page.get_attribute("#tree-stage button >> nth=0", "aria-pressed") == "true"


def test_the_keyboard_reaches_the_largest_child_and_zooms(opened, named):
    opened.page.click("#tree-stage button[value=vision]")
    opened.page.focus("#tree-chart")
    for _ in range(3):
        opened.page.keyboard.press("ArrowDown")
    model = named[(named["stage"] == "vision") & (named["parent_path"] == "model")]
    largest = model.loc[model["scaled_total_ns"].idxmax(), "module_path"]
    assert opened.now().startswith(f"{largest} ")
    opened.page.keyboard.press("Enter")
    assert opened.page.inner_text("#tree-crumbs").split("\n")[-1] == largest.rpartition(".")[2]


def test_a_block_tells_its_numbers(opened):
    opened.page.mouse.move(*opened.middle("decode", "(root)", "model"))
    tip = opened.page.locator(".tip").first
    tip.wait_for()
    text = tip.inner_text()
    assert text.startswith("model\n")
    for name in ("Measured, with children", "Predicted, with children", "Own measured", "FLOPs", "Calls"):
        assert name in text


@pytest.mark.parametrize("query", ["moegate", "mlp"])
def test_search_counts_and_adds_up_what_it_finds(opened, named, query):
    opened.page.fill("#tree-search", query.upper())
    words = named["module_path"] + " " + named["module_class"]
    hits = named[words.str.contains(query, case=False)]
    keys = set(zip(hits["stage"], hits["module_path"], strict=True))
    # What lies below a match is part of it.
    is_top = [(stage, path) not in keys for stage, path in zip(hits["stage"], hits["parent_path"], strict=True)]
    top = hits[is_top]
    found = opened.page.inner_text("#tree-found")
    assert int(re.match(r"[\d,]+", found)[0].replace(",", "")) == len(top)
    share = top["scaled_total_ns"].sum() / opened.run.attribution["scaled_self_ns"].sum()
    assert f"({100 * share:.1f}% of all)" in found


@pytest.mark.parametrize("width", ["scaled", "predicted", "flops", "bytes"])
def test_width_can_be_chosen(opened, named, width):
    opened.page.click(f"#tree-width button[value={width}]")
    flops = named["tensor_flops"] + named["vector_flops"]
    whole = {
        "scaled": opened.run.attribution["scaled_self_ns"].sum(),
        "predicted": named["predicted_self_ns"].sum(),
        "flops": flops.sum(),
        "bytes": named["bytes_total"].sum(),
    }
    assert opened.page.evaluate("dsocrTrace.icicle.tree.value") == whole[width]


@both_runs
def test_tables_hold_the_rows_of_the_ledger(opened, named):
    rows = opened.page.evaluate(
        "dsocrTrace.tables.modules.getData().map((row) => [row.stage, row.module_path, row.scaled_self_ns])"
    )
    columns = ["stage", "module_path", "scaled_self_ns"]
    assert sorted(map(tuple, rows)) == sorted(named[columns].itertuples(index=False, name=None))


def test_tables_sort_by_click_and_by_key(opened, named):
    heading = "#table-modules .tabulator-col[tabulator-field={}]"
    opened.page.click(f"{heading.format('scaled_total_ns')} .tabulator-col-title")
    roots = named[named["module_path"] == ""]
    assert opened.cells("modules", "module_path")[0] == "(root)"
    assert opened.cells("modules", "stage")[0] == roots.loc[roots["scaled_total_ns"].idxmax(), "stage"]
    opened.page.focus(heading.format("calls"))
    opened.page.keyboard.press("Enter")
    assert opened.cells("modules", "calls")[0] == f"{named['calls'].max():,}"
    opened.page.keyboard.press("Enter")
    assert opened.cells("modules", "calls")[0] == f"{named['calls'].min():,}"


def test_tables_filter_by_text_and_by_number(opened, named):
    opened.filter("modules", "module_path", "self_attn")
    mine = named[named["module_path"].str.contains("self_attn")]
    count = opened.page.locator("#count-modules")
    assert count.inner_text() == f"{len(mine):,} of {len(named):,} rows"
    opened.filter("modules", "calls", "2")
    assert count.inner_text() == f"{(mine['calls'] >= 2).sum():,} of {len(named):,} rows"
    assert all("self_attn" in path for path in opened.cells("modules", "module_path"))


def bars(opened, chart):
    """Names of the bars of a chart, top down, with start and length."""
    return opened.page.evaluate(
        """(chart) => {
          const { series, yAxis } = echarts.getInstanceByDom(document.getElementById(chart)).getOption();
          const length = (value) => value?.value ?? value;
          const bar = (name, place) => [name, ...series.slice(0, 2).map(({ data }) => length(data[place]))];
          return yAxis[0].data.map(bar).reverse();
        }""",
        chart,
    )


@pytest.mark.parametrize("opened", ["small"], indirect=True)
def test_the_gap_leads_from_the_datasheet_to_the_clock(opened):
    table = opened.run.gap.groupby("stage").sum(numeric_only=True)
    for stage, sums in [("all", table.sum()), *table.iterrows()]:
        opened.page.click(f"#gap-stage button[value={stage}]")
        found = {name: (start, length) for name, start, length in bars(opened, "gap-chart")}
        assert list(found) == [
            "Datasheet", "Ceilings", "Launches", "Shapes", "Predicted", "Unexplained", "Device", "Host gap", "Wall",
        ]  # fmt: skip
        assert found["Predicted"] == (0, sums["predicted_device_ns"])
        assert found["Device"] == (0, sums["measured_ns"])
        assert found["Wall"] == (0, sums["wall_self_ns"])
        # Each part lies between the totals around it, to whichever side.
        assert found["Host gap"] == (min(sums["measured_ns"], sums["wall_self_ns"]), abs(sums["host_gap_ns"]))
        assert found["Unexplained"][1] == abs(sums["unexplained_ns"])
    opened.page.click("summary >> text=The gap by kind of module")
    opened.page.locator("#table-gap .tabulator-row").first.wait_for()
    rows = opened.page.evaluate("dsocrTrace.tables.gap.getData().map((row) => row.unexplained_ns)")
    assert sum(rows) == pytest.approx(table["unexplained_ns"].sum(), abs=0.01 * table["measured_ns"].sum())


@pytest.mark.parametrize("opened", ["small"], indirect=True)
def test_stages_stand_beside_what_is_predicted(opened):
    pages = opened.run.pages[opened.run.pages["page"] == "total"].set_index("stage")
    source = opened.run.predictions["source"].iloc[0]
    found = {name.split("  ")[0] + name[-len(source) :]: device for name, device, _ in bars(opened, "stage-chart")}
    for stage, row in pages.iterrows():
        assert found[f"{stage}{source}"] == row["predicted_device_ns"]
    assert len(found) == 2 * len(pages)
    assert opened.page.evaluate("document.querySelector('#tree-width button[value=wall]') !== null")
    opened.page.click("#tree-width button[value=wall]")
    named = opened.run.gap[opened.run.gap["module_path"] != "unclassified"]
    assert opened.page.evaluate("dsocrTrace.icicle.tree.value") == named["wall_self_ns"].sum()


def test_experts_are_told_by_load(opened):
    experts = opened.page.evaluate("dsocrTrace.run.tables.experts")
    rows = list(zip(experts["stage"], experts["layer"], experts["tokens"], strict=True))
    note = opened.page.locator("#expert-note")
    for stage in ("prefill", "decode"):
        opened.page.click(f"#expert-stage button[value={stage}]")
        tokens = [count for of_stage, _, count in rows if of_stage == stage]
        layers = {layer for of_stage, layer, _ in rows if of_stage == stage}
        even = sum(tokens) / len(tokens)
        assert f"{len(tokens):,} experts" in note.inner_text()
        assert f": {max(tokens):,} tokens" in note.inner_text()
        assert f"{tokens.count(0):,} (" in note.inner_text()
        loads = opened.page.evaluate(
            "echarts.getInstanceByDom(document.getElementById('load-chart')).getOption().series[0].data"
        )
        assert sum(loads) == len(tokens)
        assert loads[0] == tokens.count(0)
        # The router spreads each layer's tokens over all its experts alike, so one even share holds for all.
        assert loads[-1] == sum(count >= 8 * even for count in tokens)
        assert len(layers) > 1


def test_stage_2_has_its_tables(browser, stored, tmp_path):
    run, _ = stored["small"]
    named = run.attribution[run.attribution["module_path"] != "unclassified"]
    rows = named[["stage", "module_path", "calls"]].assign(ranges=named["calls"], agrees=True)
    rows.loc[rows.index[3], "agrees"] = False
    counts = dict.fromkeys(("stage1_event_count", "stage2_event_count"), named["event_count"])
    times = dict.fromkeys(("stage1_self_ns", "stage2_self_ns"), named["measured_self_ns"])
    counters = pd.DataFrame({name: [0.5] for name in STAGE2_TABLES["counters"].names}).assign(
        name="<b>", module_path=None
    )
    summary = {
        "tools": {"nsys": "2024.2"},
        "captured": {"ranges_of_modules": 5, "other_ranges": 1, "events": 0, "report": None, "report_bytes": 4000},
        "agreement": {"modules": 4, "modules_differing": 1, "calls": 5, "ranges": 5},
        "overhead": {"traced_ns": 100, "captured_ns": 150, "ratio": 1.5},
    }
    tables = stored_tables(run) | {"stage2": rows.assign(**counts, **times), "counters": counters}
    path = tmp_path / "page.html"
    path.write_text(report_html(run.manifest | {"stage2": summary}, tables), encoding="utf-8")
    page = Opened(browser, path)
    # What does not agree comes first.
    assert page.cells("stage2", "agrees")[:2] == ["no", "yes"]
    assert page.cells("stage2", "module_path")[0] == (rows.iloc[3]["module_path"] or "(root)")
    assert page.cells("counters", "occupancy") == ["50.0%"]
    assert page.cells("counters", "name") == ["<b>"]
    assert page.troubles == []
    page.context.close()


def test_tables_behind_a_summary_appear(opened):
    opened.page.click("summary >> text=Kinds of modules")
    opened.page.locator("#table-kinds .tabulator-row").first.wait_for()
    assert opened.page.evaluate("dsocrTrace.tables.kinds.getDataCount()") == len(
        opened.page.evaluate("dsocrTrace.run.tables.kinds.stage")
    )


def test_light_and_dark_follow_the_system_and_the_button(browser, stored):
    page = Opened(browser, stored["small"][1], color_scheme="dark")
    assert page.page.get_attribute("html", "data-theme") == "dark"
    page.page.click("#theme")
    assert page.page.get_attribute("html", "data-theme") == "light"
    assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.troubles == []
    page.context.close()


def test_a_narrow_screen_does_not_scroll_sideways(browser, stored):
    page = Opened(browser, stored["full"][1], viewport={"width": 420, "height": 900})
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 420
    # What each kind could give is on the screen without scrolling.
    gives = page.page.locator(".targets .gives").first.bounding_box()
    assert gives["x"] + gives["width"] <= 420
    page.context.close()


def test_it_prints_on_a_few_pages(browser, stored, tmp_path):
    page = Opened(browser, stored["full"][1], color_scheme="dark")
    page.page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True)
    document = pypdfium2.PdfDocument(tmp_path / "report.pdf")
    assert 3 <= len(document) <= 12
    text = document[0].get_textpage().get_text_bounded()
    assert "Which stage dominates?" in text
    assert "Where the numbers are from" in text
    # Paper is white, also where the screen is dark.
    assert document[0].render().to_pil().getpixel((2, 2)) == (255, 255, 255)
    assert page.page.get_attribute("html", "data-theme") == "dark"
    document.close()
    page.context.close()


def test_names_that_look_like_markup_stay_text(browser, finished, tmp_path):
    run = finished[0]
    hostile = "<img src=x onerror=alert(1)>"
    tables = stored_tables(run)
    for table, column in (("kernels", "name"), ("attribution", "module_class"), ("callgraph", "child_class")):
        tables[table] = tables[table].assign(
            **{column: tables[table][column].where(tables[table][column].isna(), hostile)}
        )
    (tmp_path / "page.html").write_text(report_html(run.manifest, tables), encoding="utf-8")
    page = Opened(browser, tmp_path / "page.html")
    page.page.mouse.move(*page.middle("decode", "(root)", "model"))
    page.page.locator(".tip").first.wait_for()
    page.page.locator("#table-kernels .tabulator-cell[tabulator-field=name]").first.hover()
    page.page.wait_for_timeout(500)
    assert page.page.locator("img").count() == 0
    assert page.troubles == []
    page.context.close()
