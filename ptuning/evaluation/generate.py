"""Answers for many prompts: batches of similar length, greedy unless asked otherwise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from ptuning.chatglm.modeling import ChatGLMForConditionalGeneration
from ptuning.chatglm.tokenizer import ChatGLMTokenizer
from ptuning.data.encode import EncodedRow

# What the official ptuning/main.py passes to generate.
OFFICIAL_SAMPLING = {"do_sample": True, "top_p": 0.7, "temperature": 0.95}


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer.

    Args:
        max_new_tokens: of an answer.
        batch_size: rows decoded together.
        num_beams: 1 is greedy.
        sample: the official script's sampling instead of greedy.
        max_length: limit on prompt + answer in tokens, the official script's only limit; overrides max_new_tokens.
        seed: of the sampling.
    """

    max_new_tokens: int
    batch_size: int = 16
    num_beams: int = 1
    sample: bool = False
    max_length: int | None = None
    seed: int = 42


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
    calls: int = 0,
    filler: EncodedRow | None = None,
) -> Iterator[Answer]:
    """Answers the prompts, longest first, so that a batch that doesn't fit fails at once and not at the end.

    Args:
        rows: prompts; their labels aren't used.
        calls: `generate` is called at least so often, because under ZeRO-3 all processes gather each layer together.
        filler: the prompt of calls that have no rows left; their answers are thrown away.

    Yields:
        One answer a row, in the order they are done.
    """
    settings = {"num_beams": options.num_beams, "do_sample": False}
    if options.sample:
        settings |= OFFICIAL_SAMPLING
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), options.batch_size):
            indices = order[start : start + options.batch_size]
            longest = len(rows[indices[0]].input_ids)
            limit = options.max_new_tokens if options.max_length is None else max(options.max_length - longest, 1)
            torch.manual_seed(options.seed + start)
            yield from _batch(model, tokenizer, indices, [rows[i].input_ids for i in indices], limit, settings)
        for _ in range(-(-len(rows) // options.batch_size), calls):
            list(_batch(model, tokenizer, [0], [filler.input_ids], 1, settings))
    finally:
        model.train(was_training)


def _batch(model, tokenizer, indices, prompts, max_new_tokens, settings) -> Iterator[Answer]:
    encoded = tokenizer.pad({"input_ids": prompts}, padding=True, return_tensors="pt").to(model.device)
    # ZeRO-3 keeps gathered weights for training, where inference tensors can't be used.
    with torch.no_grad() if is_deepspeed_zero3_enabled() else torch.inference_mode():
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    for index, ids in zip(indices, output[:, encoded["input_ids"].shape[1] :].tolist(), strict=True):
        finished = tokenizer.eos_token_id in ids
        answer = ids[: ids.index(tokenizer.eos_token_id)] if finished else ids
        yield Answer(index, tokenizer.decode(answer).strip(), len(answer), finished)
