"""NVTX ranges, with the library's two calls replaced by a list."""

from __future__ import annotations

from typing import Any

import nvtx
import pytest
import torch
from torch import nn

from hooks.nvtx_ranges import DOMAIN
from hooks.tracer import Tracer, nvtx_attached


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    handle = nvtx.get_domain(DOMAIN).handle
    names = nvtx.get_domain(DOMAIN).categories

    def push(attributes: Any, domain: Any) -> None:
        assert domain is handle
        category = next(name for name, number in names.items() if number == attributes.category)
        seen.append(("push", attributes.message.string, category, attributes.payload))

    def pop(domain: Any) -> None:
        assert domain is handle
        seen.append(("pop",))

    monkeypatch.setattr(nvtx.nvtx, "libnvtx_push_range", push)
    monkeypatch.setattr(nvtx.nvtx, "libnvtx_pop_range", pop)
    return seen


def by_length(args: tuple[Any, ...], _kwargs: Any) -> tuple[str, int | None]:
    return ("prefill", 0) if len(args[0]) > 1 else ("decode", 4)


def test_ranges_carry_path_stage_and_step(ranges: list[tuple[Any, ...]]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with Tracer(model, detector=by_length, stage_of_subtree={"0": "vision"}, nvtx=True):
        model(torch.zeros(2, 2))
        model(torch.zeros(1, 2))
        model[1](torch.zeros(1, 2))
    pop = ("pop",)
    assert ranges == [
        ("push", "Sequential", "prefill", 0),
        *[("push", "0", "vision", None), pop, ("push", "1", "prefill", None), pop, pop],
        ("push", "Sequential", "decode", 4),
        *[("push", "0", "vision", None), pop, ("push", "1", "decode", None), pop, pop],
        *[("push", "1", "other", None), pop],
    ]


def test_ranges_close_on_exceptions(ranges: list[tuple[Any, ...]]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    with Tracer(model, nvtx=True) as tracer:
        with pytest.raises(RuntimeError):
            model(torch.zeros(3, 3))
        model[0](torch.zeros(1, 2))
    assert [kind for kind, *_ in ranges] == ["push", "push", "push", "pop", "pop", "pop", "push", "push", "pop", "pop"]
    assert ranges[0] == ("push", "Sequential", "other", None)
    assert tracer.calls().num_rows == 5


def test_a_nested_root_call_gives_the_stage_back(ranges: list[tuple[Any, ...]]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = nn.Identity()

        def forward(self, values: list[int]) -> None:
            if len(values) > 1:
                self(values[:1])
            self.leaf(values)

    model = Twice()
    with Tracer(model, detector=by_length, nvtx=True):
        model([1, 2])
    assert [(message, stage) for _, message, stage, _ in (entry for entry in ranges if entry[0] == "push")] == [
        ("Twice", "prefill"),
        ("Twice", "decode"),
        ("leaf", "decode"),
        ("leaf", "prefill"),
    ]


def test_ranges_are_prepared_once(ranges: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.ReLU())
    with Tracer(model, detector=by_length, nvtx=True):
        model(torch.zeros(2, 2))
        monkeypatch.setattr(nvtx, "annotate", None)
        model(torch.zeros(2, 2))
    assert ranges[:4] == ranges[4:]


def test_a_new_stage_is_prepared_outside_the_recorded_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    annotate = nvtx.annotate

    def noting(*args: Any, **kwargs: Any) -> Any:
        prepared.append(len(tracer._logs[0].entries))
        return annotate(*args, **kwargs)

    model = nn.Sequential(nn.ReLU())
    tracer = Tracer(model, detector=by_length, nvtx=True)
    monkeypatch.setattr(nvtx, "annotate", noting)
    with tracer:
        model(torch.zeros(2, 2))
    assert prepared == [0, 0, 0]


def test_without_nvtx_no_range_is_touched(ranges: list[tuple[Any, ...]]) -> None:
    model = nn.Sequential(nn.ReLU())
    with Tracer(model):
        model(torch.zeros(1))
    assert ranges == []


def test_the_real_library_without_a_tool() -> None:
    model = nn.Sequential(nn.ReLU())
    with Tracer(model, nvtx=True) as tracer:
        model(torch.zeros(1))
    assert tracer.calls().num_rows == 2


def test_disabled_nvtx_is_noted(monkeypatch: pytest.MonkeyPatch, ranges: list[tuple[Any, ...]]) -> None:
    monkeypatch.setattr(nvtx, "enabled", lambda: False)
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    model = nn.Sequential(nn.ReLU())
    with Tracer(model, nvtx=True) as tracer:
        model(torch.zeros(1))
    assert tracer.notes == ["NVTX_DISABLE is set: no NVTX ranges"]
    assert ranges == []
    assert not nvtx_attached()


def test_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID"):
        monkeypatch.delenv(name, raising=False)
    assert nvtx_attached() is False
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "/opt/libToolsInjection64.so")
    assert nvtx_attached() is True
