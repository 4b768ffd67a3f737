from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hooks.tracer import INSTALLED

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def no_wrapper_left() -> Iterator[None]:
    INSTALLED.clear()
    yield
    assert not INSTALLED, "a tracer was not removed"
