"""Query parameters and headers are strict."""

from __future__ import annotations

import pytest
from fastapi import Request

from service.errors import DeadlineExceeded, InvalidParameter
from service.openapi import documented
from service.parameters import (
    REMEMBERED_BYTES,
    ClassifyParameters,
    PurifyParameters,
    _remembered,
    read_accepted,
    read_parameters,
    read_timeout_s,
)
from tests.service.conftest import Running
from tests.service.fakes import green, png

GOOD = png(green())
OFFERED = ("image/png", "image/webp", "application/x-npy")


def request(query: str = "", **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "query_string": query.encode(), "headers": raw})


def test_what_is_given_is_read_and_what_is_not_has_its_default() -> None:
    query = "model=a%401&defense=atop:rt1,aid&seed=18446744073709551615&votes=64&top_k=2&explain=true"
    read = read_parameters(ClassifyParameters, request(query))
    assert (read.model, read.defense, read.seed) == ("a@1", "atop:rt1,aid", 2**64 - 1)
    assert (read.votes, read.top_k, read.explain) == (64, 2, True)
    nothing = read_parameters(ClassifyParameters, request())
    assert (nothing.model, nothing.defense, nothing.seed) == (None, None, None)
    assert (nothing.votes, nothing.top_k, nothing.explain) == (1, None, False)


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("colour=red", "colour"),
        ("Seed=1", "Seed"),
        ("top_k=0", "top_k"),
        ("top_k=-1", "top_k"),
        ("top_k=4", "top_k"),
        ("top_k=five", "top_k"),
        ("top_k=1180591620717411303424", "top_k"),
        ("votes=0", "votes"),
        ("votes=65", "votes"),
        ("seed=-1", "seed"),
        ("seed=18446744073709551616", "seed"),
        ("seed=1.5", "seed"),
        ("explain=maybe", "explain"),
        ("seed=1&seed=1", "seed"),
        ("size=original", "size"),
    ],
)
def test_row_22_bad_parameters_are_422_with_a_pointer(service: Running, query: str, pointer: str) -> None:
    problem = service.refuses(service.client.post(f"/classify?{query}", content=GOOD), 422, "invalid_parameter")
    assert [error["pointer"] for error in problem["errors"]] == [f"#/query/{pointer}"]
    assert problem["errors"][0]["detail"]


def test_row_22_every_bad_parameter_is_named(service: Running) -> None:
    response = service.client.post("/classify?votes=0&seed=-1&x=1", content=GOOD)
    problem = service.refuses(response, 422, "invalid_parameter")
    assert {error["pointer"] for error in problem["errors"]} == {"#/query/votes", "#/query/seed", "#/query/x"}


def test_row_22_a_hostile_name_is_not_echoed(service: Running) -> None:
    response = service.client.post("/classify?%3Cscript%3E%0d%0a=1", content=GOOD)
    problem = service.refuses(response, 422, "invalid_parameter")
    assert "<" not in response.text
    assert problem["errors"][0]["pointer"] == "#/query/?script???"


@pytest.mark.parametrize(
    "defense",
    [
        "unknown",
        ",".join(["aid"] * 50),
        ",".join(f"d{i}" for i in range(50)),
        "aid,aid",
        "atop,atop:rt1",
        "",
        ",",
        "atop,",
        "atop:",
        "atop:rt9",
        "atop,none",
        "none,none",
        "ATOP",
        "auto",
    ],
)
def test_row_23_bad_defenses_are_422(service: Running, defense: str) -> None:
    response = service.client.post("/classify", params={"defense": defense}, content=GOOD)
    problem = service.refuses(response, 422, "invalid_parameter")
    assert [error["pointer"] for error in problem["errors"]] == ["#/query/defense"]


@pytest.mark.parametrize("route", ["/detect?votes=1", "/purify?top=1", "/models?model=x"])
def test_parameters_of_other_routes_are_unknown(service: Running, route: str) -> None:
    method = "GET" if route.startswith("/models") else "POST"
    service.refuses(service.client.request(method, route, content=GOOD), 422, "invalid_parameter")


