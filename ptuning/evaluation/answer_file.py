"""`ptuning predict`: answers to the questions of a file, without references and scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ptuning.config import DataArguments, GenerationArguments, ModelArguments, TuningArguments
from ptuning.config.commands import option, parse_options, same_option
from ptuning.config.engine import VLLM, VLLM_KEY, check_engine
from ptuning.config.ranges import check_values
from ptuning.data.encode import Encoder, Lengths
from ptuning.data.formats import Record
from ptuning.data.guess import FormatOptions
from ptuning.data.splits import load_split
from ptuning.distributed import join
from ptuning.errors import ConfigError
from ptuning.evaluation.answers import Answer, GenerationOptions
from ptuning.evaluation.model import EvaluatedModel, LocalModel, connect
from ptuning.evaluation.predictions import answered_lines
from ptuning.families import Template
from ptuning.loading import computed_dtype, load_base, load_template
from ptuning.messages import message, silent
from ptuning.methods import attach_checkpoint, base_of, read_checkpoint
from ptuning.quantization import asked_precision, choose_kernels
from ptuning.runs.lines import ResumableLines, delete_parts, write_lines

_ABOUT = (
    "Answers every question of a file with the batching engine. Stopped and started again, it goes on where it was; under "
    "torchrun the rows are divided among the processes."
)
_NEW_TOKENS = 512  # where no checkpoint says how long its answers were


@dataclass(frozen=True)
class PredictOptions:
    """Which questions, which model, and how it answers."""

    file: str = option(
        ..., "the questions; a format of training data, whose answers need not be there", aliases=("--test_file",)
    )
    output: str = option(..., "JSON lines: index, prompt, predict, tokens, finished")
    ptuning_checkpoint: str | None = option(None, "a tuned prefix")
    model_name_or_path: str | None = option(None, "default: the base that the checkpoint names")
    prompt_column: str | None = same_option(DataArguments, "prompt_column")
    history_column: str | None = same_option(DataArguments, "history_column")
    data_format: str = same_option(DataArguments, "data_format")
    source_prefix: str | None = option(None, "text in front of every question; default: the checkpoint's")
    max_source_length: int | None = option(None, "tokens of a prompt; default: the checkpoint's, else 1024")
    max_target_length: int | None = option(
        None, f"tokens of an answer; default: the checkpoint's, else {_NEW_TOKENS}", aliases=("--max_new_tokens",)
    )
    max_predict_samples: int | None = same_option(DataArguments, "max_predict_samples")
    skip_invalid_rows: bool = same_option(DataArguments, "skip_invalid_rows")
    generation_mode: str = same_option(GenerationArguments, "generation_mode")
    num_beams: int = same_option(GenerationArguments, "num_beams")
    generation_batch_tokens: int = same_option(GenerationArguments, "generation_batch_tokens")
    engine: str = same_option(GenerationArguments, "engine")
    vllm_url: tuple[str, ...] | None = same_option(GenerationArguments, "vllm_url", together=True)
    vllm_key: str | None = same_option(GenerationArguments, "vllm_key", env=VLLM_KEY)
    prefix_store: str | None = same_option(GenerationArguments, "prefix_store")
    seed: int = same_option(TuningArguments, "seed")
    dtype: str = same_option(ModelArguments, "dtype")
    device_map: str | None = same_option(ModelArguments, "device_map")
    tensor_parallel: int | None = same_option(ModelArguments, "tensor_parallel")
    quantization_bit: int | None = same_option(ModelArguments, "quantization_bit")
    quantization: str | None = same_option(ModelArguments, "quantization")
    double_quantization: bool = same_option(ModelArguments, "double_quantization")
    cpu_kernels: str = same_option(ModelArguments, "cpu_kernels")
    overwrite: bool = option(False, "write over --output where it is there")

    def __post_init__(self) -> None:
        check_values(vars(self))
        check_engine(self.engine, (self,), needs_store=self.ptuning_checkpoint is not None)


def predict_command(argv: Sequence[str]) -> None:
    """Writes the answers and says where they are.

    Raises:
        ConfigError: an option can't be used, or the output is there.
        DataError: a row can't be used; the message names file, line and fix.
        PTuningError: the model or the checkpoint can't be used.
    """
    options = parse_options(PredictOptions, argv, "ptuning predict", _ABOUT)
    output = Path(options.output)
    asked_precision(options)  # a wrong one is said before anything is read
    join()
    state = PartialState()
    say = print if state.is_main_process else silent
    _check_output(output, options.overwrite)
    base = base_of(options.model_name_or_path, options.ptuning_checkpoint)
    manifest = None if options.ptuning_checkpoint is None else read_checkpoint(options.ptuning_checkpoint)
    columns = FormatOptions(options.data_format, options.prompt_column, None, options.history_column, references=False)
    split = load_split("questions", options.file, columns, options.max_predict_samples, options.skip_invalid_rows)
    say(split)
    source = options.max_source_length or (manifest and manifest.max_source_length) or DataArguments.max_source_length
    target = options.max_target_length or (manifest and manifest.max_target_length) or _NEW_TOKENS
    prefix = (
        options.source_prefix if options.source_prefix is not None else (manifest.source_prefix if manifest else "")
    )
    template = load_template(base)
    prompts, _ = Encoder(template, Lengths(source, target), prefix).prompt_rows(split.records)
    generation = GenerationOptions.of(options, source, target, options.seed)
    model = _model(options, base, template, say)
    same = replace(generation, batch_tokens=0)  # which doesn't change the answers
    key = model.key(same, [row.input_ids for row in prompts])
    lines = answered_lines(model, template, split.records, prompts, generation, ResumableLines(output, key), _line, say)
    if state.is_main_process:
        write_lines(output, lines)
        delete_parts(output)
    say(message("wrote_answers", count=len(lines), file=output))


def _model(options: PredictOptions, base: str, template: Template, say: Callable[[str], None]) -> EvaluatedModel:
    """What answers: vLLM, or a model that is loaded now."""
    if options.engine == VLLM:
        return connect(options, base, options.ptuning_checkpoint, template)
    dtype = computed_dtype(options.dtype, PartialState().device, say)
    model = load_base(
        base,
        dtype=dtype,
        precision=asked_precision(options),
        device_map=options.device_map,
        tensor_parallel=options.tensor_parallel,
    )
    choose_kernels(model, options.cpu_kernels, say)
    if options.ptuning_checkpoint is not None:
        attach_checkpoint(model, options.ptuning_checkpoint, base, say)
    return LocalModel(model)


def _line(record: Record, answer: Answer) -> dict[str, Any]:
    """The question as it was read, and its answer."""
    context: dict[str, Any] = {"history": record.history} if record.history else {}
    if record.system is not None:
        context["system"] = record.system
    return {
        "prompt": record.prompt,
        **context,
        "predict": answer.text,
        "tokens": answer.tokens,
        "finished": answer.finished,
    }


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give a file name, e.g. {output / 'answers.jsonl'}")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output} is there already; give another name, or --overwrite")
