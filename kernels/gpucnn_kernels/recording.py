"""Whether launches or allocations are being recorded, to be repeated as they are: nothing may be tried then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_under_way: ContextVar[bool] = ContextVar("recording", default=False)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """A graph is being captured, or an arena recorded or used, inside of this block."""
    before = _under_way.set(True)
    try:
        yield
    finally:
        _under_way.reset(before)


def is_recording() -> bool:
    """Whether this is inside of such a block."""
    return _under_way.get()
