"""What is recorded, on small modules with hand-written expectations."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
from torch import nn

from hooks.errors import TraceError
from hooks.tables import CALLGRAPH, CALLS, MODULES
from hooks.tracer import Label, Tracer


class Leaf(nn.Module):
    def forward(self, value: Any) -> Any:
        return value + 1


class Pair(nn.Module):
    """Calls its first leaf directly, past any hook, and its second one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = Leaf(), Leaf(), Leaf()

    def forward(self, value: Any) -> Any:
        value = self.first.forward(value)
        return self.second(value=self.second(value))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Pair(), Pair()])
        self.head = Leaf()

    def forward(self, value: Any, *, stop: bool = False) -> Any:
        for block in self.blocks:
            value = block(value)
        if stop:
            raise ValueError("stopped")
        return self.head(value)


class Countdown(nn.Module):
    """Calls itself until it reaches zero."""

    def forward(self, value: int) -> int:
        return self(value - 1) if value else 0


def edges(tracer: Tracer) -> dict[tuple[str | None, str], int]:
    return {(row["parent_path"], row["child_path"]): row["call_count"] for row in tracer.callgraph().to_pylist()}


def paths(tracer: Tracer) -> list[str]:
    return tracer.calls()["module_path"].to_pylist()


def test_output_and_callgraph_of_a_hand_written_model() -> None:
    model = Model()
    with Tracer(model) as tracer:
        assert model(0) == 7
    assert edges(tracer) == {
        (None, ""): 1,
        ("", "blocks.0"): 1,
        ("blocks.0", "blocks.0.first"): 1,
        ("blocks.0", "blocks.0.second"): 2,
        ("", "blocks.1"): 1,
        ("blocks.1", "blocks.1.first"): 1,
        ("blocks.1", "blocks.1.second"): 2,
        ("", "head"): 1,
    }
    graph = tracer.callgraph()
    assert graph.schema == CALLGRAPH
    assert graph.slice(0, 2).to_pylist()[0] == {
        "stage": "other",
        "parent_path": None,
        "child_path": "",
        "parent_class": None,
        "child_class": "Model",
        "call_count": 1,
    }
    assert graph.to_pylist()[2]["parent_class"] == "Pair"
    assert tracer.notes == []


def test_calls_in_order_with_nested_intervals() -> None:
    model = Model()
    with Tracer(model) as tracer:
        model(0)
        model(0)
    calls = tracer.calls()
    assert calls.schema == CALLS
    calls.validate(full=True)
    one = ["", "blocks.0", "blocks.0.first", "blocks.0.second", "blocks.0.second"]
    one += ["blocks.1", "blocks.1.first", "blocks.1.second", "blocks.1.second", "head"]
    assert calls["module_path"].to_pylist() == one * 2
    parents = [None, 0, 1, 1, 1, 0, 5, 5, 5, 0]
    assert calls["parent_call_id"].to_pylist() == parents + [None if at is None else at + 10 for at in parents]
    assert calls["call_id"].to_pylist() == list(range(20))
    rows = calls.to_pylist()
    for row in rows:
        assert row["start_ns"] <= row["end_ns"]
        assert row["thread"] == threading.get_native_id()
        if row["parent_call_id"] is not None:
            parent = rows[row["parent_call_id"]]
            assert parent["start_ns"] <= row["start_ns"]
            assert row["end_ns"] <= parent["end_ns"]


def test_nothing_recorded_yet() -> None:
    tracer = Tracer(Model())
    assert tracer.calls().num_rows == 0
    assert tracer.callgraph().num_rows == 0
    assert tracer.threads == {}


def test_exception_passes_through_and_closes_every_call() -> None:
    model = Model()
    with Tracer(model) as tracer:
        with pytest.raises(ValueError, match="stopped"):
            model(0, stop=True)
        model(0)
    assert paths(tracer).count("") == 2
    assert paths(tracer).count("head") == 1
    assert tracer.calls()["parent_call_id"].to_pylist()[9] is None, "the second root call is nobody's child"
    assert tracer.notes == []


def test_recursion_nests() -> None:
    model = nn.Sequential(Countdown())
    with Tracer(model) as tracer:
        model(3)
    assert tracer.calls()["parent_call_id"].to_pylist() == [None, 0, 1, 2, 3]
    assert edges(tracer) == {(None, ""): 1, ("", "0"): 1, ("0", "0"): 3}


