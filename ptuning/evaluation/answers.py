"""Many rows put to the model: its answers to prompts, and how likely it finds answers that are given.

Both are divided among the processes, and start with the longest rows, so that a batch that doesn't fit fails at once and not
at the end.

Shapes: B rows of a batch, S its longest row.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ptuning.data.batch import PadRight
from ptuning.data.encode import IGNORE, EncodedRow
from ptuning.distributed import anywhere, most_anywhere
from ptuning.families import Template
from ptuning.families.logits import label_positions, logits_at, row_losses
from ptuning.generation import GREEDY, OFFICIAL, BeamSearch, Engine, GenerationRequest, Generator
from ptuning.methods import attached

_LOSS_TOKENS = 4096  # of a batch: each label brings fp32 logits over the vocabulary, 0.26 MB with ChatGLM2-6B's

Result = TypeVar("Result")


def own_rows(rows: Sequence) -> Sequence:
    """This process's of rows that are divided among all: every n-th, n being the number of processes."""
    state = PartialState()
    return rows[state.process_index :: state.num_processes]


def _in_order(own: Sequence[tuple[int, Result]]) -> list[Result]:
    """The results of all processes, ordered by row number; every process must call."""
    return [result for _, result in sorted(gather_object(list(own)), key=lambda pair: pair[0])]


# --- answers --------------------------------------------------------------------------------------------------------------


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
    model: PreTrainedModel,
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
    requests = _requests(model, rows, options, numbers or range(len(rows)))
    was_training = model.training
    model.eval()
    try:
        tokens: dict[Hashable, list[int]] = {request.id: [] for request in requests}
        with _generator(model, template, options, say) as generator:
            for event in generator.submit(requests, anywhere):
                if event.token is not None:
                    tokens[event.id].append(event.token)
                if event.finish is not None:
                    answer = tokens.pop(event.id)
                    yield Answer(event.id, template.decode(answer).strip(), len(answer), event.finish == "stop")
    finally:
        model.train(was_training)


def _generator(model: PreTrainedModel, template: Template, options: GenerationOptions, say) -> Generator:
    """The engine's running batch, or transformers' beam search in batches."""
    limits = {"batch_tokens": options.batch_tokens, "notify": say}
    if options.num_beams > 1:
        return BeamSearch(model, template.stop_ids, template.pad_id, num_beams=options.num_beams, **limits)
    return Engine(model, template.stop_ids, **limits)


def all_answers(
    model: PreTrainedModel,
    template: Template,
    rows: Sequence[EncodedRow],
    options: GenerationOptions,
    say: Callable[[str], None] = print,
) -> list[Answer]:
    """One answer a row, in the rows' order, on every process; each process answers its own."""
    own = own_rows(range(len(rows)))
    found = generate_answers(model, template, [rows[index] for index in own], options, numbers=own, say=say)
    return _in_order([(own[answer.index], answer) for answer in found])


def _requests(model, rows, options: GenerationOptions, numbers: Sequence[int]) -> list[GenerationRequest]:
    """Longest first."""
    method = attached(model)
    prefix = None if method is None else method.served(model, "tuned")
    requests = []
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids)):
        ids = rows[index].input_ids
        sampling = replace(OFFICIAL, seed=options.seed * 1_000_003 + numbers[index]) if options.sample else GREEDY
        requests.append(GenerationRequest(index, ids, options.new_tokens(len(ids)), sampling, prefix))
    return requests


# --- losses of given answers ----------------------------------------------------------------------------------------------


def answer_losses(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    pad_id: int,
    batch_tokens: int,
    calls: int = 0,
    filler: EncodedRow | None = None,
) -> list[tuple[float, int]]:
    """Each row's negative log likelihood, summed over its labels, and their number; (0.0, 0) for a row without labels.

    Logits are computed at the labels only, and the logarithm in fp32.

    Args:
        model: or what wraps it under DeepSpeed; its mode is put back afterwards.
        rows: with labels, as `Encoder.training_rows` makes them.
        pad_id: the template's.
        batch_tokens: B * S is at most this, except for a single longer row.
        calls: the model is called at least so often, because under ZeRO-3 all processes gather each layer together.
            Take the most that any process has of `number_of_batches`.
        filler: the row of calls that have no rows left.

    Raises:
        ValueError: calls are left over and there is no filler.
    """
    batches, collate = _batches(rows, batch_tokens), PadRight(pad_id)
    if calls > len(batches) and filler is None:
        raise ValueError(f"{calls} calls for {len(batches)} batches need a filler row")
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    was_training = model.training
    model.eval()
    try:
        # ZeRO-3 keeps gathered weights for training, where inference tensors can't be used.
        with torch.no_grad():
            for batch in batches:
                losses = _batch_losses(model, collate([_item(rows[index]) for index in batch]))
                for index, loss in zip(batch, losses, strict=True):
                    results[index] = (loss, sum(label != IGNORE for label in rows[index].labels[1:]))
            for _ in range(len(batches), calls):
                assert filler is not None
                _batch_losses(model, collate([_item(filler)]))
    finally:
        model.train(was_training)
    return results


def all_losses(model: PreTrainedModel, rows: Sequence[EncodedRow], pad_id: int) -> list[tuple[float, int]]:
    """(summed loss, tokens) of each row's labels, in the rows' order, on every process; each process computes its own."""
    own = own_rows(range(len(rows)))
    chosen = [rows[index] for index in own]
    calls = most_anywhere(number_of_batches(chosen, _LOSS_TOKENS))
    found = answer_losses(model, chosen, pad_id, _LOSS_TOKENS, calls, rows[0])
    return _in_order(list(zip(own, found, strict=True)))


def number_of_batches(rows: Sequence[EncodedRow], batch_tokens: int) -> int:
    """How often `answer_losses` calls the model for these rows."""
    return len(_batches(rows, batch_tokens))


def _batches(rows: Sequence[EncodedRow], batch_tokens: int) -> list[list[int]]:
    """Row numbers. A batch is as wide as its first row, so its size is known beforehand."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    batches, start = [], 0
    while start < len(order):
        size = max(batch_tokens // max(len(rows[order[start]].input_ids), 1), 1)
        batches.append(order[start : start + size])
        start += size
    return batches


def _item(row: EncodedRow) -> dict:
    return {"input_ids": row.input_ids, "labels": row.labels, "row": 0}


def _batch_losses(model, batch: dict[str, torch.Tensor]) -> list[float]:
    """→ B sums."""
    ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
    with logits_at(model, label_positions(labels)):
        logits_NV = model(input_ids=ids, use_cache=False).logits
    return row_losses(logits_NV, labels).tolist()
