from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from hooks.attribution import attribute
from hooks.capture import EventCapture, _cuda_events, self_times
from hooks.errors import TraceError
from hooks.tables import EVENTS
from hooks.tracer import Label, Tracer

CPU = torch.device("cpu")


class Sum(torch.nn.Module):
    """A container with work of its own beside its child's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sin() + x


def test_self_times_leave_children_out_and_add_up():
    spans = [(1, 0, 100), (1, 10, 40), (1, 20, 30), (1, 50, 60), (1, 100, 130), (2, 0, 50), (2, 50, 60)]
    own = self_times(spans)
    assert own == [60, 20, 10, 10, 30, 50, 10]
    assert sum(own) == 100 + 30 + 60


def test_operators_are_attributed_to_the_module_that_ran_them():
    model, x = Sum(), torch.randn(8, 64)
    tracer = Tracer(model)
    tracer.label = Label("profiled", 0)
    with tracer, EventCapture(CPU) as capture, capture.window(), torch.no_grad():
        model(x)
    assert capture.events.schema.equals(EVENTS)
    rows = attribute(capture.events, tracer.calls()).to_pylist()
    paths = {row["name"]: row["module_path"] for row in rows}
    assert paths["aten::addmm"] == "linear"
    assert paths["aten::sin"] == ""
    assert paths["aten::add"] == ""
    assert all(row["duration_ns"] >= 0 for row in rows)


def test_only_windows_are_kept_and_the_rest_is_counted():
    x = torch.randn(64, 64)
    with EventCapture(CPU) as capture:
        x.cos()
        with capture.window():
            x.sin()
        x.tan()
        with capture.window():
            x.exp()
    assert capture.events["name"].to_pylist() == ["aten::sin", "aten::exp"]
    assert capture.outside_windows == 2


def test_times_are_on_the_tracers_clock():
    x = torch.randn(64, 64)
    with EventCapture(CPU) as capture, capture.window():
        before = time.perf_counter_ns()
        x.sin()
        after = time.perf_counter_ns()
    start = capture.events["start_ns"][0].as_py()
    slack = capture.clock.residual_ns
    assert before - slack <= start <= after + slack
    assert capture.clock.residual_ns > 0


def test_other_threads_are_seen():
    x = torch.randn(64, 64)
    with EventCapture(CPU) as capture, capture.window():
        x.sin()
        thread = threading.Thread(target=x.cos)
        thread.start()
        thread.join()
    threads = dict(zip(capture.events["name"].to_pylist(), capture.events["launch_thread"].to_pylist(), strict=True))
    assert threads["aten::sin"] == threading.get_native_id()
    assert threads["aten::cos"] not in {None, threading.get_native_id()}
    assert set(capture.events["process"].to_pylist()) == {os.getpid()}


def test_user_annotations_are_no_work():
    x = torch.randn(64, 64)
    with EventCapture(CPU) as capture, capture.window(), torch.profiler.record_function("mine"):
        x.sin()
    assert capture.events["name"].to_pylist() == ["aten::sin"]


def test_an_empty_capture_is_an_error():
    with pytest.raises(TraceError, match="recorded no operator"), EventCapture(CPU) as capture, capture.window():
        pass


def test_an_error_inside_passes_through_and_stops_the_profiler():
    with pytest.raises(KeyError), EventCapture(CPU):
        raise KeyError("mine")
    with EventCapture(CPU) as capture, capture.window():
        torch.ones(2).sin()
    assert "aten::sin" in capture.events["name"].to_pylist()


def test_profiler_chatter_stays_off_standard_error(capfd):
    with EventCapture(CPU) as capture, capture.window():
        torch.ones(2).sin()
    assert capfd.readouterr().err == ""


class FakeEvent:
    """What the profiler's binding yields for one CUDA activity."""

    def __init__(self, name: str, device: str, start: int, correlation: int, resource: int) -> None:
        self._values = (name, device, start, correlation, resource)

    def name(self) -> str:
        return self._values[0]

    def device_type(self) -> object:
        return type("DeviceType", (), {"name": self._values[1]})

    def device_index(self) -> int:
        return 0

    def start_ns(self) -> int:
        return self._values[2]

    def duration_ns(self) -> int:
        return 10

    def correlation_id(self) -> int:
        return self._values[3]

    def device_resource_id(self) -> int:
        return self._values[4]

    def is_user_annotation(self) -> bool:
        return self._values[0] == "annotation"


def test_cuda_events_find_their_launch_by_correlation_id():
    events = _cuda_events(
        [
            FakeEvent("cudaLaunchKernel", "CPU", 100, 1, 4242),
            FakeEvent("cudaMemcpyAsync", "CPU", 150, 2, 4242),
            FakeEvent("gemm_kernel", "CUDA", 300, 1, 7),
            FakeEvent("Memcpy DtoH (Device -> Pageable)", "CUDA", 320, 2, 7),
            FakeEvent("Memset (Device)", "CUDA", 340, 9, 7),
            FakeEvent("annotation", "CUDA", 300, 1, 7),
        ]
    )
    assert [(event.kind, event.launch_ns, event.launch_thread, event.stream) for event in events] == [
        ("kernel", 100, 4242, 7),
        ("memcpy", 150, 4242, 7),
        ("memset", None, None, 7),
    ]
