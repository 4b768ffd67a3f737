"""Installing leaves nothing behind, and what cannot be wrapped is said."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from hooks.errors import TraceError
from hooks.tracer import INSTALLED, Tracer, wrapped_modules

if TYPE_CHECKING:
    from collections.abc import Callable


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))


def state(root: nn.Module) -> list[list[tuple[str, Any]]]:
    return [list(vars(module).items()) for module in root.modules()]


def own(value: Any) -> Any:
    return value


def test_removal_restores_exactly() -> None:
    model = two_layers()
    model[1][0].forward = own
    model[1][0].later = 1
    before = state(model)
    tracer = Tracer(model).install()
    assert wrapped_modules(model) == ["", "0", "1", "1.0"]
    assert len(INSTALLED) == 1
    tracer.remove()
    assert state(model) == before
    assert model[1][0].forward is own
    assert wrapped_modules(model) == []
    assert not INSTALLED


def test_removal_after_an_exception() -> None:
    model = two_layers()
    before = state(model)
    with pytest.raises(RuntimeError), Tracer(model):
        model(torch.zeros(3, 3))
    assert state(model) == before


def test_install_and_remove_are_idempotent_and_repeatable() -> None:
    model = two_layers()
    before = state(model)
    tracer = Tracer(model)
    tracer.remove()
    for _ in range(2):
        tracer.install()
        tracer.install()
        model(torch.zeros(1, 2))
        tracer.remove()
        tracer.remove()
        assert state(model) == before
        model(torch.zeros(1, 2))
    assert tracer.calls().num_rows == 8
    assert tracer.notes == []


def test_a_forward_changed_between_two_installs_is_the_one_that_runs() -> None:
    model = two_layers()
    tracer = Tracer(model)
    with tracer:
        model(torch.zeros(1, 2))
    model[1].forward = lambda value: value + 5
    with tracer:
        assert model(torch.zeros(1, 2)).min() > 3
    assert tracer.calls()["module_path"].to_pylist() == ["", "0", "1", "1.0", "", "0", "1"]


def test_two_tracers_removed_last_first() -> None:
    model = two_layers()
    before = state(model)
    with Tracer(model) as outer, Tracer(model[1]) as inner:
        model(torch.zeros(1, 2))
    assert state(model) == before
    assert outer.calls()["module_path"].to_pylist() == ["", "0", "1", "1.0"]
    assert inner.calls()["module_path"].to_pylist() == ["", "0"]


def test_two_tracers_removed_first_first_are_refused() -> None:
    model = two_layers()
    before = state(model)
    outer, inner = Tracer(model).install(), Tracer(model[1]).install()
    between = state(model)
    with pytest.raises(TraceError, match=r"2 modules, first '1'\); remove it first"):
        outer.remove()
    assert state(model) == between
    inner.remove()
    outer.remove()
    assert state(model) == before


def test_a_reassigned_forward_stays() -> None:
    model = two_layers()
    tracer = Tracer(model).install()
    model[0].forward = own
    tracer.remove()
    assert model[0].forward is own
    assert wrapped_modules(model) == []
    assert [note.split(":")[0] for note in tracer.notes] == ["the forward of '0' was reassigned while traced"]
    with tracer:
        assert model[0].forward is own
        model(torch.zeros(1, 2))
    assert tracer.calls()["module_path"].to_pylist() == ["", "1", "1.0"]
    assert len(tracer.notes) == 1


def test_a_deleted_wrapper_is_noted() -> None:
    model = two_layers()
    before = state(model)
    with Tracer(model) as tracer:
        del model[1].forward
    assert state(model) == before
    assert "the forward of '1' was reassigned" in tracer.notes[0]


def test_a_failing_detector_records_nothing_and_does_not_unbalance() -> None:
    def detector(_args: Any, kwargs: Any) -> tuple[str, None]:
        return kwargs["stage"], None

    model = two_layers()
    with Tracer(model, detector=detector) as tracer, pytest.raises(KeyError):
        model(torch.zeros(1, 2))
    assert tracer.calls().num_rows == 0


def test_a_dropped_tracer_is_seen_while_its_wrappers_are_in_place() -> None:
    model = two_layers()
    Tracer(model).install()
    gc.collect()
    assert len(INSTALLED) == 1
    for module in model.modules():
        del module.__dict__["forward"]
    gc.collect()
    assert not INSTALLED


def test_a_tracer_does_not_keep_the_model_alive_in_a_cycle() -> None:
    model = two_layers()
    seen = weakref.ref(model)
    tracer = Tracer(model)
    with tracer:
        model(torch.zeros(1, 2))
    gc.collect()
    gc.disable()
    try:
        del tracer, model
        assert seen() is None
    finally:
        gc.enable()


def test_module_compile_is_recorded_as_a_whole() -> None:
    model = two_layers()
    x = torch.zeros(1, 2)
    compiled: Callable[..., Any] = lambda *args: nn.Sequential._call_impl(model[1], *args)  # noqa: E731
    model[1]._compiled_call_impl = compiled
    with Tracer(model, observers={"1.0": print}) as tracer:
        model(x)
    assert tracer.calls()["module_path"].to_pylist() == ["", "0", "1"]
    assert model[1]._compiled_call_impl is compiled
    assert tracer.notes == [
        "'1' is compiled: recorded as a whole, without what it contains or direct forward calls",
        "'1.0' cannot be wrapped: its observer sees nothing",
    ]


def test_torch_compile_is_recorded_as_a_whole() -> None:
    model = two_layers()
    model[1] = torch.compile(model[1], backend="eager")
    before = state(model)
    with Tracer(model) as tracer, torch.no_grad():
        model(torch.ones(1, 2))
    assert tracer.calls()["module_path"].to_pylist() == ["", "0", "1"]
    assert tracer.notes == ["'1' is compiled: recorded as a whole, without what it contains"]
    assert [[name for name, _ in module] for module in state(model)] == [
        [name for name, _ in module] for module in before
    ]
    assert wrapped_modules(model) == []


def test_compiled_root() -> None:
    model = torch.compile(two_layers(), backend="eager")
    with torch.no_grad(), Tracer(model, detector=lambda _args, _kwargs: ("prefill", 0)) as tracer:
        model(torch.ones(1, 2))
    assert tracer.calls().select(["module_path", "stage"]).to_pylist() == [{"module_path": "", "stage": "prefill"}]
    assert tracer.notes == ["'OptimizedModule' is compiled: recorded as a whole, without what it contains"]


def test_script_module_is_left_alone() -> None:
    model = two_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model[1] = torch.jit.script(model[1])
    with Tracer(model) as tracer:
        model(torch.zeros(1, 2))
    assert tracer.calls()["module_path"].to_pylist() == ["", "0"]
    assert tracer.notes == ["'1' is a ScriptModule: neither it nor what it contains is recorded"]
