"""One request to vLLM's token endpoint: its body, and the tokens or log probabilities in what comes back."""

import json
import math
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Any

import httpx

from ptuning.generation.protocol import GenerationRequest, SamplingParams, Token
from ptuning.methods import Stored

ENDPOINT = "/inference/v1/generate"  # with --enable-scale-out
_NO_JSON = "not JSON compliant"  # Python's words for NaN
_LEAST_TOP_P = 1e-9  # vLLM refuses 0, which means the likeliest token alone


class ReplicaFailed(Exception):
    """This replica can't answer, and another may."""


class RequestRefused(Exception):
    """vLLM finds the request wrong, as every replica would."""


class Unwritable(ReplicaFailed):
    """Log probabilities among which vLLM has one that JSON can't write."""


class NoSuchLora(Exception):
    """This replica hasn't loaded the LoRA yet."""


def body(request: GenerationRequest, stored: Stored, stop_ids: Collection[int]) -> dict[str, Any]:
    """What is posted.

    Args:
        stored: what it is answered with.
        stop_ids: of the base.
    """
    # Placeholders are id 0, whatever the prefix: penalties that look at the prompt would else count them as words.
    made: dict[str, Any] = {
        "token_ids": [0] * stored.length + list(request.ids),
        "sampling_params": _sampling(request.sampling)
        | {"max_tokens": request.max_new_tokens, "stop_token_ids": sorted(stop_ids), "detokenize": False}
        | ({} if request.logprobs is None else {"logprobs": request.logprobs}),
        "stream": True,
    }
    # Without the salt vLLM would take the blocks that another prefix has computed for the same placeholders.
    return made | _named(stored, stored.prefix)


def prompt_body(ids: list[int], stored: Stored, salt: str, count: int) -> dict[str, Any]:
    """What is posted for the log probabilities of a prompt.

    Args:
        stored: what it is put to.
        salt: that no other request has. vLLM computes nothing for tokens whose blocks it has in its cache, and a prefix
            makes it look there: those of the same question, or of the model's own answer, would have no log probability.
        count: log probabilities a token, beside its own.
    """
    made: dict[str, Any] = {
        "token_ids": [0] * stored.length + ids,
        "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": count, "detokenize": False},
        "stream": False,
    }
    return made | _named(stored, f"{stored.prefix}.{salt}")


def _named(stored: Stored, salt: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    if stored.prefix:
        named["kv_transfer_params"] = {"prefix": stored.prefix, "length": stored.length}
        named["cache_salt"] = salt
    if stored.lora:
        named["model"] = stored.lora
    return named


def _sampling(rule: SamplingParams) -> dict[str, Any]:
    return {
        "temperature": rule.temperature,
        "top_p": max(rule.top_p, _LEAST_TOP_P),
        "top_k": rule.top_k,
        "seed": None if rule.seed is None else rule.seed % 2**63,
        "frequency_penalty": rule.frequency_penalty,
        "presence_penalty": rule.presence_penalty,
        "min_p": rule.min_p,
        "repetition_penalty": rule.repetition_penalty,
    }


async def tokens(
    client: httpx.AsyncClient, url: str, posted: dict[str, Any], request: GenerationRequest, stop_ids: Collection[int]
) -> AsyncGenerator[Token]:
    """The answer, token by token; closing the iterator frees its place in vLLM.

    Args:
        url: of the replica.
        posted: of `body`.

    Raises:
        ReplicaFailed, RequestRefused, NoSuchLora.
    """
    done = False
    try:
        async with client.stream("POST", url + ENDPOINT, json=posted) as reply:
            if reply.status_code != 200:
                raise _problem(
                    reply.status_code, (await reply.aread())[:500].decode(errors="replace"), "model" in posted
                )
            async for line in reply.aiter_lines():
                if done or not line.startswith("data: {"):
                    continue  # read to its end, so that the connection can be used again
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    raise ReplicaFailed(f"vLLM reports {data['error']}")
                for choice in data["choices"]:
                    for token in _tokens(choice, request, stop_ids):
                        yield token
                        done = token.finish is not None
    except httpx.HTTPError as error:
        if not done:
            raise ReplicaFailed(repr(error)) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ReplicaFailed(f"an event that isn't vLLM's: {error!r}") from error
    if not done:
        raise ReplicaFailed("the answer broke off")


async def prompt_logprobs(
    client: httpx.AsyncClient, url: str, posted: dict[str, Any], ids: Sequence[int]
) -> list[float]:
    """The log probability of each token of a prompt after those before it, S - 1 of S tokens.

    Args:
        url: of the replica.
        posted: of `prompt_body`.
        ids: the prompt's own, without placeholders.

    Raises:
        ReplicaFailed (Unwritable), RequestRefused, NoSuchLora.
    """
    try:
        reply = await client.post(url + ENDPOINT, json=posted)
        if reply.status_code != 200:
            raise _problem(reply.status_code, reply.text[:500], "model" in posted)
        entries = reply.json()["prompt_logprobs"]
        if len(entries) != len(posted["token_ids"]):
            raise ValueError(f"{len(entries)} log probabilities for {len(posted['token_ids'])} tokens")
        # Those of the placeholders are memory that nothing was written into.
        own = entries[len(entries) - len(ids) + 1 :]
        found = [float(entry[str(token)]["logprob"]) for entry, token in zip(own, ids[1:], strict=True)]
        if not all(math.isfinite(value) for value in found):
            raise ValueError("a log probability that is no number")
        return found
    except httpx.HTTPError as error:
        raise ReplicaFailed(repr(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReplicaFailed(f"log probabilities that aren't vLLM's: {error!r}") from error


def _problem(status: int, text: str, with_lora: bool) -> Exception:
    if status == 404 and with_lora:
        return NoSuchLora(text)
    said = f"HTTP {status}: {text}"
    if _NO_JSON in text:
        return Unwritable(said)
    return RequestRefused(said) if status in (400, 413, 422) else ReplicaFailed(said)


def _tokens(choice: dict[str, Any], request: GenerationRequest, stop_ids: Collection[int]) -> list[Token]:
    ids, finish = list(choice.get("token_ids") or ()), choice.get("finish_reason")
    if finish not in (None, "stop", "length"):
        raise ReplicaFailed(f"vLLM ended the answer: {finish}")
    reports = (choice.get("logprobs") or {}).get("content") or []
    made = []
    for place, token in enumerate(ids):
        last = finish if place == len(ids) - 1 else None
        report: dict[str, Any] = {}
        if request.logprobs is not None:
            top = reports[place]["top_logprobs"][: request.logprobs]
            report = {
                "logprob": reports[place]["logprob"],
                "top": tuple((one["token_id"], one["logprob"]) for one in top),
            }
        made.append(Token(request.id, None if token in stop_ids else token, last, **report))
    if finish is not None and not ids:
        made.append(Token(request.id, None, finish))
    return made
