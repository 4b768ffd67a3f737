"""The tracer: who called whom and when, for every module of a tree.

Each module's ``forward`` is replaced, on the instance, by a closure that logs when it is entered and left. Registered
hooks would miss what is called as ``module.forward(...)`` and cost five times as much.
"""

from __future__ import annotations

import functools
import weakref
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

import nvtx as nvtx_package
from attrs import define

from hooks.callgraph import callgraph
from hooks.calls import Label, calls_table
from hooks.errors import TraceError
from hooks.modules import alias_notes, is_within, modules_table, traceable
from hooks.nvtx_ranges import Ranges, nvtx_attached
from hooks.stages import PositionStages, StageDetector, no_stage
from hooks.wrappers import (
    NO_CONTEXT,
    Clock,
    Context,
    Forward,
    ThreadLog,
    Threads,
    is_wrapper,
    observed,
    ranged,
    ranged_root,
    recorded,
    recorded_root,
    wrapped_modules,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    import pyarrow as pa
    import torch

__all__ = ["INSTALLED", "Label", "PositionStages", "StageDetector", "Tracer", "nvtx_attached", "wrapped_modules"]

_ABSENT: Final = object()

#: One element for each tracer whose wrappers are in place; wrappers keep theirs alive.
INSTALLED: Final[weakref.WeakSet[Threads]] = weakref.WeakSet()


@define(eq=False)
class _Slot:
    """A wrapper and the place where it goes: ``attribute`` of one module instance."""

    path: str
    index: int
    place: dict[str, Any]
    attribute: str
    original: Forward
    wrapper: Forward
    before: Any = _ABSENT

    def put(self) -> None:
        self.before = self.place.get(self.attribute, _ABSENT)
        self.place[self.attribute] = self.wrapper

    def held(self) -> Any:
        return self.place.get(self.attribute)

    def restore(self) -> None:
        if self.before is _ABSENT:
            del self.place[self.attribute]
        else:
            self.place[self.attribute] = self.before


class Tracer:
    """Records every forward call in a module tree, while it is installed.

    Use it as a context manager, or `install` and `remove` it around the steps to record; both take a few milliseconds
    for thousands of modules, and what was recorded stays. Modules added to the tree later are not recorded. Copying or
    pickling a module while it is traced is not supported.

    Parameters
    ----------
    root
        The root of the tree; its path is "".
    detector
        Finds stage and step of each call of the root from its arguments; the calls below inherit them. By default every
        stage is "other".
    nvtx
        Put an NVTX range around each forward too.
    observers
        By module path: called with each output of that module, after its recorded interval.
    stage_of_subtree
        By module path: the stage of all calls of this module and those below it; the innermost counts.
    clock
        Read at both ends of every call. It may be any count that never falls, such as the FLOPs counted so far.

    Attributes
    ----------
    label : Label
        What the calls from now on belong to. A call takes the label from the root call around it, at its start.
    notes : list of str
        What the records do not show, one line each.

    Raises
    ------
    TraceError
        If ``observers`` or ``stage_of_subtree`` name a module that the tree does not have.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        *,
        detector: StageDetector | None = None,
        nvtx: bool = False,
        observers: Mapping[str, Callable[[Any], None]] | None = None,
        stage_of_subtree: Mapping[str, str] | None = None,
        clock: Clock = perf_counter_ns,
    ) -> None:
        self._named = list(root.named_modules())
        self._paths = [path for path, _ in self._named]
        self._observers = dict(observers or {})
        subtrees = dict(stage_of_subtree or {})
        for path in (*self._observers, *subtrees):
            if path not in self._paths:
                raise TraceError(f"{type(root).__name__} has no module {path!r}, or has it first under another path")
        self._own_stages = [_innermost(path, subtrees) for path in self._paths]
        self.notes: list[str] = list(alias_notes(self._named))
        self._detector: StageDetector = detector or no_stage
        self._clock = clock
        self._ranges = self._prepare_ranges() if nvtx else None
        self._logs: list[ThreadLog] = []
        self._threads = Threads(self._logs.append, self._ranges.of(NO_CONTEXT[0]) if self._ranges else ())
        self._labels: list[tuple[int, Label]] = [(0, Label())]
        self._slots: list[_Slot] = []
        self._built: dict[int, _Slot] = {}
        self._given_up: set[int] = set()

    @property
    def label(self) -> Label:
        """What the calls from now on belong to."""
        return self._labels[-1][1]

    @label.setter
    def label(self, label: Label) -> None:
        self._labels.append((self._clock(), label))

    @property
    def threads(self) -> dict[int, int]:
        """The pthread identifier of each thread with recorded calls, by its native id, the calls' ``thread``."""
        return {log.thread: log.ident for log in self._logs if log.entries}

    def install(self) -> Self:
        """Wrap every module that can be wrapped; does nothing when installed already.

        Returns
        -------
        Tracer
            Itself.
        """
        if self._slots:
            return self
        notes: list[str] = []
        wanted = [at for at in traceable(self._named, notes) if at[0] not in self._given_up]
        hidden = set(self._observers) - {self._paths[index] for index, _ in wanted}
        notes += [f"{path!r} cannot be wrapped: its observer sees nothing" for path in sorted(hidden)]
        self._note(*notes)
        self._slots = [self._slot(*at) for at in wanted]
        INSTALLED.add(self._threads)
        for slot in self._slots:
            slot.put()
        return self

    def remove(self) -> None:
        """Put back every ``forward`` as it was; does nothing when removed already.

        A ``forward`` that somebody else assigned in the meantime stays, with a note, and is not wrapped again.

        Raises
        ------
        TraceError
            If another tracer was installed over this one and is still there; nothing is changed then.
        """
        displaced = [slot for slot in self._slots if slot.held() is not slot.wrapper]
        over = [slot.path for slot in displaced if is_wrapper(slot.held())]
        if over:
            raise TraceError(
                f"Another tracer was installed over this one ({len(over)} modules, first {over[0]!r}); remove it first"
            )
        for slot in displaced:
            self._given_up.add(slot.index)
            self._note(
                f"the {slot.attribute} of {slot.path!r} was reassigned while traced: left as it is and not traced "
                "again; if it calls what it replaced, those calls go on being recorded"
            )
        for slot in self._slots:
            if slot.index not in self._given_up:
                slot.restore()
        self._slots = []
        INSTALLED.discard(self._threads)

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def clear(self) -> None:
        """Forget the calls recorded so far; between calls, since a call that is open now is lost."""
        for log in self._logs:
            log.entries.clear()
            log.contexts.clear()
        del self._labels[:-1]

    def modules(self) -> pa.Table:
        """Describe the modules of the tree.

        Returns
        -------
        pyarrow.Table
            With the schema `hooks.tables.MODULES`, in the order of ``named_modules``.
        """
        return modules_table(self._named)

    def calls(self) -> pa.Table:
        """Give the calls recorded so far; one that has not ended is left out, with a note.

        A call outside any call of the root has the stage "other", unless its module has one of its own, and the label
        in force at the start of the outermost call around it.

        Returns
        -------
        pyarrow.Table
            With the schema `hooks.tables.CALLS`, sorted by start.

        Raises
        ------
        TraceError
            If the log does not add up, as after an interrupt in the middle of an entry.
        """
        table, unclosed = calls_table(self._logs, self._paths, self._own_stages, self._labels)
        if unclosed:
            self._note(f"calls still open when the results were read, and left out: {unclosed}")
        return table

    def callgraph(self, pass_name: str | None = None) -> pa.Table:
        """Count who called whom.

        Parameters
        ----------
        pass_name
            Count the calls of this pass only; by default of all.

        Returns
        -------
        pyarrow.Table
            With the schema `hooks.tables.CALLGRAPH`.
        """
        return callgraph(self.calls(), self.modules(), pass_name)

    def _note(self, *notes: str) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    def _prepare_ranges(self) -> Ranges | None:
        if not nvtx_package.enabled():
            self._note("NVTX_DISABLE is set: no NVTX ranges")
            return None
        return Ranges([type(self._named[0][1]).__name__, *self._paths[1:]], self._own_stages)

    def _slot(self, index: int, attribute: str) -> _Slot:
        """Give the slot of a module: the one of the last time, if what it wraps has not changed."""
        path, module = self._named[index]
        original = getattr(module, attribute)
        slot = self._built.get(index)
        if slot is None or slot.attribute != attribute or slot.original != original:
            # What looks at a forward's signature, as generate loops do, must find the original's.
            wrapper = functools.update_wrapper(self._wrap(original, index), original)
            slot = self._built[index] = _Slot(path, index, vars(module), attribute, original, wrapper)
        return slot

    def _wrap(self, forward: Forward, index: int) -> Forward:
        threads, ranges = self._threads, self._ranges
        if ranges is not None:
            forward = ranged(forward, threads, index) if index else ranged_root(forward, threads, ranges)
        if index:
            forward = recorded(forward, threads, index, self._clock)
        else:
            forward = recorded_root(forward, threads, len(self._named), self._detect, self._clock)
        observer = self._observers.get(self._paths[index])
        return forward if observer is None else observed(forward, observer)

    @property
    def _detect(self) -> Callable[[tuple[Any, ...], dict[str, Any]], Context]:
        detector, ranges = self._detector, self._ranges
        if ranges is None:
            return detector

        def detect(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
            context = detector(args, kwargs)
            ranges.of(context[0])  # prepared here, a new stage does not cost time inside the call
            return context

        return detect


def _innermost(path: str, stage_of: Mapping[str, str]) -> str | None:
    around = [subtree for subtree in stage_of if is_within(path, subtree)]
    return stage_of[max(around, key=len)] if around else None
