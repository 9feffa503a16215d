"""Work divided among the processes, and its results brought together in order."""

from collections.abc import Callable, Sequence

from accelerate import PartialState
from accelerate.utils import gather_object

from ptuning.data.encode import EncodedRow
from ptuning.distributed import anywhere, most_anywhere
from ptuning.evaluation.generate import Answer, GenerationOptions, generate_answers
from ptuning.evaluation.losses import answer_losses, number_of_batches
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer

_LOSS_TOKENS = 4096  # of a batch: each label brings fp32 logits over the vocabulary, 0.26 MB with ChatGLM2-6B's


def my_share(items: Sequence) -> Sequence:
    """Every n-th item, n being the number of processes."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def shared_answers(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    rows: Sequence[EncodedRow],
    options: GenerationOptions,
    say: Callable[[str], None],
) -> list[Answer]:
    """One answer a row, in the rows' order, on every process."""
    mine = my_share(range(len(rows)))
    prompts = [rows[index] for index in mine]
    found = generate_answers(model, tokenizer, prompts, options, numbers=mine, say=say, anywhere=anywhere)
    answers = dict(gather_object([(mine[answer.index], answer) for answer in found]))
    return [answers[index] for index in range(len(rows))]


def shared_losses(
    model: ChatGLMForConditionalGeneration, rows: Sequence[EncodedRow], pad_token_id: int
) -> list[tuple[float, int]]:
    """(summed loss, tokens) of each row's labels, in the rows' order, on every process."""
    mine = my_share(range(len(rows)))
    share = [rows[index] for index in mine]
    calls = most_anywhere(number_of_batches(share, _LOSS_TOKENS))
    found = answer_losses(model, share, pad_token_id, _LOSS_TOKENS, calls, rows[0])
    losses = dict(gather_object(list(zip(mine, found, strict=True))))
    return [losses[index] for index in range(len(rows))]
