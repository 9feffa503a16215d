"""One request to whichever replica can answer it: where one fails before its first token, to the next; LoRAs are loaded by need."""

import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import httpx

from ptuning.generation.protocol import GenerationRequest, Token
from ptuning.generation.vllm.replicas import Replica, Replicas
from ptuning.generation.vllm.stream import (
    NoSuchLora,
    ReplicaFailed,
    RequestRefused,
    Unwritable,
    body,
    prompt_body,
    prompt_logprobs,
    tokens,
)
from ptuning.methods import Stored

log = logging.getLogger("ptuning.serving.vllm")

_TRIES = 10  # for log probabilities that can be sent

Event = TypeVar("Event")


class NobodyAnswers(Exception):
    """No replica is left to ask.

    Args:
        reason: the last failure; empty: none was asked, because all are down.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class BrokeOff(Exception):
    """The replica failed within the answer.

    Args:
        tokens: that had come.
        reason: why it failed.
    """

    def __init__(self, tokens: int, reason: str):
        super().__init__(reason)
        self.tokens, self.reason = tokens, reason


class VllmClient:
    """Asks vLLM. Made and used in one event loop.

    Args:
        replicas: of which one answers.
        stop_ids: of the base.
        store: the folder that vLLM reads LoRAs from.
        connections: that are kept open.
    """

    def __init__(self, replicas: Replicas, stop_ids: Collection[int], store: Path, connections: int):
        self.replicas, self.stop_ids, self.store = replicas, stop_ids, store
        # The time of a whole answer is the caller's to bound; between two tokens vLLM may well take long.
        self._http = httpx.AsyncClient(
            headers=replicas.headers,
            timeout=httpx.Timeout(None, connect=5.0),
            # An idle connection is given up before vLLM closes it, after 5 s.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections, keepalive_expiry=2.0),
        )

    def answer(self, request: GenerationRequest, stored: Stored) -> AsyncGenerator[Token]:
        """The answer, token by token; closing the iterator frees its place in vLLM.

        Args:
            stored: what it is answered with.

        Raises:
            RequestRefused, NobodyAnswers, BrokeOff.
        """
        posted = body(request, stored, self.stop_ids)
        return self._from_any(stored, lambda url: tokens(self._http, url, posted, request, self.stop_ids))

    async def prompt_logprobs(self, ids: list[int], stored: Stored) -> list[float]:
        """How likely each token is after those before it: S - 1 log probabilities for S tokens; arguments and errors as
        `answer`."""

        async def ask(url: str) -> AsyncGenerator[list[float]]:
            # What stands where a prefix's tokens have none is memory that nothing was written into. Where that is NaN vLLM can't
            # send it. Asking for another number of them takes other memory.
            for count in range(1, _TRIES + 1):
                posted = prompt_body(ids, stored, uuid.uuid4().hex, count)
                try:
                    yield await prompt_logprobs(self._http, url, posted, ids)
                    return
                except Unwritable:
                    if count == _TRIES:
                        raise

        async with aclosing(self._from_any(stored, ask)) as answer:
            return await anext(answer)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _from_any(self, stored: Stored, ask: Callable[[str], AsyncGenerator[Event]]) -> AsyncGenerator[Event]:
        """Asks one replica after the other until one has begun to answer."""
        tried: list[Replica] = []
        sent, reason = 0, ""
        while (replica := self.replicas.choose(stored.prefix or stored.lora, tried)) is not None:
            tried.append(replica)
            try:
                async with aclosing(self._from_one(replica, stored, ask)) as events:
                    async for event in events:
                        sent += 1
                        yield event
                return
            except RequestRefused as error:
                log.error("vLLM refuses a request", extra={"fields": {"url": replica.url, "reason": str(error)}})
                raise
            except ReplicaFailed as error:
                reason = f"{replica.url}: {error}"
                log.warning("vLLM failed", extra={"fields": {"url": replica.url, "reason": str(error), "tokens": sent}})
                if isinstance(error.__cause__, httpx.TransportError):
                    self.replicas.lost(replica)
                if sent:
                    raise BrokeOff(sent, reason) from error
        raise NobodyAnswers(reason)

    async def _from_one(
        self, replica: Replica, stored: Stored, ask: Callable[[str], AsyncGenerator[Event]]
    ) -> AsyncGenerator[Event]:
        replica.running += 1
        try:
            for again in (True, False):
                try:
                    async with aclosing(ask(replica.url)) as events:
                        async for event in events:
                            yield event
                    return
                except NoSuchLora as error:
                    if not again:
                        raise ReplicaFailed(str(error)) from error
                    await self._load_lora(replica, stored.lora)
        finally:
            replica.running -= 1

    async def _load_lora(self, replica: Replica, name: str) -> None:
        """Has a replica load a LoRA, which it has to be allowed to (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)."""
        asked = {"lora_name": name, "lora_path": str((self.store / name).absolute())}
        try:
            reply = await self._http.post(f"{replica.url}/v1/load_lora_adapter", json=asked)
        except httpx.HTTPError as error:
            raise ReplicaFailed(repr(error)) from error
        if reply.status_code != 200 and "already" not in reply.text:
            raise ReplicaFailed(f"LoRA {name} can't be loaded: HTTP {reply.status_code}: {reply.text[:500]}")
