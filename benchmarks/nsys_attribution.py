"""What reading and attributing a large Nsight Systems export costs: time, peak memory, and how both grow.

The export is made here: two processes that decode with the same correlation ids, six kernels and seven nested ranges
for each layer. Where Nsight Systems is found, its own projection of ranges is timed on the same files. Run it as
``python benchmarks/nsys_attribution.py``.
"""

from __future__ import annotations

import argparse
import json
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from hooks.attribution import attribute_to_ranges
from hooks.nsight import find_tool
from hooks.readers.nsys import read_nsys

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hooks.nsight import Tool

LARGE = 1_700_000
#: The small file is this many times smaller than the large one.
SCALE = 10
NSYS_LIMIT_S = 300
ROUNDS = 3
#: Its projection of ranges, by the name of 2023 and later, and by the older one.
NSYS_REPORTS = ("nvtx_gpu_proj_trace", "nvtxgpuproj")
LAYERS = 24
KERNELS_PER_LAYER = 6
LAYER_NS = 40_000
#: Text and span of each range in a layer, in ns from its start.
RANGES = (
    ("", 0, 38_000),
    (".self_attn", 1_000, 18_000),
    (".self_attn.qkv_proj", 2_000, 8_000),
    (".self_attn.o_proj", 12_000, 17_000),
    (".mlp", 20_000, 37_000),
    (".mlp.up_proj", 21_000, 28_000),
    (".mlp.down_proj", 30_000, 36_000),
)
#: Length of the kernels' names in characters: templates make them long.
NAME_LENGTHS = range(40, 500, 4)

DDL = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL,
    greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, gridX INTEGER NOT NULL,
    gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL,
    blockZ INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (
    start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, globalTid INTEGER,
    correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, callchainId INTEGER);
CREATE TABLE NVTX_EVENTS (
    start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, category INTEGER,
    color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, domainId INTEGER,
    uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, int32Value INTEGER,
    floatValue REAL, jsonTextId INTEGER, jsonText TEXT);
