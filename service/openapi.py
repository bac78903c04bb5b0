"""What OpenAPI says about the routes whose query, body and errors we read and answer ourselves."""

from __future__ import annotations

from typing import Any

from service.errors import ClientLeft
from service.oip.messages import ENCODED, PIXELS, InferRequest
from service.parameters import InferParameters, Parameters
from service.problems import PROBLEM_JSON, pages
from service.schemas import Problem

BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
FILES = {"contentType": "image/jpeg, image/png, image/webp, image/bmp"}
IMAGE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": BINARY},
                "additionalProperties": False,
            },
            "encoding": {"image": FILES},
        },
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
                "properties": {"images": {"type": "array", "items": BINARY, "minItems": 1}},
                "additionalProperties": False,
            }
        }
    },
}

TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "Until the answer; it can only shorten the service's own time.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
    "example": 5000,
}
JSON_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Bytes of JSON at the start of the body, where binary tensors follow it.",
    "schema": {"type": "integer", "minimum": 0},
}
PURIFIED_HEADERS = {
    "X-Clarifier-Model": {"schema": {"type": "string"}, "description": "`name@version`"},
    "X-Clarifier-Defense": {"schema": {"type": "string"}, "description": "The canonical chain"},
    "X-Clarifier-Linf": {"schema": {"type": "number"}, "description": "Largest change of a sample, before rounding"},
    "X-Clarifier-Seed": {"schema": {"type": "integer"}, "description": "The seed that was used"},
    "X-Clarifier-Degraded": {
        "schema": {"const": "true"},
        "description": "Only if `auto` ran its cheap chain because the strong one was asked for too often",
    },
}


def documented(kind: type[Parameters], body: dict[str, Any] = IMAGE_BODY) -> dict[str, Any]:
    """Query, deadline and body of a route."""
    return {"parameters": [*_parameters(kind), TIMEOUT], "requestBody": body}


def documented_inference() -> dict[str, Any]:
    """Headers and body of an inference of the Open Inference Protocol."""
    schema = _inlined(InferRequest.model_json_schema())
    members = schema["properties"]
    members["parameters"] = {"anyOf": [_inlined(InferParameters.model_json_schema()), {"type": "null"}]}
    members["inputs"] |= {"minItems": 1, "maxItems": 1}
    members["inputs"]["items"]["properties"] |= {
        "name": {"enum": [ENCODED, PIXELS]},
        "datatype": {"enum": ["BYTES", "FP32"]},
    }
    content = {"application/json": {"schema": schema}, "application/octet-stream": {"schema": BINARY}}
    return {"parameters": [TIMEOUT, JSON_LENGTH], "requestBody": {"required": True, "content": content}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with its definitions in the places that refer to them, since the document has no room for them."""
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inline(definitions[part["$ref"].removeprefix("#/$defs/")])
        return {name: inline(value) for name, value in part.items()}

    inlined: dict[str, Any] = inline(schema)
    return inlined


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
