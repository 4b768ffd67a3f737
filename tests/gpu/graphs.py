"""Capture two modules in a CUDA graph under Nsight Systems, and see that replayed kernels find their modules.

Prints PASS, FAIL or SKIP. What is recorded is this file again, with ``--child``.
"""

# ruff: noqa: T201  what it prints is the result
from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from hooks.attribution import attribute_to_ranges
from hooks.columns import plain
from hooks.nsight import find_tool, profile
from hooks.readers.nsys import read_nsys_report
from hooks.tracer import Tracer

REPLAYS = 3


def child() -> None:
    """Capture once under the tracer, and replay without it."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Softmax(dim=-1)).cuda()
    x = torch.ones(64, 256, device="cuda")
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with Tracer(model, nvtx=True), torch.cuda.graph(graph):
            model(x)
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()


def main() -> int:
    """Record, read, compare."""
    nsys = find_tool("nsys")
    if nsys is None or not torch.cuda.is_available():
        print("SKIP graphs: needs Nsight Systems and a GPU")
        return 0
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "graphs.nsys-rep"
        options = ["--trace=cuda,nvtx", "--cuda-graph-trace=node", "--sample=none", "--cpuctxsw=none"]
        program = [sys.executable, __file__, "--child"]
        done = profile([str(nsys.path), "profile", *options, f"--output={report}", *program], Path(name))
        if not report.exists():
            print(f"FAIL graphs: Nsight Systems recorded nothing ({done.stdout[-200:]} {done.stderr[-200:]})")
            return 1
        found = plain(attribute_to_ranges(read_nsys_report(report, nsys.path))).to_pandas()
    nodes = found[found["graph_node_id"].notna()]
    places = Counter(nodes["range_name"].fillna(nodes["unclassified_reason"]))
    each = Counter(nodes["graph_node_id"])
    right = set(places) == {"0", "1"} and set(each.values()) == {REPLAYS}
    print(f"{'PASS' if right else 'FAIL'} graphs: {dict(places)}, {len(each)} nodes, {len(found)} events")
    return 0 if right else 1


if __name__ == "__main__":
    if "--child" in sys.argv:
        child()
    else:
        sys.exit(main())