def test_recursive_root() -> None:
    model = Countdown()
    seen = iter([("outer", 1), ("inner", 2)])
    with Tracer(model, detector=lambda _args, _kwargs: next(seen)) as tracer:
        model(1)
    assert tracer.calls().select(["parent_call_id", "stage", "step"]).to_pylist() == [
        {"parent_call_id": None, "stage": "outer", "step": 1},
        {"parent_call_id": 0, "stage": "inner", "step": 2},
    ]


def test_shared_module_is_recorded_under_its_first_name() -> None:
    shared = nn.Sequential(Leaf())
    model = nn.Sequential()
    model.add_module("a", shared)
    model.add_module("b", shared)
    with Tracer(model) as tracer:
        assert model(0) == 2
    assert paths(tracer) == ["", "a", "a.0", "a", "a.0"]
    assert tracer.notes == ["'b' is the same module as 'a' and recorded under that path"]
    assert tracer.modules()["module_path"].to_pylist() == ["", "a", "a.0"]


def test_threads_nest_separately() -> None:
    model = Model()
    meet = threading.Barrier(2, timeout=30)
    model.head.forward = lambda value: (meet.wait(), value)[1]  # type: ignore[method-assign]
    native: list[tuple[int, int]] = []

    def work() -> None:
        native.append((threading.get_native_id(), threading.get_ident()))
        for _ in range(20):
            model(0)

    workers = [threading.Thread(target=work) for _ in range(2)]
    with Tracer(model) as tracer:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert tracer.threads == dict(native)
    calls = tracer.calls()
    assert calls.num_rows == 2 * 20 * 10
    starts = calls["start_ns"].to_pylist()
    assert starts == sorted(starts)
    rows = calls.to_pylist()
    assert len({row["thread"] for row in rows}) == 2
    for row in rows:
        if row["parent_call_id"] is None:
            assert row["module_path"] == ""
        else:
            parent = rows[row["parent_call_id"]]
            assert parent["thread"] == row["thread"]
            assert parent["module_path"] == row["module_path"].rpartition(".")[0].removesuffix("blocks")


def test_open_calls_are_left_out_and_counted() -> None:
    model = Model()
    read: list[Any] = []
    model.head.forward = lambda value: (read.append(tracer.calls()), value)[1]  # type: ignore[method-assign]
    with Tracer(model) as tracer:
        model(0)
    inside = read[0]
    assert inside.num_rows == 8, "the root and the head were open"
    assert inside["parent_call_id"].to_pylist() == [None, 0, 0, 0, None, 4, 4, 4]
    assert tracer.notes == ["calls still open when the results were read, and left out: 2"]
    assert tracer.calls().num_rows == 10


def test_clear_forgets_and_keeps_recording() -> None:
    model = Model()
    with Tracer(model) as tracer:
        model(0)
        tracer.label = Label("kept", 1)
        tracer.clear()
        assert tracer.calls().num_rows == 0
        assert ([len(log.contexts) for log in tracer._logs], len(tracer._labels)) == ([0], 1), "memory is given back"
        model.head(0)
    assert paths(tracer) == ["head"]


def test_clear_inside_a_call_loses_only_what_was_open() -> None:
    model = Model()
    model.blocks[1].first.forward = lambda value: (tracer.clear(), value)[1]  # type: ignore[method-assign]
    with Tracer(model) as tracer:
        model(0)
        model.blocks[0](0)
        model.head(0)
    found = ["blocks.1.second", "blocks.1.second", "head"]
    assert paths(tracer) == [*found, "blocks.0", "blocks.0.first", "blocks.0.second", "blocks.0.second", "head"]
    assert tracer.calls()["parent_call_id"].to_pylist() == [None, None, None, None, 3, 3, 3, None]
    assert tracer.notes == []


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_a_log_that_does_not_add_up_is_refused(lost: int) -> None:
    model = Model()
    with Tracer(model) as tracer:
        model(0)
        model(0)
    del tracer._logs[0].entries[4 + lost]  # as an interrupt between two entries would
    with pytest.raises(TraceError, match="does not add up"):
        tracer.calls()
    tracer.clear()
    assert tracer.calls().num_rows == 0


