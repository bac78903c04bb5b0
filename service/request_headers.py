"""The headers of a request, by name, read once."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

HEADERS = "clarifier.headers"


def headers_of(scope: Scope) -> Mapping[str, str]:
    """The first header of each name, in small letters; Starlette's `Headers` walks over all of them for every look."""
    known: dict[str, str] | None = scope.get(HEADERS)
    if known is None:
        known = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        scope[HEADERS] = known
    return known
