"""How every error is answered: in one shape (RFC 9457 problem+json), the framework's (404, 405, ...) too.

Below /v2 the same errors have the shape of the Open Inference Protocol.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from inspect import cleandoc

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.errors import ClarifierError
from service.record import record_of
from service.schemas import Problem

PROBLEM_JSON = "application/problem+json"
OIP = "/v2"
"""Where the Open Inference Protocol is spoken."""
OIP_TYPES = "application/json, application/octet-stream"
PAGES_OF_THE_FRAMEWORK = {
    400: "The request is not well-formed HTTP.",
    404: "There is nothing at this address. GET /docs lists the routes.",
    405: "The route exists but not for this method; the Allow header lists those it has.",
    500: "The service failed in a way nobody foresaw. The request id finds the log line.",
}


def classes(base: type[ClarifierError] = ClarifierError) -> Iterator[type[ClarifierError]]:
    """Every error class below `base`."""
    for child in base.__subclasses__():
        yield child
        yield from classes(child)


def pages() -> dict[str, tuple[int, str, str]]:
    """Slug to status, title and paragraph of every problem type that an answer can name."""
    ours = {_slug(cls.code): (cls.status, cls.title, cleandoc(cls.__doc__ or "")) for cls in classes()}
    theirs = {
        _slug(_framework_code(status)): (status, HTTPStatus(status).phrase.lower(), paragraph)
        for status, paragraph in PAGES_OF_THE_FRAMEWORK.items()
    }
    return ours | theirs


def problem_of(error: ClarifierError, request_id: str) -> Problem:
    """What a client reads about `error`."""
    return Problem(
        type=f"/problems/{_slug(error.code)}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        code=error.code,
        request_id=request_id,
        limit=error.limit,
        actual=error.actual,
        errors=error.errors,
    )


def install_handlers(app: FastAPI) -> None:
    """Answer every error of `app`, ours and the framework's, as problem+json."""
    app.add_exception_handler(ClarifierError, _answer_ours)
    app.add_exception_handler(HTTPException, _answer_framework)
    app.add_exception_handler(RequestValidationError, _answer_framework)
    app.add_exception_handler(Exception, _answer_unforeseen)


async def _answer_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, ClarifierError)
    return answer_of(error, request.scope)


def answer_of(error: ClarifierError, scope: Scope) -> Response:
    """The answer to the request of `scope`, whose record is told the problem's code."""
    record = record_of(scope)
    record.code = error.code
    headers = dict(error.headers)
    if error.status in (429, 503) or error.retry_after_s:
        headers["Retry-After"] = str(int(error.retry_after_s) + random.randint(1, 3))
    return _response(problem_of(error, record.request_id), headers, scope)


async def _answer_framework(request: Request, error: Exception) -> Response:
    """404, 405 and the like; anything whose page we don't have is answered as a malformed request (400)."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    status = status if status in PAGES_OF_THE_FRAMEWORK else 400
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if status == 405:
        headers["Allow"] = _allowed(request, headers.get("Allow", ""))
    return _response(_framework_problem(request, status), headers, request.scope)


def _allowed(request: Request, found: str) -> str:
    """The methods of a path: the framework names those of the first of its routes, OpenAPI knows them all."""
    operations = request.app.openapi()["paths"].get(getattr(request.scope.get("route"), "path", ""), {})
    return ", ".join(sorted({*filter(None, found.split(", ")), *map(str.upper, operations)}))


async def _answer_unforeseen(request: Request, error: Exception) -> Response:
    """The stack goes to the log: the server writes it, and then closes the connection."""
    problem = _framework_problem(request, 500)
    return _response(problem, {"X-Request-Id": problem.request_id, "Connection": "close"}, request.scope)


def _framework_problem(request: Request, status: int) -> Problem:
    record = record_of(request.scope)
    record.code = _framework_code(status)
    return Problem(
        type=f"/problems/{_slug(record.code)}",
        title=HTTPStatus(status).phrase.lower(),
        status=status,
        detail=PAGES_OF_THE_FRAMEWORK[status],
        code=record.code,
        request_id=record.request_id,
    )


def _framework_code(status: int) -> str:
    return HTTPStatus(status).name.lower()


def _slug(code: str) -> str:
    return code.replace("_", "-")


def _response(problem: Problem, headers: Mapping[str, str], scope: Scope) -> Response:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if path == OIP or path.startswith(f"{OIP}/"):
        return _oip_response(problem, headers)
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, problem.status, headers=dict(headers), media_type=PROBLEM_JSON)


def _oip_response(problem: Problem, headers: Mapping[str, str]) -> Response:
    """The same in one member, which is all that clients of the protocol read."""
    detail = "" if problem.detail == problem.title else f": {problem.detail}"
    body = to_json({"error": problem.title + detail})
    own = {name: OIP_TYPES if name == "Accept-Post" else value for name, value in headers.items()}
    return Response(body, problem.status, headers=own, media_type="application/json")