def test_an_end_of_another_call_is_refused() -> None:
    model = Model()
    with Tracer(model) as tracer:
        model(0)
    del tracer._logs[0].entries[6:8]  # the end of the first leaf
    with pytest.raises(TraceError, match="does not add up"):
        tracer.calls()


def test_labels_name_pass_and_page() -> None:
    model = Model()
    tracer = Tracer(model)
    assert tracer.label == Label("traced", 0)
    with tracer:
        model(0)
        tracer.label = Label("profiled", 3)
        model(0)
        model.head(0)
    calls = tracer.calls()
    assert calls["pass"].to_pylist() == ["traced"] * 10 + ["profiled"] * 11
    assert calls["page"].to_pylist() == [0] * 10 + [3] * 11
    assert sum(tracer.callgraph()["call_count"].to_pylist()) == 21
    assert sum(tracer.callgraph("profiled")["call_count"].to_pylist()) == 11
    assert tracer.callgraph("none").num_rows == 0
    tracer.clear()
    assert tracer.label == Label("profiled", 3)


def test_a_label_set_inside_a_call_applies_to_the_next() -> None:
    model = Model()
    with Tracer(model, observers={"blocks.0": lambda _: setattr(tracer, "label", Label("next", 1))}) as tracer:
        model(0)
        model.head(0)
    assert tracer.calls()["pass"].to_pylist() == ["traced"] * 10 + ["next"]


def test_observers_see_outputs_after_the_recorded_interval() -> None:
    model = Model()
    seen: list[tuple[Any, bool]] = []

    def observe(output: Any) -> None:
        closed = "blocks.0" in tracer.calls()["module_path"].to_pylist()
        seen.append((output, closed))

    with Tracer(model, observers={"blocks.0": observe, "": lambda output: seen.append((output, True))}) as tracer:
        model(0)
        with pytest.raises(TypeError):
            model("text")
    assert seen == [(3, True), (7, True)]


def test_unknown_paths_are_refused() -> None:
    with pytest.raises(TraceError, match=r"no module 'blocks\.7'"):
        Tracer(Model(), observers={"blocks.7": print})
    with pytest.raises(TraceError, match="no module 'block'"):
        Tracer(Model(), stage_of_subtree={"block": "vision"})


def test_the_signature_of_forward_stays_visible() -> None:
    model = Model()
    plain = inspect.signature(model.forward)
    with Tracer(model):
        assert inspect.signature(model.forward) == plain
        assert model.forward.__name__ == "forward"


def test_modules_table_counts_shared_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3, dtype=torch.bfloat16), nn.LazyLinear(2))
    model.tied = nn.Linear(4, 3, bias=False)
    model.tied.weight = model[0].weight
    table = Tracer(model).modules()
    assert table.schema == MODULES
    assert table.to_pylist()[0] == {
        "module_path": "",
        "module_class": "Sequential",
        "qualified_class": "torch.nn.modules.container.Sequential",
        "parent_path": None,
        "depth": 0,
        "is_leaf": False,
        "parameter_count": 0,
        "weight_bytes": 0,
    }
    assert table["module_path"].to_pylist() == ["", "0", "1", "2", "tied"]
    assert table["parent_path"].to_pylist() == [None, "", "", "", ""]
    assert table["depth"].to_pylist() == [0, 1, 1, 1, 1]
    assert table["is_leaf"].to_pylist() == [False, True, True, True, True]
    assert table["parameter_count"].to_pylist() == [0, 15, 15, 0, 0]
    assert table["weight_bytes"].to_pylist() == [0, 60, 30, 0, 0]
    assert Tracer(Model()).modules()["depth"].to_pylist() == [0, 1, 2, 3, 3, 3, 2, 3, 3, 3, 1]


def test_the_clock_may_count_anything() -> None:
    count = iter(range(0, 1000, 10))
    tracer = Tracer(torch.nn.Sequential(torch.nn.Identity()), clock=lambda: next(count))
    with tracer:
        tracer._named[0][1](torch.zeros(1))
    calls = tracer.calls()
    assert calls["start_ns"].to_pylist() == [0, 10]
    assert calls["end_ns"].to_pylist() == [30, 20]
