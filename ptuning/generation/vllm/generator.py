"""Many requests to vLLM at once, from code that isn't asynchronous: a Generator, and log probabilities of given texts."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

from ptuning.errors import ConfigError, GenerationError
from ptuning.generation.protocol import GenerationRequest, Token
from ptuning.generation.vllm.client import BrokeOff, NobodyAnswers, VllmClient
from ptuning.generation.vllm.replicas import Replicas
from ptuning.generation.vllm.stream import RequestRefused
from ptuning.methods import Stored

TOGETHER = 64  # requests that each vLLM has at a time

Event = TypeVar("Event")
_Ask = Callable[[VllmClient], AsyncGenerator[Event]]


class VllmGenerator:
    """Answers by vLLM.

    Args:
        replicas: of which each request takes one.
        stop_ids: of the base.
        store: the folder that vLLM reads prefixes and LoRAs from.
        stored: what all requests are answered with.
        most: vLLM's --max-model-len.
    """

    def __init__(self, replicas: Replicas, stop_ids: Collection[int], store: Path, stored: Stored, most: int):
        self.replicas, self.stop_ids, self.store, self.stored, self.most = replicas, stop_ids, store, stored, most

    def __enter__(self) -> "VllmGenerator":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open between two calls."""

    def submit(self, requests: Iterable[GenerationRequest], anywhere: Callable[[bool], bool] = bool) -> Iterator[Token]:
        """As `Generator.submit`; no process waits for another.

        Raises:
            ConfigError: a request is longer than vLLM takes.
            GenerationError: vLLM refuses one, or fails.
        """
        asked = list(requests)
        self._check_lengths((len(request.ids), request.max_new_tokens) for request in asked)
        return self._together([_answer(request, self.stored) for request in asked])

    def prompt_logprobs(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """For each prompt of S tokens S - 1 log probabilities; errors as `submit`."""
        self._check_lengths((len(ids), 1) for ids in prompts)
        found = self._together([_logprobs(index, ids, self.stored) for index, ids in enumerate(prompts)])
        return [logprobs for _, logprobs in sorted(found)]

    def _check_lengths(self, lengths: Iterable[tuple[int, int]]) -> None:
        prompt, new = max(lengths, key=sum, default=(0, 0))
        needed = self.stored.length + prompt + new
        if needed > self.most:
            prefix = f"prefix of {self.stored.length}, " if self.stored.length else ""
            raise ConfigError(
                f"--vllm_url: the longest row needs {needed} positions ({prefix}{prompt} tokens, {new} new ones), and vLLM was "
                f"started with --max-model-len {self.most}; start it with --max-model-len {needed}, or lower "
                "--max_source_length and --max_target_length"
            )

    def _together(self, asks: Sequence[_Ask[Event]]) -> Iterator[Event]:
        """The events of all, in the order they come; the event loop goes on only while the next one is waited for."""
        with asyncio.Runner() as runner:
            found: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
            tasks: list[asyncio.Task] = []

            async def begin() -> VllmClient:
                connections = TOGETHER * len(self.replicas.all)
                client = VllmClient(self.replicas, self.stop_ids, self.store, connections)
                free = asyncio.Semaphore(connections)
                tasks.extend(asyncio.create_task(_fill(found, ask(client), free)) for ask in asks)
                return client

            async def end() -> None:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await client.aclose()

            client, left = runner.run(begin()), len(asks)
            try:
                while left:
                    event = runner.run(found.get())
                    if isinstance(event, BaseException):
                        raise event
                    if event is None:
                        left -= 1
                    else:
                        yield event
            finally:
                runner.run(end())


def _answer(request: GenerationRequest, stored: Stored) -> _Ask[Token]:
    return lambda client: client.answer(request, stored)


def _logprobs(index: int, ids: list[int], stored: Stored) -> _Ask[tuple[int, list[float]]]:
    async def ask(client: VllmClient) -> AsyncGenerator[tuple[int, list[float]]]:
        yield index, await client.prompt_logprobs(ids, stored)

    return ask


async def _fill(found: asyncio.Queue, asked: AsyncGenerator, free: asyncio.Semaphore) -> None:
    """Puts one request's events into the queue, then None; or why there are none."""
    try:
        async with free, aclosing(asked) as events:
            async for event in events:
                found.put_nowait(event)
        found.put_nowait(None)
    except RequestRefused as error:
        found.put_nowait(GenerationError(f"vLLM refuses a request: {error}"))
    except BrokeOff as error:
        found.put_nowait(GenerationError(f"vLLM failed within an answer: {error.reason}; {_GO_ON}"))
    except NobodyAnswers as error:
        why = f"no vLLM can answer: {error.reason}" if error.reason else "vLLM is down"
        found.put_nowait(GenerationError(f"{why}; {_GO_ON}"))
    except Exception as error:  # the program's own; raised where it is waited for
        found.put_nowait(error)


_GO_ON = "when it is back, the same command goes on where this one was"
