"""An interrupt that is not lost.

Python drops a `KeyboardInterrupt` that happens to be raised in a finaliser or a weak reference's callback, and a long
run would go on. So it is also written down, and raised again at the next step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_ASKED: Final = threading.Event()


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Write down an interrupt that comes while the code inside runs. Other threads than the main one get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _ASKED.clear()


def _interrupt(_number: int, _frame: Any) -> None:
    _ASKED.set()
    raise KeyboardInterrupt


def check() -> None:
    """Raise an interrupt that was dropped.

    Raises
    ------
    KeyboardInterrupt
        If one came inside `noticed`.
    """
    if _ASKED.is_set():
        raise KeyboardInterrupt
