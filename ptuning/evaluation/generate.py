"""Answers for many prompts, longest first: the engine's running batch, or transformers' beam search in batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ptuning.data.encode import EncodedRow
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.generation import GREEDY, OFFICIAL, Engine, Prefix, Request
from ptuning.generation.memory import inference, is_out_of_memory, ran_out
from ptuning.methods.prefix.attach import prefix_of


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
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    rows: Sequence[EncodedRow],
    options: GenerationOptions,
    *,
    numbers: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
    anywhere: Callable[[bool], bool] = bool,
) -> Iterator[Answer]:
    """Answers the prompts, longest first, so that a batch that doesn't fit fails at once and not at the end.

    Args:
        rows: prompts; their labels aren't used.
        numbers: of the rows in the whole data set, for the seeds; default: their places here.
        say: gets a sentence when the batch is made smaller because memory ran out.
        anywhere: whether any process still has work. Under ZeRO-3 all gather each layer together, so that one that is
            done goes on with forward calls for nobody.

    Yields:
        One answer a row, in the order they are done.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    was_training = model.training
    model.eval()
    try:
        if options.num_beams > 1:
            yield from _with_beams(model, tokenizer, rows, order, options, say, anywhere)
        else:
            yield from _with_engine(model, tokenizer, rows, order, options, numbers or range(len(rows)), say, anywhere)
    finally:
        model.train(was_training)


def _with_engine(model, tokenizer, rows, order, options, numbers, say, anywhere) -> Iterator[Answer]:
    encoder, prefix = prefix_of(model), None
    if encoder is not None:
        prefix = Prefix.of("tuned", encoder, model.dtype)
    tokens: dict[int, list[int]] = {index: [] for index in order}
    with Engine(model, tokenizer.eos_token_id, batch_tokens=options.batch_tokens, notify=say) as engine:
        for index in order:
            ids = rows[index].input_ids
            sampling = replace(OFFICIAL, seed=options.seed * 1_000_003 + numbers[index]) if options.sample else GREEDY
            engine.add(Request(index, ids, options.new_tokens(len(ids)), sampling, prefix))
        while anywhere(engine.has_work):
            if not engine.has_work:
                engine.idle_step()
            for event in engine.step():
                if event.token is not None:
                    tokens[event.id].append(event.token)
                if event.finish is not None:
                    answer = tokens.pop(event.id)
                    yield Answer(event.id, tokenizer.decode(answer).strip(), len(answer), event.finish == "stop")


def _with_beams(model, tokenizer, rows, order, options, say, anywhere) -> Iterator[Answer]:
    """Batches that stay together: which row a beam belongs to is the search's own affair."""
    prefix_length = prefix_of(model).pre_seq_len if prefix_of(model) is not None else 0
    budget, waiting = options.batch_tokens, list(order)
    while anywhere(bool(waiting)):
        if not waiting:
            _beam_batch(model, tokenizer, [[tokenizer.eos_token_id]], 1, options.num_beams)
            continue
        longest = len(rows[waiting[0]].input_ids)
        limit = options.new_tokens(longest)
        room = options.num_beams * (prefix_length + longest + limit)
        indices = waiting[: max(budget // room, 1)]
        try:
            outputs = _beam_batch(model, tokenizer, [rows[i].input_ids for i in indices], limit, options.num_beams)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(indices) == 1:
                raise
            budget = len(indices) * room // 2
            say(ran_out(len(indices), budget))
            continue
        del waiting[: len(indices)]
        for index, ids in zip(indices, outputs, strict=True):
            finished = tokenizer.eos_token_id in ids
            answer = ids[: ids.index(tokenizer.eos_token_id)] if finished else ids
            yield Answer(index, tokenizer.decode(answer).strip(), len(answer), finished)


def _beam_batch(model, tokenizer, prompts, max_new_tokens, num_beams) -> list[list[int]]:
    encoded = tokenizer.pad({"input_ids": prompts}, padding=True, return_tensors="pt").to(model.device)
    with inference():
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return output[:, encoded["input_ids"].shape[1] :].tolist()
