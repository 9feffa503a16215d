"""Predictions written as they come, scored at the end."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ptuning.data.encode import Encoder
from ptuning.data.formats import Record
from ptuning.distributed import anywhere
from ptuning.evaluation.generate import GenerationOptions, generate_answers
from ptuning.evaluation.metrics import row_scores
from ptuning.evaluation.shares import my_share, shared_losses
from ptuning.evaluation.summary import FIGURES, summarise
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.runs.lines import ResumableLines, append, write_lines

_SAMPLED = 16  # numbers of each tensor that go into the digest of a model


def predict(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    records: Sequence[Record],
    encoder: Encoder,
    options: GenerationOptions,
    path: Path,
    say: Callable[[str], None] = print,
    losses: bool = True,
) -> dict:
    """Answers and scores every record.

    Each answer is appended as a JSON line {index, prompt, history, labels, predict, scores, …} to a part file beside
    `path` the moment it is there; a second call for the same model, records and options goes on where the first stopped.
    At the end `path` has all lines in the records' order; the part files stay until `delete_parts`, so that a run that is
    stopped later, while another model answers, needn't repeat these. Under several processes each answers its share, and
    all get the same scores.

    Args:
        path: the JSON lines file.
        say: prints on the main process.
        losses: also compute the references' losses, one more forward pass over the rows.

    Returns:
        The scores of `summary.summarise`.
    """
    state = PartialState()
    settings = dataclasses.replace(options, batch_tokens=0)  # which doesn't change the answers
    lengths, prefix = encoder.lengths, encoder.source_prefix
    parts = ResumableLines(
        path, key_of(model, settings, lengths, prefix, [(r.system, r.prompt, r.history, r.response) for r in records])
    )
    if state.is_main_process:
        parts.discard_others()
    parts.key, done = broadcast_object_list([parts.key, parts.read() if state.is_main_process else None])
    if done:
        say(f"{path.name}: {len(done)} of {len(records)} rows were answered before; going on with the others")
    todo = my_share([index for index in range(len(records)) if index not in done])
    rows, _ = encoder.prompt_rows([records[index] for index in todo])
    answers = generate_answers(model, tokenizer, rows, options, numbers=todo, say=say, anywhere=anywhere)
    mine = []
    bar = tqdm(total=len(rows), desc=path.stem, unit="row", leave=False, disable=not state.is_main_process)
    with parts.open(state.process_index) as file, bar:
        for answer in answers:
            record = records[todo[answer.index]]
            reference = _reference(record.response, tokenizer, encoder, options)
            line = {
                "index": todo[answer.index],
                "prompt": record.prompt,
                "history": record.history,
                "labels": reference,
                "predict": answer.text,
                "scores": row_scores(answer.text, reference),
                "tokens": answer.tokens,
                "finished": answer.finished,
            }
            append(file, line)
            mine.append(line)
            bar.update()
    lines = sorted([*done.values(), *gather_object(mine)], key=lambda line: line["index"])
    if losses:
        # The answer's loss, also where training counts those in the history.
        references, _ = Encoder(encoder.template, lengths, prefix).training_rows(records)
        found = shared_losses(model, references, tokenizer.pad_token_id)
        for line in lines:
            loss, line["loss_tokens"] = found[line["index"]]
            line["loss"] = round(loss, 4)  # batches of other processes differ in the seventh digit
    if state.is_main_process:
        write_lines(path, lines)
    state.wait_for_everyone()
    return summarise(lines)


def _reference(text: str, tokenizer: ChatGLMTokenizer, encoder: Encoder, options: GenerationOptions) -> str:
    if not options.sample:
        return text
    # The official script scores against references cut at max_target_length.
    return tokenizer.decode(tokenizer.encode_text(text)[: encoder.lengths.max_target_length])


def key_of(model: torch.nn.Module, *settings: object) -> str:
    """16 hex digits that change with the weights (some of each tensor, all of a prefix) and the settings.

    Args:
        settings: what `repr` shows of them counts.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, parameter in model.named_parameters():
        numbers = getattr(parameter, "ds_tensor", parameter).detach().flatten()  # under ZeRO-3: this process's share
        if "prefix_encoder" not in name:
            numbers = numbers[:: max(len(numbers) // _SAMPLED, 1)]
        digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


SHOWN = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "chrf", "exact_match", "empty", "cut", "repeating", "answer_loss")


def table(results: dict[str, dict]) -> str:
    """The main scores as a text table, one row a model."""
    width = max(len(name) for name in results)
    labels = [FIGURES[name].label for name in SHOWN]
    lines = [f"{'':{width}}  " + "".join(f"  {label:>8}" for label in [*labels, "rows"])]
    for name, values in results.items():
        cells = [f"{values[metric]:.2f}" if metric in values else "" for metric in SHOWN]
        cells.append(str(values["rows"]))
        widths = [max(len(label), 8) for label in [*labels, "rows"]]
        lines.append(f"{name:{width}}  " + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)
