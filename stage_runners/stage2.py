"""Stage 2: the same generation again, in a process of its own under Nsight Systems.

The parent builds the command line and reads what was recorded. The child loads the model again and runs as many tokens
as Stage 1 did, with an NVTX range around every forward. What it loads and warms up with is not recorded: the recording
begins and ends with the generation.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final

import attrs
import nvtx
import torch

from hooks.errors import TraceError
from hooks.nsight import isolation, profile
from hooks.tracer import PositionStages, Tracer
from stage_runners.generate import Generation
from stage_runners.stage1 import VISION_SUBTREES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from hooks.nsight import Tool
    from stage_runners.stage1 import SourcedInputs

#: The range that starts and ends a recording without a GPU, and its domain: no module's, so that it counts as none.
CAPTURE: Final = "capture"
CAPTURE_DOMAIN: Final = "dsocr-trace-capture"

#: What Nsight Systems says of a GPU or driver that it cannot trace stands in lines with one of these.
_COMPLAINTS: Final = ("error", "fail", "not supported", "cannot", "unable", "permission")


@attrs.frozen
class CapturedPage:
    """One page's generation in the child.

    Attributes
    ----------
    tokens
        Generated ids, as many as were asked for.
    wall_ns
        Time of the generation under the tracer and the profiler.
    """

    tokens: tuple[int, ...]
    wall_ns: int


def nsys_command(nsys: Tool, report: Path, target: Sequence[str], *, cuda: bool) -> list[str]:
    """The command line that records ``target``.

    Parameters
    ----------
    nsys
        Nsight Systems.
    report
        Where the recording goes (``.nsys-rep``).
    target
        The program and its arguments.
    cuda
        Whether to record CUDA. Where there is none, the range `CAPTURE` starts the recording instead of
        ``cudaProfilerStart``, and tracing CUDA would only load its libraries.
    """
    window = (
        ["--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--cuda-graph-trace=node"]
        if cuda
        else ["--trace=nvtx", "--capture-range=nvtx", f"--nvtx-capture={CAPTURE}@{CAPTURE_DOMAIN}"]
    )
    return [
        str(nsys.path),
        "profile",
        *window,
        # Else the program is ended with the recording, before it has said what it did.
        "--capture-range-end=stop",
        "--sample=none",
        "--cpuctxsw=none",
        "--force-overwrite=true",
        f"--output={report}",
        *target,
    ]


def record(nsys: Tool, report: Path, target: Sequence[str], *, cuda: bool) -> bool:
    """Run ``target`` under Nsight Systems, with few of the user's variables (see `hooks.nsight`).

    Returns
    -------
    bool
        Whether it ran out of sight of all other processes. If not, the recording holds their names and environments.

    Raises
    ------
    TraceError
        If nothing was recorded; says what Nsight Systems said.
    """
    alone = isolation()
    done = profile([*alone, *nsys_command(nsys, report, target, cuda=cuda)], report.parent)
    if not report.exists():
        lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
        said = [line for line in lines if any(word in line.lower() for word in _COMPLAINTS)] or lines[-1:]
        raise TraceError(
            f"Nsight Systems {nsys.version} recorded nothing ({said[0] if said else f'exit code {done.returncode}'}); "
            f"see what it can do here: {nsys.path} status -e"
        )
    return bool(alone)


def captured_generations(model: nn.Module, pages: Sequence[SourcedInputs], counts: Sequence[int]) -> list[CapturedPage]:
    """Run one traced generation for each page inside the recording; the child's part.

    Parameters
    ----------
    model
        Ready for inference on its device.
    pages
        Inputs on the model's device, in its type.
    counts
        How many tokens each page gets.
    """
    device = next(model.parameters()).device
    paths = {path for path, _ in model.named_modules()}
    Generation(model, pages[0].inputs).start()  # warm-up, not recorded
    tracer = Tracer(
        model,
        detector=PositionStages(),
        stage_of_subtree={path: "vision" for path in VISION_SUBTREES if path in paths},
        nvtx=True,
    )
    with tracer, _recorded(device):
        return [_generated(model, page, count) for page, count in zip(pages, counts, strict=True)]


def _generated(model: nn.Module, page: SourcedInputs, count: int) -> CapturedPage:
    start = time.perf_counter_ns()
    generation = Generation(model, page.inputs)
    generation.start()
    while len(generation.tokens) < count:
        generation.advance()
    return CapturedPage(tuple(generation.tokens), time.perf_counter_ns() - start)


@contextlib.contextmanager
def _recorded(device: torch.device) -> Iterator[None]:
    """Start and end the recording; a GPU's work must be done by the end."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            stack.enter_context(torch.cuda.profiler.profile())
            stack.callback(torch.cuda.synchronize, device)
        stack.enter_context(nvtx.annotate(CAPTURE, domain=CAPTURE_DOMAIN))
        yield
