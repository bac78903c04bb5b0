"""What is known about one request: an object that fills while it is answered, read by log and metrics."""

from __future__ import annotations

import re
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from service.entropy import Entropy

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
ALIASES = {"jpeg": "image/jpg"}
"""What some clients call a format's media type."""


@dataclass(slots=True)
class Record:
    """One request. Names that reach a metric (`route`, `model`, `defense`, `code`) come from closed sets."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    route: str = "other"
    model: str = ""
    defense: str = ""
    """The canonical chain, as it ran."""
    key: str = ""
    """The name of the key that asked."""
    status: int = 500
    code: str = ""
    """The problem's code, empty for a good answer."""
    received: int = 0
    """Bytes of the body, as far as it was read."""
    bytes: int = 0
    """Of the images in it."""
    format: str = ""
    """Detected, not declared."""
    declared: str = ""
    """The client's word for it: neither believed nor logged, only compared."""
    width: int = 0
    height: int = 0
    sha256: str = ""
    """Of a lone image's file: the first 16 hexadecimal digits."""
    label: str = ""
    """The verdict on a lone image."""
    suspicious: bool | None = None
    """Whether AID finds a lone image unnatural; None where it was not asked."""
    digest: str = ""
    timing_ms: dict[str, float] = field(default_factory=dict)
    timed_at: dict[str, float] = field(default_factory=dict)
    """When each of these was known, by the monotonic clock."""
    trace_id: str = ""
    """Of the trace that it belongs to, by its client's word or ours."""
    span: object = None
    """OpenTelemetry's, where there are traces."""
    _ended: float | None = None

    @property
    def mislabeled(self) -> bool:
        """Whether the upload is an image of another kind than was declared."""
        return (
            bool(self.format)
            and self.declared.startswith("image/")
            and self.declared not in (f"image/{self.format}", ALIASES.get(self.format))
        )

    def time(self, stage: str, milliseconds: float) -> None:
        """Note how long a stage took; of several images the longest."""
        self.timing_ms[stage] = max(milliseconds, self.timing_ms.get(stage, 0.0))
        self.timed_at[stage] = time.monotonic()

    def end(self) -> None:
        """It has been answered now."""
        self._ended = time.monotonic()

    def elapsed_ms(self) -> float:
        """Milliseconds since the request came, until its end if that has come."""
        return 1000 * ((time.monotonic() if self._ended is None else self._ended) - self.started)


def new_record(offered_id: str, entropy: Entropy) -> Record:
    """A record for a request that came now; `offered_id` is the client's request id if it is a sound one."""
    return Record(offered_id if REQUEST_ID.fullmatch(offered_id) else entropy.take(16).hex())


def record_of(scope: MutableMapping[str, Any]) -> Record:
    """The record that the middleware put into an ASGI scope."""
    record = scope["clarifier.record"]
    assert isinstance(record, Record)
    return record