def test_a_timeout_can_only_shorten() -> None:
    assert read_timeout_s(request(), 30) == 30
    assert read_timeout_s(request(x_request_timeout_ms="1500"), 30) == 1.5
    assert read_timeout_s(request(x_request_timeout_ms="36000000"), 30) == 30


@pytest.mark.parametrize("text", ["-1", "NaN", "1.5", "", "1e3", "10 s", "9" * 30])
def test_row_50_a_timeout_that_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameter):
        read_timeout_s(request(x_request_timeout_ms=text), 30)


def test_row_50_a_timeout_of_0_is_past() -> None:
    with pytest.raises(DeadlineExceeded):
        read_timeout_s(request(x_request_timeout_ms="0"), 30)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "image/png"),
        ("", "image/png"),
        ("image/*", "image/png"),
        ("image/webp", "image/webp"),
        ("application/x-npy, */*;q=0.1", "application/x-npy"),
        ("image/png;q=0.2, image/webp;q=0.9", "image/webp"),
        ("image/*, image/png;q=0", "image/webp"),
        ("text/html,image/avif,image/webp,*/*;q=0.8", "image/webp"),
        ("image/gif", None),
        ("image/png;q=0", None),
        ("image/png;q=nan", None),
        ("garbage", None),
    ],
)
def test_the_accept_header_is_negotiated(accept: str, expected: str | None) -> None:
    assert read_accepted(request(accept=accept), OFFERED) == expected


def test_no_accept_header_takes_the_first() -> None:
    assert read_accepted(request(), OFFERED) == "image/png"


def test_openapi_lists_every_parameter_with_its_range() -> None:
    parameters = {entry["name"]: entry for entry in documented(ClassifyParameters)["parameters"]}
    assert list(parameters) == [*ClassifyParameters.model_fields, "X-Request-Timeout-Ms"]
    assert parameters["votes"]["schema"] == {"default": 1, "maximum": 64, "minimum": 1, "type": "integer"}
    assert all(entry["description"] for entry in parameters.values())
    sizes = {entry["name"]: entry for entry in documented(PurifyParameters)["parameters"]}["size"]["schema"]
    assert sizes["enum"] == ["model", "original"]


@pytest.mark.parametrize(
    ("query", "accepted"),
    [
        ("defense=atop,aid&votes=9", False),
        ("defense=aid&votes=64", True),
        ("defense=atop,zeropur&votes=64", False),
        ("defense=aid&votes=8", True),
        ("defense=atop&votes=64", True),
        ("defense=none&votes=64", True),
    ],
)
def test_slow_defenses_take_few_votes(service: Running, query: str, accepted: bool) -> None:
    response = service.client.post(f"/classify?{query}", content=GOOD)
    if accepted:
        assert response.status_code == 200
    else:
        problem = service.refuses(response, 422, "invalid_parameter")
        assert [error["pointer"] for error in problem["errors"]] == ["#/query/votes"]


def test_one_query_serves_every_route_that_runs_a_defense(service: Running) -> None:
    query = "defense=atop&seed=3&votes=4&top_k=2&explain=true"
    purified = [service.client.post(f"/purify?{wanted}", content=GOOD) for wanted in (query, "defense=atop&seed=3")]
    assert service.client.post(f"/classify?{query}", content=GOOD).status_code == 200
    assert [response.status_code for response in purified] == [200, 200]
    assert purified[0].content == purified[1].content
    service.refuses(service.client.post("/purify?votes=65", content=GOOD), 422, "invalid_parameter")


def test_short_sound_queries_are_remembered_and_nothing_else() -> None:
    _remembered.cache_clear()
    for query in ("votes=2", "votes=2", "votes=2" + "&" * REMEMBERED_BYTES):
        assert read_parameters(ClassifyParameters, request(query)).votes == 2
    with pytest.raises(InvalidParameter):
        read_parameters(ClassifyParameters, request("votes=65"))
    assert _remembered.cache_info().currsize == 1
    assert isinstance(read_parameters(PurifyParameters, request("votes=2")), PurifyParameters)
