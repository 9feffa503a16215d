"""Reads a request's body: limited in size and time, JSON whatever the content type says, checked against a schema."""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect, Request

from ptuning.serving.faults import Fault

LIMIT = 1 << 20  # bytes; the longest prompt that any context takes is far below
SECONDS = 30.0  # for the whole body, so that a client that dawdles holds nothing for long

Schema = TypeVar("Schema", bound=BaseModel)


async def read(request: Request, schema: type[Schema]) -> Schema:
    """The body as an object of the schema.

    Raises:
        Fault: too large (413), too slow (408), not JSON, or not what the schema says (400).
    """
    try:
        content = await asyncio.wait_for(_read(request), SECONDS)
    except TimeoutError:
        raise Fault(408, f"the body didn't arrive within {SECONDS:g} s", "body_timeout") from None
    except ClientDisconnect:
        raise Fault(400, "the client went away before its body had arrived", "client_gone") from None
    try:
        return schema.model_validate_json(content)
    except ValidationError as error:
        raise Fault.of_validation(error) from None


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > LIMIT:
        raise _too_large(int(announced))
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > LIMIT:
            raise _too_large(len(content))
    return bytes(content)


def _too_large(size: int) -> Fault:
    return Fault(413, f"the body has {size} bytes or more, the limit is {LIMIT}; shorten it", "body_too_large")


def described(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads this schema."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def components(*schemas: type[BaseModel]) -> dict[str, Any]:
    """The schemas, and those inside them, for the OpenAPI description."""
    modes = [(schema, "validation") for schema in schemas]
    return models_json_schema(modes, ref_template="#/components/schemas/{model}")[1].get("$defs", {})
