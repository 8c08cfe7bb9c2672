"""Schemas for `/openapi.json`. Requests are parsed by one call into pydantic, without FastAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi_of(form: type[BaseModel]) -> dict[str, Any]:
    """The description of a route whose body has this form."""
    schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    answers = {
        "200": {"description": "the answer", "content": {"application/json": {}, "text/event-stream": {}}},
        "default": {"description": "an error object", "content": {"application/json": {"schema": _ERROR}}},
    }
    body = {"required": True, "content": {"application/json": {"schema": _inline(schema, definitions, ())}}}
    return {"requestBody": body, "responses": answers}


def _inline(schema: Any, definitions: dict[str, Any], within: tuple[str, ...]) -> Any:
    """The schema with references replaced by their definitions; a recursive one becomes an object of any kind."""
    if isinstance(schema, list):
        return [_inline(item, definitions, within) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return {"type": "object"} if name in within else _inline(definitions[name], definitions, (*within, name))
    return {key: _inline(value, definitions, within) for key, value in schema.items()}
