"""What all routes share of HTTP: bodies read within limits and checked, and errors sent.

A body is JSON whatever its content type says. Errors have OpenAI's shape, on the REST routes the REST contract's.
"""

import asyncio
import codecs
import time
from collections.abc import Collection
from typing import Any, Literal, TypeVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from ptuning.families import Template
from ptuning.serving.errors import ApiError

BODY_LIMIT = 1 << 20  # bytes; the longest prompt that any context takes is far below
BODY_SECONDS = 30.0  # for the whole body, so that a client that dawdles holds nothing for long

Schema = TypeVar("Schema", bound=BaseModel)


async def read_body(request: Request, schema: type[Schema]) -> Schema:
    """The body as an object of the schema.

    Raises:
        ApiError: too large (413), too slow (408), not JSON, or not what the schema says (400).
    """
    try:
        content = await asyncio.wait_for(_read_within_limit(request), BODY_SECONDS)
    except TimeoutError:
        raise ApiError(408, f"the body didn't arrive within {BODY_SECONDS:g} s", "body_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away before its body had arrived", "client_gone") from None
    try:
        return schema.model_validate_json(content.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise _invalid(error) from None


async def _read_within_limit(request: Request) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > BODY_LIMIT:
        raise _too_large(int(announced))
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > BODY_LIMIT:
            raise _too_large(len(content))
    return bytes(content)


def _too_large(size: int) -> ApiError:
    return ApiError(413, f"the body has {size} bytes or more, the limit is {BODY_LIMIT}; shorten it", "body_too_large")


def rest_routes(template: Template) -> tuple[str, ...]:
    """Where the REST contract is spoken: "/" and the base's own route."""
    return ("/", template.route) if template.route else ("/",)


def with_id(error: ApiError, request: Request) -> ApiError:
    """An error of the server's with the request's id, by which its log line is found; a client's own mistake as it is."""
    number = getattr(request.state, "id", None)
    if error.status < 500 or number is None:
        return error
    message = f"{error.message} (request {number})"
    return ApiError(error.status, message, error.code, error.param, error.kind, error.headers)


def error_response(error: ApiError, path: str, rest: Collection[str]) -> JSONResponse:
    """What a client gets on a route.

    Args:
        rest: routes of the REST contract.
    """
    content = error.body()
    if path in rest:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        content = {"response": "", "history": [], "status": error.status, "time": now, "error": error.message}
    return JSONResponse(content, error.status, error.headers)


def described(schema: type[BaseModel], streams: bool = False) -> dict[str, Any]:
    """`openapi_extra` of a route that reads this schema.

    Args:
        streams: whether it may answer with server-sent events.
    """
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    events = {"text/event-stream": {"schema": {"type": "string"}}} if streams else {}
    return {"requestBody": {"required": True, "content": content}, "responses": {"200": {"content": events}}}


def components(*schemas: type[BaseModel]) -> dict[str, Any]:
    """The schemas, and those inside them, for the OpenAPI description."""
    modes: list[tuple[type[BaseModel], Literal["validation"]]] = [(schema, "validation") for schema in schemas]
    return models_json_schema(modes, ref_template="#/components/schemas/{model}")[1].get("$defs", {})


def _invalid(error: ValidationError) -> ApiError:
    """All that is wrong with a body, in one message that names each field."""
    problems = error.errors(include_url=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON in UTF-8: {problems[0]['msg']}", "invalid_json")
    texts = list(dict.fromkeys(_sentence(problem) for problem in problems))
    field = texts[0].partition(":")[0]
    more = f"; and {len(texts) - 3} more" if len(texts) > 3 else ""
    unknown = problems[0]["type"] == "extra_forbidden"
    code = "unsupported_parameter" if unknown else "invalid_value"
    return ApiError(400, "; ".join(texts[:3]) + more, code, None if field == "body" else field)


def _place(loc: tuple) -> str:
    """("messages", 0, "content") → messages[0].content. Names of union members and functions are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "float", "int", "bool"):
            text += f".{part}" if text else part
    return text


def _sentence(problem: ErrorDetails) -> str:
    place = _place(problem["loc"]) or "body"
    if problem["type"] == "extra_forbidden":
        return f"{place}: not supported by this server; leave it out"
    if problem["type"] == "missing":
        return f"{place}: missing"
    text = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"] and problem["type"] == "value_error":
        return text  # from a check of several fields, which names the one at fault
    value = problem["input"]
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return f"{place}: {text} (got {shown if len(shown) <= 40 else shown[:39] + '…'})"
