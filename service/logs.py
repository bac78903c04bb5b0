"""Logs on standard error: one line per event, one event per request, nothing of a client's unescaped."""

from __future__ import annotations

import json
import logging
import time
from functools import lru_cache
from typing import Literal

from service.record import Record

requests = logging.getLogger("service.requests")
LEVELS = {"5": logging.WARNING}
"""By the first digit of the status; INFO otherwise."""
PLAIN = (int, float)
"""Written alike by Python and JSON."""
_json = json.JSONEncoder(default=str).encode
_quoted = json.encoder.encode_basestring_ascii


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return _json(line)


class TextFormatter(logging.Formatter):
    """For people: time, level, message, and fields as name=value. Only a stack takes more than a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        words = [_timestamp(record), record.levelname, _quoted(record.getMessage().strip())[1:-1]]
        for name, value in fields.items():
            kind = type(value)
            words.append(f"{name}={value if kind in PLAIN else _quoted(value) if kind is str else _json(value)}")
        stack = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return " ".join(words) + stack


def configure_logging(level: str, style: Literal["json", "text"]) -> None:
    """Send everything from `level` up to standard error. Called once, by `python -m service`."""
    # What no line of ours shows is not gathered for it (the Optimization section of `logging`'s documentation).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def log_request(record: Record) -> None:
    """The line of one request. No pixels, no file name, no header; of a key its name."""
    level = LEVELS.get(str(record.status)[0], logging.INFO)
    if not requests.isEnabledFor(level):
        return
    fields = {
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "key": record.key,
        "route": record.route,
        "status": record.status,
        "code": record.code,
        "ms": round(record.elapsed_ms(), 2),
        **{f"{stage}_ms": round(value, 2) for stage, value in record.timing_ms.items()},
        "model": record.model,
        "digest": record.digest[:12],
        "defense": record.defense,
        "bytes": record.bytes,
        "format": record.format,
        "width": record.width,
        "height": record.height,
        "sha256": record.sha256,
        "label": record.label,
        "suspicious": record.suspicious,
    }
    line = logging.LogRecord(requests.name, level, __file__, 0, "request", (), None)  # `log` would look for its caller
    line.fields = {
        name: value for name, value in fields.items() if value is not None and value != "" and (value or value is False)
    }
    requests.handle(line)


def _timestamp(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(2)
def _second(since_epoch: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since_epoch))