"""


def global_id(process: int, thread: int = 0) -> int:
    """Number that nsys gives a process or a thread."""
    return 1 << 48 | process << 24 | thread


def layers(kernels: int) -> Iterator[tuple[int, int, int]]:
    """Process, start and number of each layer that runs."""
    for index in range(kernels // KERNELS_PER_LAYER):
        yield 100 + index % 2, index // 2 * LAYER_NS, index // 2


def kernel_rows(kernels: int) -> Iterator[tuple[int, ...]]:
    """Kernels, each 60 us after its launch."""
    for process, start, number in layers(kernels):
        for place in range(KERNELS_PER_LAYER):
            at = start + 60_000 + place * 6_000
            correlation = number * KERNELS_PER_LAYER + place
            name = correlation % len(NAME_LENGTHS)
            yield at, at + 4_000, process - 100, 7, correlation, global_id(process), name, name


def launch_rows(kernels: int) -> Iterator[tuple[int, ...]]:
    """The call that launched each kernel."""
    for process, start, number in layers(kernels):
        for place in range(KERNELS_PER_LAYER):
            at = start + 1_500 + place * 6_000
            yield at, at + 900, global_id(process, process), number * KERNELS_PER_LAYER + place


def range_rows(kernels: int) -> Iterator[tuple[int, ...]]:
    """The ranges around each layer and its modules, by registered text."""
    for process, start, number in layers(kernels):
        for place, (_, first, last) in enumerate(RANGES):
            text = len(NAME_LENGTHS) + number % LAYERS * len(RANGES) + place
            yield start + first, start + last, global_id(process, process), text


def export(path: Path, kernels: int) -> None:
    """Write an export of about `kernels` kernels, as many launches and 7/6 as many ranges."""
    texts = ["k" * length for length in NAME_LENGTHS]
    texts += [f"model.layers.{layer}{name}" for layer in range(LAYERS) for name, _, _ in RANGES]
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"PRAGMA journal_mode = off; PRAGMA synchronous = off; {DDL}")
        connection.execute("INSERT INTO META_DATA_EXPORT VALUES ('EXPORT_SCHEMA_VERSION', '3.11.1')")
        connection.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(texts))
        connection.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL"
            " VALUES (?, ?, ?, 1, NULL, ?, ?, ?, ?, ?, NULL, 1, 1, 1, 64, 1, 1, NULL)",
            kernel_rows(kernels),
        )
        connection.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, 0, 0, NULL)", launch_rows(kernels)
        )
        connection.executemany(
            "INSERT INTO NVTX_EVENTS (start, end, eventType, globalTid, textId) VALUES (?, ?, 59, ?, ?)",
            range_rows(kernels),
        )
        connection.commit()


def measure(path: Path) -> dict[str, float]:
    """Read and attribute one file in this process, which must have done nothing else.

    Returns
    -------
    dict of str to float
        ``read_s``, ``attribute_s``, ``peak_mb``, and what was found: ``events``, ``ranges``, ``in_a_range``.
    """
    start = time.perf_counter()
    recording = read_nsys(path)
    read = time.perf_counter()
    table = attribute_to_ranges(recording)
    done = time.perf_counter()
    return {
        "read_s": read - start,
        "attribute_s": done - read,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "events": table.num_rows,
        "ranges": recording.ranges.num_rows,
        "in_a_range": pc.sum(table["range_id"].is_valid()).as_py(),
    }


def measured_apart(path: Path) -> dict[str, float]:
    """`measure` in a fresh process, so that its memory is its own."""
    command = [sys.executable, __file__, "--measure", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - this very file
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def nsys_seconds(nsys: Tool, path: Path) -> float | None:
    """Time of nsys's projection of ranges, None where it fails or takes more than `NSYS_LIMIT_S`."""
    year = int(nsys.version.partition(".")[0])
    report, output = NSYS_REPORTS[year < 2023], path.with_suffix("")
    start = time.perf_counter()
    try:
        subprocess.run(  # noqa: S603
            [str(nsys.path), "stats", "--report", report, "--format", "csv", "--output", str(output), str(path)],
            check=True,
            capture_output=True,
            timeout=NSYS_LIMIT_S,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    # It also ends well when the report failed, and then leaves the table empty.
    table = output.with_name(f"{output.name}_{report}.csv")
    return time.perf_counter() - start if table.exists() and table.stat().st_size else None


def compare(nsys: Tool | None, path: Path, seconds: float) -> bool:
    """Print what nsys takes for the same file, and say whether it was done with it."""
    theirs = None if nsys is None else nsys_seconds(nsys, path)
    if nsys is None:
        print("Nsight Systems is not here: nothing to compare with (make nsys)")
    elif theirs is None:
        print(f"  Nsight Systems {nsys.version} failed, or took more than {NSYS_LIMIT_S} s; here {seconds:.2f} s")
    else:
        print(f"  Nsight Systems {nsys.version}: {theirs:.1f} s, {theirs / seconds:.1f} times as long")
    return theirs is not None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", type=int, default=LARGE, help=f"in the large file ({LARGE})")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    print(f"{'kernels':>10}{'ranges':>10}{'in a range':>12}{'read s':>9}{'attribute s':>13}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("small.sqlite", "large.sqlite")]
        for path, kernels in zip(paths, (options.kernels // SCALE, options.kernels), strict=True):
            export(path, kernels)
        # Taken in turns: a slow phase of the machine hits both.
        rounds = [[measured_apart(path) for path in paths] for _ in range(ROUNDS)]
        seconds = [middle(figures) for figures in zip(*rounds, strict=True)]
        nsys, has_compared = find_tool("nsys"), True
        for path, taken in zip(paths, seconds, strict=True):
            # What it cannot do with the small file it cannot do with the large one.
            has_compared = has_compared and compare(nsys, path, taken)
    print(f"{SCALE} times the kernels take {seconds[1] / seconds[0]:.1f} times as long")


def middle(figures: Sequence[dict[str, float]]) -> float:
    """Print the medians of all rounds of one file, and give the seconds of reading and attributing."""
    found = {name: statistics.median(figure[name] for figure in figures) for name in figures[0]}
    print(
        f"{found['events']:>10.0f}{found['ranges']:>10.0f}{found['in_a_range']:>12.0f}"
        f"{found['read_s']:>9.2f}{found['attribute_s']:>13.2f}{found['peak_mb']:>9.0f}"
    )
    return found["read_s"] + found["attribute_s"]


if __name__ == "__main__":
    main()
