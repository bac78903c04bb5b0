"""One shape for every error, and a page for every type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.entropy import Entropy
from service.errors import ClarifierError, InvalidParameter, Overloaded, RateLimited
from service.problems import answer_of, classes, pages, problem_of
from service.record import new_record
from service.schemas import ParameterProblem
from tests.service.conftest import Running

README = Path(__file__).parents[2] / "service" / "README.md"


def test_every_error_has_its_page() -> None:
    for error in classes():
        status, title, paragraph = pages()[error.code.replace("_", "-")]
        assert (status, title) == (error.status, error.title)
        assert len(paragraph) > 20


def test_every_page_is_served(service: Running) -> None:
    for slug, (status, title, _) in pages().items():
        response = service.client.get(f"/problems/{slug}")
        assert service.client.get(f"/problems/{slug.replace('-', '_')}").text == response.text  # as the code is written
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/html")
        assert f"{status}: " in response.text
        assert title.split("'")[0] in response.text


def test_a_problem_has_the_members_of_the_contract_and_no_empty_ones() -> None:
    problem = problem_of(Overloaded("4 of 4", limit=4), "id-1").model_dump(exclude_none=True)
    assert problem == {
        "type": "/problems/queue-full",
        "title": "the queue is full, try again shortly",
        "status": 429,
        "detail": "4 of 4",
        "code": "queue_full",
        "request_id": "id-1",
        "limit": 4,
    }
    error = ParameterProblem(pointer="#/query/x", detail="is odd")
    assert problem_of(InvalidParameter("x", errors=[error]), "i").errors == [error]


@pytest.mark.parametrize(("error", "least"), [(Overloaded(), 1), (RateLimited(retry_after_s=40.7), 41)])
def test_whoever_may_come_again_is_told_when_and_not_all_at_once(error: ClarifierError, least: int) -> None:
    scope = {"type": "http", "path": "/classify", "clarifier.record": new_record("", Entropy())}
    told = {int(answer_of(error, scope).headers["retry-after"]) for _ in range(200)}
    assert told == {least, least + 1, least + 2}


def test_a_problem_without_a_detail_repeats_its_title() -> None:
    assert problem_of(Overloaded(), "i").detail == Overloaded.title


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/problems/nothing", 404, "not_found"),
        ("POST", "/../../etc/passwd", 404, "not_found"),
        ("GET", "/classify", 405, "method_not_allowed"),
        ("DELETE", "/models", 405, "method_not_allowed"),
        ("OPTIONS", "/classify", 405, "method_not_allowed"),
        ("POST", "/livez", 405, "method_not_allowed"),
    ],
)
def test_errors_of_the_framework_have_the_same_shape(
    service: Running, method: str, path: str, status: int, code: str
) -> None:
    response = service.client.request(method, path)
    service.refuses(response, status, code)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("path", "methods"), [("/classify", "POST"), ("/jobs/1", "DELETE, GET"), ("/livez", "GET, HEAD")]
)
def test_a_refusal_of_a_method_names_every_other(service: Running, path: str, methods: str) -> None:
    assert service.client.request("PATCH", path).headers["allow"] == methods


def test_an_unforeseen_error_is_500_and_says_nothing(
    service: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("canary")

    with monkeypatch.context() as patch:
        patch.setattr("service.routes.ask", fail)
        response = service.client.post("/classify", content=b"x", headers={"x-request-id": "mine"})
    service.refuses(response, 500, "internal_server_error")
    assert response.headers["x-request-id"] == "mine"
    assert "canary" not in response.text
    assert "canary" in caplog.text  # the stack is in the log
    labels = {"route": "/classify", "model": "", "defense": "", "status": "500"}
    assert service.metric("clarifier_requests_total", **labels) == 1


def test_the_documentation_lists_every_code_with_its_status() -> None:
    text = README.read_text()
    for slug, (status, _, _) in pages().items():
        assert re.search(rf"\| {status} \|.*`{slug.replace('-', '_')}`", text), slug
