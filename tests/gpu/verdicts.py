"""Checks that print PASS, FAIL or SKIP, each with its figure."""

# ruff: noqa: T201  what it prints is the result
from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Subject = TypeVar("Subject")


class SkippedError(Exception):
    """The check says nothing about this subject; the message says why."""


def checked(holds: bool, figure: str) -> str:  # noqa: FBT001  what an assertion takes
    """Give the figure, or raise with it."""
    if not holds:
        raise AssertionError(figure)
    return figure


def all_hold(name: str, checks: Iterable[Callable[[Subject], str]], subject: Subject) -> bool:
    """Run every check, whatever became of the others, and print how many held; tells whether none failed."""
    words = [_verdict(check, subject) for check in checks]
    print(f"{name}: " + ", ".join(f"{words.count(word)} {word}" for word in ("PASS", "FAIL", "SKIP")))
    return "FAIL" not in words


def _verdict(check: Callable[[Subject], str], subject: Subject) -> str:
    try:
        word, figure = "PASS", check(subject)
    except SkippedError as reason:
        word, figure = "SKIP", str(reason)
    except AssertionError as found:
        word, figure = "FAIL", str(found)
    except Exception as error:  # noqa: BLE001  the other checks shall run too
        traceback.print_exc()
        word, figure = "FAIL", f"{type(error).__name__}: {error}"
    print(f"{word} {check.__name__}: {figure}", flush=True)
    return word
