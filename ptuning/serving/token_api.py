"""/tokenize and /detokenize, as vLLM has them; and what of OpenAI's this server can't do, refused by name."""

from dataclasses import replace

from fastapi import APIRouter, Request

from ptuning.serving.answering import Services, find
from ptuning.serving.bodies import described, read_body
from ptuning.serving.errors import ApiError
from ptuning.serving.messages import dialogue_from
from ptuning.serving.openai_schema import DetokenizeRequest, TokenizeRequest


def router(services: Services) -> APIRouter:
    """The routes."""
    routes, template = APIRouter(), services.backend.template

    @routes.post("/tokenize", openapi_extra=described(TokenizeRequest))
    async def tokenize(request: Request) -> dict:
        """The tokens of a text, or of messages as the model sees them."""
        body = await read_body(request, TokenizeRequest)
        served = find(services, request, body.model)
        if body.messages is not None:
            dialogue = replace(dialogue_from(body.messages), source_prefix=served.source_prefix)
            ids = services.prompts.chat(dialogue).ids
        else:
            begin = template.begin_ids if body.add_special_tokens else ()
            ids = [*begin, *template.encode_text([body.prompt or ""])[0]]
        texts = (
            [template.token_bytes(token).decode(errors="replace") for token in ids] if body.return_token_strs else None
        )
        return {"count": len(ids), "max_model_len": services.backend.context, "tokens": ids, "token_strs": texts}

    @routes.post("/detokenize", openapi_extra=described(DetokenizeRequest))
    async def detokenize(request: Request) -> dict:
        """The text of tokens."""
        body = await read_body(request, DetokenizeRequest)
        find(services, request, body.model)
        size = len(template.tokenizer)
        if (wrong := next((token for token in body.tokens if token >= size), None)) is not None:
            raise ApiError(400, f"tokens: there is no token {wrong}; the last one is {size - 1}", param="tokens")
        return {"prompt": template.decode(body.tokens)}

    @routes.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> dict:
        """Refused by name, so that nobody looks for a mistake in the address."""
        text = "embeddings: this server answers with text and makes no embeddings; use a server with an embedding model"
        raise ApiError(400, text, "not_supported")

    return routes
