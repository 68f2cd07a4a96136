"""Looking a name up: the thing it names, or an error that offers the nearest name there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from gpucnn.errors import ArgumentError

Thing = TypeVar("Thing")


def look_up(kind: str, name: str, things: Mapping[str, Thing]) -> Thing:
    """``things[name]``, or ArgumentError "unknown <kind> ..." with the nearest name and all of them."""
    if isinstance(name, str) and name in things:
        return things[name]
    raise ArgumentError(unknown(kind, name, things))


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for an unknown name: what came, the nearest match, and what there is."""
    import difflib  # only a failing look-up pays for it

    names = sorted(known)
    nearest = difflib.get_close_matches(str(name).lower().replace("_", "-"), names, n=1, cutoff=0.5)
    nearest = nearest or difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    suggestion = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown {kind} {name!r}{suggestion} (there is {', '.join(names) or 'none'})"
