"""One line per request, nothing of a client's unescaped."""

from __future__ import annotations

import json
import logging

import pytest

from service.entropy import Entropy
from service.logs import JsonFormatter, TextFormatter, log_request
from service.record import new_record


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("service", logging.INFO, "file", 1, message, (), None)
    made.__dict__["fields"] = fields
    return made


def test_json_is_one_object_per_line() -> None:
    line = JsonFormatter().format(record("two\nlines", route="/x", ms=1.5))
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["message"] == "two\nlines"
    assert (parsed["route"], parsed["ms"], parsed["level"]) == ("/x", 1.5, "INFO")
    assert parsed["time"].endswith("Z")


def test_row_82_text_escapes_line_breaks_and_control_characters() -> None:
    line = TextFormatter().format(record("a\r\nFAKE\x1b[31m", field="b\nFAKE"))
    assert line.isprintable()
    assert "\\n" in line


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_a_stack_is_written(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        made = record("failed")
        made.exc_info = (type(error), error, error.__traceback__)
    assert "ValueError: why" in formatter.format(made)


def test_a_requests_line_holds_what_is_known_and_nothing_empty(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    request = new_record("id", Entropy())
    request.status, request.route, request.bytes, request.key = 200, "/classify", 12, "mobile"
    request.timing_ms["decode"] = 0.123456
    log_request(request)
    request.status, request.code = 503, "draining"
    log_request(request)
    good, bad = caplog.records
    assert (good.levelname, bad.levelname) == ("INFO", "WARNING")
    fields = good.__dict__["fields"]
    assert fields.pop("ms") >= 0
    assert fields == {
        "request_id": "id",
        "key": "mobile",
        "route": "/classify",
        "status": 200,
        "decode_ms": 0.12,
        "bytes": 12,
    }
    assert bad.__dict__["fields"]["code"] == "draining"


def test_a_requests_line_costs_nothing_where_nobody_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "service.requests")
    log_request(new_record("id", Entropy()))
    assert not caplog.records
