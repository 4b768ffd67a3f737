"""What reading a torch.profiler trace costs: CPU time and peak memory, beside tools that load the whole file.

The trace is written here, with Python calls, operators with shapes and flow arrows around each kernel. Each tool reads
in a process of its own, so that its peak memory is its own. Run it as ``python benchmarks/kineto_reader.py``; where
HolisticTraceAnalysis is installed, it is compared too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MEGABYTE = 1_000_000
#: The small file, which every tool reads, is this many times smaller than the large one.
SCALE = 10
PROCESS = 4711
KERNEL = "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_{}_tn_align8>(cutlass::Params)"


def launch(number: int) -> Iterator[dict[str, object]]:
    """Yield what a profiler with stacks and shapes records around one kernel."""
    start = 1_365_627_862_814.125 + 40 * number
    host = {"ph": "X", "pid": PROCESS, "tid": PROCESS}
    python = [f"model.py({line}): forward" for line in (12, 90, 145)]
    for depth, name in enumerate([*python, f"nn.Module: Linear_{number % 400}"]):
        args = {"Python parent id": number, "Python id": number + 1, "Ev Idx": number}
        yield host | {
            "cat": "python_function",
            "name": name,
            "ts": start + depth,
            "dur": 30.5 - 2 * depth,
            "args": args,
        }
    shapes = {"Input Dims": [[1, 4096], [4096, 4096], []], "Input type": ["c10::BFloat16", "c10::BFloat16", "Scalar"]}
    for depth, name in enumerate(["aten::linear", "aten::matmul", "aten::mm"]):
        args = {"External id": number, "Record function id": 0, **shapes, "Ev Idx": number}
        yield host | {"cat": "cpu_op", "name": name, "ts": start + 4 + depth, "dur": 22.25 - 2 * depth, "args": args}
    args = {"External id": number, "cbid": 211, "correlation": number}
    yield host | {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": start + 10, "dur": 6.5, "args": args}
    place = {"device": 0, "context": 1, "stream": 7, "correlation": number, "grid": [32, 16, 1], "block": [128, 1, 1]}
    kernel = {"ph": "X", "pid": 0, "tid": 7, "cat": "kernel", "name": KERNEL.format(number % 97)}
    yield kernel | {"ts": start + 25, "dur": 12.345, "args": {"External id": number, **place}}
    arrow = {"id": number, "cat": "ac2g", "name": "ac2g"}
    yield {"ph": "s", "pid": PROCESS, "tid": PROCESS, "ts": start + 10, **arrow}
    yield {"ph": "f", "pid": 0, "tid": 7, "ts": start + 25, **arrow, "bp": "e"}


def write_trace(path: Path, size: int) -> int:
    """Write a trace of at least ``size`` bytes.

    Returns
    -------
    int
        Kernels in it.
    """
    number = 0
    with path.open("w") as stream:
        stream.write('{"schemaVersion": 1, "baseTimeNanoseconds": 1767189312000000000, "traceEvents": [\n')
        while stream.tell() < size:
            number += 1
            stream.writelines(json.dumps(event) + ",\n" for event in launch(number))
        stream.write('{"ph": "M", "name": "process_name", "pid": 4711, "ts": 0, "args": {"name": "python"}}]}\n')
    return number


def read(tool: str, path: Path) -> int:
    """Read with one tool; its import is not counted by the caller's clock, its memory is."""
    if tool == "read_kineto":
        from hooks.readers.kineto import read_kineto  # noqa: PLC0415

        return read_kineto(path).events.num_rows
    if tool == "json.load":
        with path.open() as stream:
            events = json.load(stream)["traceEvents"]
        return sum(event.get("cat") == "kernel" for event in events)
    from hta.common.trace_parser import parse_trace_dataframe  # noqa: PLC0415
    from hta.configs.parser_config import ParserConfig  # noqa: PLC0415

    _, frame, symbols = parse_trace_dataframe(str(path), ParserConfig.get_default_cfg())
    return int((frame["cat"] == symbols.get_sym_id_map()["kernel"]).sum())


def measure(tool: str, path: Path, kernels: int) -> tuple[float, float]:
    """Read in a process of its own.

    Returns
    -------
    tuple of float
        Seconds of CPU time, and peak memory in MB.
    """
    command = [sys.executable, __file__, "--read", tool, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - this very file
    found, seconds, peak = json.loads(done.stdout.splitlines()[-1])
    if found != kernels:
        raise SystemExit(f"{tool} found {found} of {kernels} kernels")
    return seconds, peak


def report_reading(tool: str, path: str) -> None:
    """Read in this process and print kernels, seconds and peak memory in MB."""
    start = time.process_time()
    found = read(tool, Path(path))
    seconds = time.process_time() - start
    print(json.dumps([found, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the large file (1000)")
    parser.add_argument("--read", nargs=2, metavar=("TOOL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        report_reading(*options.read)
        return
    others = ["json.load", *(["HTA"] if importlib.util.find_spec("hta") else [])]
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'tool':<14}{'file':>10}{'kernels':>10}{'CPU time':>11}{'peak memory':>14}")
        seconds = {}
        for size, tools in (
            (options.megabytes // SCALE, ["read_kineto", *others]),
            (options.megabytes, ["read_kineto"]),
        ):
            path = Path(folder) / "trace.json"
            kernels = write_trace(path, size * MEGABYTE)
            for tool in tools:
                seconds[tool, size], peak = measure(tool, path, kernels)
                print(f"{tool:<14}{size:>7} MB{kernels:>10}{seconds[tool, size]:>9.1f} s{peak:>11.0f} MB")
    small, large = (seconds["read_kineto", size] for size in (options.megabytes // SCALE, options.megabytes))
    print(f"a file {SCALE} times as large takes {large / small:.1f} times as long")


if __name__ == "__main__":
    main()
