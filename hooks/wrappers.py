"""The closures that stand in for a module's ``forward``, and the log that they write.

A log is a flat list of integers, two for each thing that happened: a mark and a time, or what else the clock counts.
The mark of an entered call is its module's index; of an entered root call, the number of modules plus the index of its
context; of a left call, ``~index``. Everything else is worked out when the log is read (`hooks.calls`). A list beats
``array('q')`` here: appending to an array parses the integer each time, which costs 180 ns more per call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from attrs import Factory, define

if TYPE_CHECKING:
    import torch

    from hooks.nvtx_ranges import Ranges

Forward = Callable[..., Any]
Clock = Callable[[], int]
#: The stage and the step of one root call.
Context = tuple[str, int | None]

NO_CONTEXT: Final[Context] = ("other", None)


@define(eq=False)
class ThreadLog:
    """What one thread did, in order."""

    thread: int
    ident: int
    entries: list[int] = Factory(list)
    contexts: list[Context] = Factory(list)


class Threads(threading.local):
    """What the wrappers need in each thread; made, and its log registered, at a thread's first call.

    Parameters
    ----------
    register
        Takes the log of a new thread.
    ranges
        The NVTX ranges of calls outside any root call, by module index; empty without NVTX.
    """

    def __init__(self, register: Callable[[ThreadLog], None], ranges: Sequence[Any]) -> None:
        log = ThreadLog(threading.get_native_id(), threading.get_ident())
        register(log)
        self.push = log.entries.append
        self.contexts = log.contexts
        self.ranges = ranges


def recorded(forward: Forward, threads: Threads, index: int, clock: Clock) -> Forward:
    """Log each call of ``forward`` as a call of module ``index``."""
    left = ~index

    def traced(*args: Any, **kwargs: Any) -> Any:
        push = threads.push
        push(index)
        push(clock())
        try:
            # Without this, each call copies an empty dict.
            return forward(*args, **kwargs) if kwargs else forward(*args)
        finally:
            push(left)
            push(clock())

    return traced


def recorded_root(
    forward: Forward,
    threads: Threads,
    module_count: int,
    detect: Callable[[tuple[Any, ...], dict[str, Any]], Context],
    clock: Clock,
) -> Forward:
    """Log each call of ``forward`` as a call of module 0, with the context that ``detect`` finds before it."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        context = detect(args, kwargs)
        push, contexts = threads.push, threads.contexts
        contexts.append(context)
        push(module_count + len(contexts) - 1)
        push(clock())
        try:
            return forward(*args, **kwargs)
        finally:
            push(~0)
            push(clock())

    return traced


def observed(forward: Forward, observer: Callable[[Any], None]) -> Forward:
    """Show each output of ``forward`` to ``observer``; around a recorded forward, outside its interval."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        observer(output)
        return output

    return watched


def ranged(forward: Forward, threads: Threads, index: int) -> Forward:
    """Put each call of ``forward`` in the NVTX range of module ``index`` for the stage that the thread is in."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        with threads.ranges[index]:
            return forward(*args, **kwargs)

    return marked


def ranged_root(forward: Forward, threads: Threads, ranges: Ranges) -> Forward:
    """Put each call of ``forward`` in the root's range, and its thread in the stage of the context logged last."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        stage, step = threads.contexts[-1]
        outer, threads.ranges = threads.ranges, ranges.of(stage)
        try:
            with ranges.root(stage, step):
                return forward(*args, **kwargs)
        finally:
            threads.ranges = outer

    return marked


def is_wrapper(function: object) -> bool:
    """Say whether ``function`` is one of this file's closures, whatever name it took over from what it wraps."""
    return isinstance(function, FunctionType) and function.__code__.co_filename == is_wrapper.__code__.co_filename


def wrapped_modules(root: torch.nn.Module) -> list[str]:
    """List the modules that carry a tracer's wrapper now.

    Parameters
    ----------
    root
        The tree to look through.

    Returns
    -------
    list of str
        Their paths; empty when every tracer was removed.
    """
    return [path for path, module in root.named_modules() if any(is_wrapper(held) for held in vars(module).values())]
