"""One line per request, nothing of a client's unescaped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable

import numpy as np
import pytest

from service.entropy import Entropy
from service.logs import JsonFormatter, TextFormatter, log_request
from service.record import new_record
from tests.service.conftest import Running, until
from tests.service.fakes import encoded, green, png


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


def test_the_line_of_an_image_says_what_it_was_and_what_was_said_of_it(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.requests")
    server, image = start(), png(green())
    server.client.post("/classify?explain=true", content=image)
    server.client.post("/classify", content=image)
    server.client.post("/classify", content=encoded(np.tile(green(), (40, 40, 1)), "PNG", compress_level=0))
    server.client.post("/purify", content=image)
    until(lambda: len(_lines(caplog)) == 4)
    explained, plain, large, purified = _lines(caplog)
    digest = hashlib.sha256(image).hexdigest()[:16]
    assert [line["sha256"] == digest for line in (explained, plain, large, purified)] == [True, True, False, True]
    assert len(str(large["sha256"])) == 16
    assert [line.get("label") for line in (explained, plain, purified)] == ["green", "green", None]
    assert [line.get("suspicious") for line in (explained, plain, purified)] == [True, None, None]


def _lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == "service.requests"]
