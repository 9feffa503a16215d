"""What the worker's thread does with answers: begin, step, expire, drop. Nothing here is for any other thread."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from ptuning.errors import GenerationError
from ptuning.generation import Engine, Prefix, Request
from ptuning.serving.backend import BackendError, Refused, TooLate
from ptuning.serving.group import Group, deliver
from ptuning.serving.metrics import Metrics


@dataclass(eq=False)
class _Answer:
    """One that the engine has."""

    group: Group
    index: int
    latest: float  # when its latest token came, at first when it was submitted
    tokens: int = 0

    @property
    def prefix(self) -> Prefix | None:
        return self.group.model.prefix


class Running:
    """The answers that run or wait in the engine.

    Args:
        engine: entered before anything else.
        timeout: seconds that a request may take, waiting included.
        metrics: is told of tokens.
        ended: is called with the seconds that an answer took, whatever ended it.
    """

    def __init__(self, engine: Engine, timeout: float, metrics: Metrics, ended: Callable[[float], None]):
        self.engine, self.timeout, self.metrics, self.ended = engine, timeout, metrics, ended
        self._answers: dict[int, _Answer] = {}
        self._numbers = itertools.count()
        self._retired: set[Prefix] = set()

    def begin(self, group: Group) -> None:
        """Queues a request's jobs."""
        for index, job in enumerate(group.jobs):
            number, prefix = next(self._numbers), group.model.prefix
            self._answers[number] = _Answer(group, index, group.submitted)
            request = Request(number, job.ids, job.max_new_tokens, job.sampling, prefix=prefix, logprobs=job.logprobs)
            try:
                self.engine.add(request)
            except ValueError as error:
                self._refuse(number, Refused(str(error)))
        self.metrics.prompt_tokens(group.model.served.name, sum(len(job.ids) for job in group.jobs))

    def step(self) -> None:
        """One step of the engine; its tokens go to those who wait for them."""
        try:
            tokens = self.engine.step()
        except GenerationError as error:
            self._refuse(error.request, Refused(str(error)))
            return
        now = time.monotonic()
        events: dict[Group, list] = {}
        for token in tokens:
            answer = self._answers[token.id]
            events.setdefault(answer.group, []).append((answer.index, token))
            if token.token is not None:
                self.metrics.token(answer.group.model.served.name, now - answer.latest, first=not answer.tokens)
                answer.tokens, answer.latest = answer.tokens + 1, now
            if token.finish is not None:
                self._end(token.id)
        deliver(events)

    def expire(self) -> None:
        """Ends what has taken too long."""
        now = time.monotonic()
        for number, answer in list(self._answers.items()):
            if now - answer.group.submitted > self.timeout:
                self.engine.cancel(number)
                message = f"not finished within {self.timeout:g} s (--request_timeout); ask for fewer tokens, or later"
                self._refuse(number, TooLate(message))

    def drop(self, group: Group, indices: set[int]) -> None:
        """Takes out answers that nobody wants any more."""
        for number, answer in list(self._answers.items()):
            if answer.group is group and answer.index in indices:
                self.engine.cancel(number)
                self._end(number)

    def retire(self, prefix: Prefix) -> None:
        """Forgets the dialogues of a removed prefix, at the latest when its last answer is done."""
        if any(answer.prefix is prefix for answer in self._answers.values()):
            self._retired.add(prefix)
        else:
            self._retired.discard(prefix)
            self.engine.forget(prefix)

    def fail(self, error: BackendError) -> None:
        """Ends all with an error; the engine isn't touched any more."""
        self._retired.clear()
        for number in list(self._answers):
            self._refuse(number, error)

    def _end(self, number: int) -> None:
        answer = self._answers.pop(number)
        self.ended(time.monotonic() - answer.group.submitted)
        if answer.prefix in self._retired:
            self.retire(answer.prefix)

    def _refuse(self, number: int, error: BackendError) -> None:
        group = self._answers[number].group
        self._end(number)
        deliver({group: [error]})
