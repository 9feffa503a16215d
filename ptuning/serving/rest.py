"""The REST contract of the official api.py, as deployed clients know it: POST / and the base's own route, such as /chatglm."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ptuning.families import Dialogue
from ptuning.generation import GenerationRequest
from ptuning.serving.answering import DROPPED, Services, ask, find, sampling_params, while_connected
from ptuning.serving.bodies import described, read_body, rest_routes


def _none_if_empty(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


# "" and null both mean the default: deployed clients send empty strings.
Optional = BeforeValidator(_none_if_empty)
Turn = Annotated[list[str], Field(min_length=2, max_length=2)]


class RestRequest(BaseModel):
    """POST / and the base's own route. As in the official api.py numbers may come as text, and unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    prompt: Annotated[str, Field(strict=True, description="the newest question")]
    history: Annotated[list[Turn] | None, Optional] = Field(None, description="[[question, answer], …], oldest first")
    max_length: Annotated[Annotated[int, Field(ge=1, le=2**31)] | None, Optional] = Field(
        None, description="of prompt and answer together, in tokens; default: the model's context"
    )
    top_p: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Optional] = Field(
        None, description="default: the model's own"
    )
    temperature: Annotated[Annotated[float, Field(ge=0, le=2)] | None, Optional] = Field(
        None, description="0 is greedy; default: the model's own"
    )
    model: Annotated[str | None, Optional] = Field(
        None, description="a prefix's name, or base; default: --default_model"
    )


def router(services: Services) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    async def answer(request: Request) -> JSONResponse:
        """One answer, and the history with it."""
        body = await read_body(request, RestRequest)
        served = find(services, request, body.model)
        history = [(asked, answered) for asked, answered in body.history or ()]
        dialogue = Dialogue(body.prompt, tuple(history), source_prefix=served.source_prefix)
        prompt = services.prompts.chat(dialogue, max_length=body.max_length)
        request.state.prompt = body.prompt
        rule = sampling_params(services.backend.template, body.temperature, body.top_p)
        wanted = GenerationRequest(0, prompt.ids, prompt.max_new_tokens, rule)
        asked = ask(services, request, served, [wanted], prompt.stops, strip=True)
        (piece,) = await while_connected(request, asked, asked.whole())
        request.state.answer = piece.text
        content = {
            "response": piece.text,
            "history": [*(list(turn) for turn in history), [body.prompt, piece.text]],
            "status": 200,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        return JSONResponse(content, headers={DROPPED: str(prompt.dropped)} if prompt.dropped else None)

    for path in rest_routes(services.backend.template):
        name = path.strip("/") or "root"
        routes.post(path, openapi_extra=described(RestRequest), operation_id=name)(answer)
    return routes
