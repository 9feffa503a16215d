"""Many rows put to the model: its answers to prompts, and how likely it finds answers that are given.

Both are divided among the processes. Answers start with the longest rows, so that a batch that doesn't fit fails at once and not
at the end.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, cast

from ptuning.data.encode import EncodedRow
from ptuning.distributed import anywhere, from_all, place_in_rows
from ptuning.evaluation.model import EvaluatedModel
from ptuning.families import Template
from ptuning.generation import GREEDY, OFFICIAL, GenerationRequest
from ptuning.methods import Companion

Result = TypeVar("Result")


def own_rows(rows: Sequence) -> Sequence:
    """This process's of rows that are divided among all: every n-th, n being the number of processes."""
    place, processes = place_in_rows()
    return rows[place::processes]


def _in_order(own: Sequence[tuple[int, Result]]) -> list[Result]:
    """The results of all processes, ordered by row number; every process must call."""
    return [result for _, result in sorted(from_all(list(own)), key=lambda pair: pair[0])]


class Asked(Protocol):
    """What commands that answer rows are told alike."""

    @property
    def generation_mode(self) -> str: ...

    @property
    def generation_batch_tokens(self) -> int: ...

    @property
    def num_beams(self) -> int: ...


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer.

    Args:
        max_new_tokens: of an answer.
        batch_tokens: rows times tokens (prefix, prompt and answer) decoded together at most.
        num_beams: 1 is greedy.
        sample: the official script's sampling instead of greedy.
        max_length: limit on prompt + answer in tokens, the official script's only limit; overrides max_new_tokens.
        seed: of the sampling; each row draws its own numbers from this and its index.
    """

    max_new_tokens: int
    batch_tokens: int = 16384
    num_beams: int = 1
    sample: bool = False
    max_length: int | None = None
    seed: int = 42

    @classmethod
    def of(cls, asked: Asked, max_source_length: int, max_new_tokens: int, seed: int) -> "GenerationOptions":
        """From the options of a command.

        Args:
            asked: GenerationArguments, or another command's options that have the same.
            max_source_length: tokens of a prompt at most.
        """
        official = asked.generation_mode == "official"
        return cls(
            max_new_tokens=max_new_tokens,
            batch_tokens=asked.generation_batch_tokens,
            num_beams=asked.num_beams,
            sample=official,
            max_length=max_source_length + max_new_tokens + 1 if official else None,
            seed=seed,
        )

    def new_tokens(self, prompt_tokens: int) -> int:
        """The limit for one prompt."""
        return self.max_new_tokens if self.max_length is None else max(self.max_length - prompt_tokens, 1)


@dataclass(frozen=True, slots=True)
class Answer:
    """`index` is the row's place in the input; `finished` says whether the model ended by itself."""

    index: int
    text: str
    tokens: int
    finished: bool


def generate_answers(
    model: EvaluatedModel,
    template: Template,
    rows: Sequence[EncodedRow],
    options: GenerationOptions,
    *,
    numbers: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Answer]:
    """Answers the prompts. All processes must call it, be it without rows: under ZeRO-3 they gather each layer together.

    Args:
        rows: prompts; their labels aren't used.
        numbers: of the rows in the whole data set, for the seeds; default: their places here.
        say: gets a sentence when the batch is made smaller because memory ran out.

    Yields:
        One answer a row, in the order they are done.
    """
    requests = _requests(model.companion(), rows, options, numbers or range(len(rows)))
    tokens: dict[Hashable, list[int]] = {request.id: [] for request in requests}
    with model.answering(template, options.batch_tokens, options.num_beams, say) as generator:
        for event in generator.submit(requests, anywhere):
            if event.token is not None:
                tokens[event.id].append(event.token)
            if event.finish is not None:
                answer, index = tokens.pop(event.id), cast(int, event.id)  # of `_requests`
                yield Answer(index, template.decode(answer).strip(), len(answer), event.finish == "stop")


def all_answers(
    model: EvaluatedModel,
    template: Template,
    rows: Sequence[EncodedRow],
    options: GenerationOptions,
    say: Callable[[str], None] = print,
) -> list[Answer]:
    """One answer a row, in the rows' order, on every process; each process answers its own."""
    own = own_rows(range(len(rows)))
    found = generate_answers(model, template, [rows[index] for index in own], options, numbers=own, say=say)
    return _in_order([(own[answer.index], answer) for answer in found])


def all_losses(model: EvaluatedModel, rows: Sequence[EncodedRow], pad_id: int) -> list[tuple[float, int]]:
    """(summed loss, tokens) of each row's labels, in the rows' order, on every process; each process computes its own."""
    own = own_rows(range(len(rows)))
    found = model.losses([rows[index] for index in own], pad_id, rows[0])
    return _in_order(list(zip(own, found, strict=True)))


def _requests(
    companion: Companion | None, rows: Sequence[EncodedRow], options: GenerationOptions, numbers: Sequence[int]
) -> list[GenerationRequest]:
    """Longest first."""
    requests = []
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids)):
        ids = rows[index].input_ids
        sampling = replace(OFFICIAL, seed=options.seed * 1_000_003 + numbers[index]) if options.sample else GREEDY
        requests.append(GenerationRequest(index, ids, options.new_tokens(len(ids)), sampling, companion))
    return requests
