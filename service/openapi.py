"""What OpenAPI says about the routes whose query, body and errors we read and answer ourselves."""

from __future__ import annotations

from typing import Any

from service.errors import PROBLEM_JSON, ClientLeft, pages
from service.parameters import Parameters
from service.schemas import Problem

BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
IMAGE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "required": ["image"], "properties": {"image": BINARY}}},
        **{f"image/{kind}": {"schema": BINARY} for kind in ("jpeg", "png", "webp", "bmp")},
        "application/octet-stream": {"schema": BINARY},
    },
}
IMAGES_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "items": BINARY}},
            }
        }
    },
}


def documented(kind: type[Parameters], body: dict[str, Any] = IMAGE_BODY) -> dict[str, Any]:
    """Query and body of a route."""
    return {"parameters": _parameters(kind), "requestBody": body}


def _parameters(kind: type[Parameters]) -> list[dict[str, Any]]:
    schema = kind.model_json_schema()
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": field.pop("description", ""),
            "schema": {key: value for key, value in field.items() if key != "title"},
        }
        for name, field in schema.get("properties", {}).items()
    ]


def problem_response(description: str) -> dict[str, Any]:
    """A response that is a problem."""
    return {"description": description, "content": {PROBLEM_JSON: {}}, "model": Problem}


def problems() -> dict[int | str, dict[str, Any]]:
    """Every status that can be a problem, and the problems it can be."""
    titles: dict[int | str, list[str]] = {}
    for slug, (status, title, _) in sorted(pages().items(), key=lambda page: (page[1][0], page[0])):
        if status != ClientLeft.status:
            titles.setdefault(status, []).append(f"{title} (`{slug}`)")
    return {status: problem_response("; ".join(of_status)) for status, of_status in titles.items()}
