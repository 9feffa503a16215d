"""Predictions written as they come, scored at the end."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from ptuning.chatglm.modeling import ChatGLMForConditionalGeneration
from ptuning.chatglm.tokenizer import ChatGLMTokenizer
from ptuning.data.encode import Encoder
from ptuning.data.records import Record
from ptuning.evaluation.generate import GenerationOptions, generate_answers
from ptuning.evaluation.scores import METRICS, mean_scores, score


def predict(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    records: Sequence[Record],
    encoder: Encoder,
    options: GenerationOptions,
    path: Path,
) -> dict[str, float]:
    """Answers and scores every record.

    Each answer is appended as a JSON line {index, prompt, labels, predict, scores, …} to a part file beside `path` the
    moment it is there; at the end `path` has them in the records' order. Under several processes each answers its share,
    and all get the same scores.

    Args:
        path: the JSON lines file.

    Returns:
        Mean bleu-4 and rouge-1/2/l, and counts: rows, empty and unfinished answers, average tokens, seconds.
    """
    state, started = PartialState(), time.perf_counter()
    mine = range(state.process_index, len(records), state.num_processes)
    rows, _ = encoder.prompt_rows([records[i] for i in mine])
    calls, filler = 0, None
    if is_deepspeed_zero3_enabled() and state.num_processes > 1:
        calls = math.ceil(math.ceil(len(records) / state.num_processes) / options.batch_size)
        filler = encoder.prompt_rows(records[:1])[0][0]
    part = path.with_suffix(f".part{state.process_index}")
    part.parent.mkdir(parents=True, exist_ok=True)
    done = []
    bar = tqdm(total=len(rows), desc=path.stem, unit="row", disable=not state.is_main_process)
    with part.open("w", encoding="utf-8") as file, bar:
        for answer in generate_answers(model, tokenizer, rows, options, calls, filler):
            record = records[mine[answer.index]]
            reference = _reference(record.response, tokenizer, encoder, options)
            line = {
                "index": mine[answer.index],
                "prompt": record.prompt,
                "labels": reference,
                "predict": answer.text,
                "scores": score(answer.text, reference),
                "tokens": answer.tokens,
                "finished": answer.finished,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            done.append(line)
            bar.update()
    everything = sorted(gather_object(done), key=lambda line: line["index"])
    if state.is_main_process:
        _write_in_order(path, everything)
    state.wait_for_everyone()
    part.unlink(missing_ok=True)
    means = mean_scores([line["scores"] for line in everything])
    return {metric: means[metric] for metric in METRICS} | {
        "rows": len(everything),
        "empty": sum(not line["predict"] for line in everything),
        "unfinished": sum(not line["finished"] for line in everything),
        "tokens": round(sum(line["tokens"] for line in everything) / max(len(everything), 1), 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _reference(text: str, tokenizer: ChatGLMTokenizer, encoder: Encoder, options: GenerationOptions) -> str:
    if not options.sample:
        return text
    # The official script scores against references cut at max_target_length.
    return tokenizer.decode(tokenizer.encode_text(text)[: encoder.lengths.max_target_length])


def _write_in_order(path: Path, lines: list[dict]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def table(results: dict[str, dict[str, float]]) -> str:
    """The scores as a text table, one row a model."""
    width = max(len(name) for name in results)
    columns = ("BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L", "rows", "empty")
    head = f"{'':{width}}  " + "".join(f"{column:>10}" for column in columns)
    lines = [
        f"{name:{width}}  "
        + "".join(f"{values[metric]:10.2f}" for metric in METRICS)
        + f"{values['rows']:10d}{values['empty']:10d}"
        for name, values in results.items()
    ]
    return "\n".join([head, *lines])
