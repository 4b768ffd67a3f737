"""Attribute the same kernels of one process twice, by methods that share nothing, and compare them one by one.

Both see the same prefill and decode steps, under one profiler with CPU and CUDA activity. The first is the tracer's:
call intervals on the host's clock, the profiler's clock aligned by markers. The second is the profiler's own: a range
of ``record_function`` around every forward, read back from the exported trace. Exits with 1 unless every event is in
both, and in the same module.
"""

# ruff: noqa: T201  what it prints is the result
from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from analytic.config import DEFAULT_VARIANT, variant_config
from analytic.workload import load_workload
from hooks.attribution import UNCLASSIFIED, attribute, attribute_to_ranges
from hooks.capture import EventCapture
from hooks.columns import plain
from hooks.readers.kineto import read_kineto
from hooks.tracer import Tracer
from stage_runners.generate import Generation
from stage_runners.inputs import build_inputs
from stage_runners.loading import load_model
from stage_runners.pages import synthetic_page

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from torch import nn

#: Before the module's path in the text of a range: other ranges than ours may be there.
PREFIX = "module:"
#: Which event is which. The trace file keeps every nanosecond of the profiler's clock.
KEY = ["start_ns", "name", "stream", "place"]
SHOWN = 10


def mark_modules(model: nn.Module) -> None:
    """Put a range of ``record_function`` around every forward, inside of what a tracer puts there later."""
    for path, module in model.named_modules():
        module.forward = functools.partial(in_range, PREFIX + path, module.forward)


def in_range(text: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a forward inside a range."""
    with record_function(text):
        return forward(*args, **kwargs)


def capture_with_both(device: torch.device) -> EventCapture:
    """Give the tracer's capture, its profiler replaced by one that records the host's side too."""
    capture = EventCapture(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    capture._profile = profile(activities=activities)
    return capture


def forwards(generation: Generation, steps: int) -> Iterator[None]:
    """Run the prefill and decode steps, one at a time."""
    yield generation.start()
    for _ in range(steps):
        yield generation.advance()


def both_methods(model: nn.Module, inputs: Any, device: torch.device, steps: int, trace: Path) -> pd.DataFrame:
    """One row per event, with the module by each method; null in a method that has not seen it."""
    list(forwards(Generation(model, inputs), 1))  # warm-up
    mark_modules(model)
    with Tracer(model) as tracer, capture_with_both(device) as capture, capture.window():
        list(forwards(Generation(model, inputs), steps))
    (window,) = capture._windows
    capture._profile.export_chrome_trace(str(trace))

    mine = plain(attribute(capture.events, tracer.calls())).to_pandas()
    recording = read_kineto(trace)
    ranges = recording.ranges.filter(pc.starts_with(plain(recording.ranges)["name"], PREFIX))
    theirs = plain(attribute_to_ranges(recording, ranges))
    # As in the capture: what has no launch counts by its own start.
    cause = capture.clock.to_host(pc.coalesce(theirs["launch_ns"], theirs["start_ns"]).to_numpy())
    start = pa.array(capture.clock.to_host(theirs["start_ns"].to_numpy()))
    theirs = theirs.set_column(theirs.column_names.index("start_ns"), "start_ns", start)
    found = theirs.filter(pa.array((cause >= window[0]) & (cause <= window[1]))).to_pandas()
    found["module_path"] = found["range_name"].str.removeprefix(PREFIX).fillna(UNCLASSIFIED)
    return keyed(mine).merge(keyed(found), on=KEY, how="outer", suffixes=("_mine", "_theirs"))


def keyed(events: pd.DataFrame) -> pd.DataFrame:
    """The columns that tell an event, its module and its time; ``place`` numbers what is alike."""
    events = events.assign(stream=events["stream"].astype("Int64").fillna(-1))
    events["place"] = events.groupby(KEY[:-1]).cumcount()
    return events[[*KEY, "module_path", "duration_ns"]]


def compared(events: pd.DataFrame) -> dict[str, Any]:
    """Counts, and what differs."""
    mine, theirs = events["module_path_mine"], events["module_path_theirs"]
    seen = mine.notna() & theirs.notna()
    differs = seen & (mine != theirs)
    named = seen & (mine != UNCLASSIFIED)
    columns = ["name", "module_path_mine", "module_path_theirs"]
    rows = events[differs].groupby(columns).size().sort_values(ascending=False).head(SHOWN)
    time = events["duration_ns_mine"]
    return {
        "events": len(events),
        "only_first": int((mine.notna() & theirs.isna()).sum()),
        "only_second": int((mine.isna() & theirs.notna()).sum()),
        "agree": int((seen & ~differs).sum()),
        "differ": int(differs.sum()),
        "in_modules": int((named & ~differs).sum()),
        "share_of_time_in_modules": float(time[named].sum() / time.sum()),
        "modules": int(mine[named].nunique()),
        "differing": [dict(zip([*columns, "count"], [*key, int(count)], strict=True)) for key, count in rows.items()],
        "unmatched": events[~seen]["name"].value_counts().head(SHOWN).to_dict(),
    }


def main() -> int:
    """Run both methods and say whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--workload", default="dsocr-standard-v1")
    parser.add_argument("--steps", type=int, default=4, help="decode steps (4)")
    given = parser.parse_args()
    device, workload = torch.device(given.device), load_workload(given.workload)
    variant = workload.variant or DEFAULT_VARIANT
    config = variant_config(variant)
    model = load_model("builtin", variant=variant, device=device)
    inputs = build_inputs(synthetic_page(workload, seed=0), workload, config.decoder, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        inputs = inputs.to(device, next(model.parameters()).dtype)
        found = compared(both_methods(model, inputs, device, given.steps, trace))
    agree = found["in_modules"] > 0 and found["agree"] == found["events"]
    figures = {name: value for name, value in found.items() if value not in ([], {})}
    print(f"{'PASS' if agree else 'FAIL'} second_method: {json.dumps(figures)}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
