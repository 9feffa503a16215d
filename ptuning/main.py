"""Entry of `python`, `torchrun` and `deepspeed ptuning/main.py`: parse → data → model → train → evaluate; composition only."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # The launchers put ptuning/ itself on the path, where our `data` or `config` would shadow other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import ptuning  # noqa: F401  before torch, whose threads it bounds

import torch
from transformers import PreTrainedModel, set_seed

from ptuning import distributed
from ptuning.checkpoint.base import base_fingerprint, resolve_base
from ptuning.checkpoint.manifest import Manifest, describe, read_manifest
from ptuning.config import Config, parse, with_config
from ptuning.config.engine import VLLM
from ptuning.data.encode import Encoder, Lengths
from ptuning.data.encoded import EncodedSplit, encode_split
from ptuning.data.guess import FormatOptions
from ptuning.data.splits import Split, load_split, mixed
from ptuning.errors import ConfigError, PTuningError
from ptuning.evaluation.best import resolve_best_metric, write_best
from ptuning.evaluation.model import EvaluatedModel, LocalModel, connect
from ptuning.evaluation.run import Evaluation, EvaluationSettings, Questions
from ptuning.families import Template, family_of, read_config
from ptuning.kernels import divide_positions, give_loss, swap, swap_to_answer
from ptuning.language import speaking
from ptuning.loading import computed_dtype, load_base, load_template
from ptuning.messages import message, note, silent
from ptuning.methods import (
    Method,
    attach_checkpoint,
    defaults_of,
    method_class,
    method_of,
    method_of_checkpoint,
    read_checkpoint,
)
from ptuning.quantization import asked_precision, choose_kernels
from ptuning.report import write_report
from ptuning.runs import RunFolder, RunRecord, end_suddenly, exit_status, lock, outcome, terminate_as_interrupt
from ptuning.training.checkpointing import choose_checkpointing
from ptuning.training.combinations import check_combinations
from ptuning.training.deepspeed_file import check_deepspeed_file
from ptuning.training.estimate import estimate_run
from ptuning.training.kernels import Kernels, chosen_kernels
from ptuning.training.progress import LiveReport
from ptuning.training.resume import run_to_continue
from ptuning.training.run import build_trainer, checkpoint_to_resume, make_room, train
from ptuning.training.trainer import TuningTrainer
from ptuning.training.workload import base_dtype

Say = Callable[[object], None]


def main(argv: list[str] | None = None) -> int:
    """Runs one command line. Returns the exit status: 0, or 2 for an error that is the input's."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, notes = parse(argv, infer=options_of_checkpoint, prepare=prepare, defaults=defaults_of)
        with terminate_as_interrupt(), distributed.session():
            run(config, notes)
    except PTuningError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece, because other processes write too
        return 2
    except KeyboardInterrupt as interrupt:
        print(message("interrupted"), file=sys.stderr)
        return exit_status(interrupt)
    return 0


def train_command(argv: list[str]) -> int:
    """`ptuning train [RUN.yaml] …`: `main` with --do_train."""
    return main(["--do_train", *with_config(argv)])


def evaluate_command(argv: list[str]) -> int:
    """`ptuning evaluate [RUN] …`: `main` with --do_predict, on the test file of a training run with its columns and lengths."""
    argv = with_config(argv)
    if argv and not argv[0].startswith("-"):
        argv = [*options_of_run(argv[0]), *argv[1:]]
    return main(["--do_predict", *argv])


def run(config: Config, notes: Sequence[str] = ()) -> dict[str, dict]:
    """Trains and evaluates as the config says. Returns what metrics.json holds."""
    training = config.training
    distributed.start(training.deepspeed is not None, training.ddp_timeout, end_suddenly)
    say = print if training.process_index == 0 else silent
    for text in notes:
        say(note(text))
    method = method_of(config.model, training.do_train)
    check_combinations(config, method)
    must_score = training.do_train and resolve_best_metric(training)
    folder = RunFolder(training.output_dir)
    with lock(folder, say) if training.should_save else contextlib.nullcontext():
        if training.do_train:
            make_room(config, folder, delete=False)
        splits = read_data(config)
        for split in splits.values():
            say(split)
        template = load_template(config.model.model_name_or_path)
        encoded = encode(config, template, splits)
        for name, rows_of_split in encoded.items():
            say(message("encoded", name=name, report=rows_of_split.report))
        before = run_to_continue(training) if training.do_train else None
        kernels = chosen_kernels(config, method, before)
        if training.do_train:
            assert method is not None  # of a run that trains
            rows = encoded["train"].rows
            estimate = estimate_run(config, method, rows=(rows.lengths, rows.label_counts), kernels=kernels)
            estimate = choose_checkpointing(training, before, estimate, say)
        record, resume_from = recorded_run(config, method, splits, encoded, kernels), None
        if training.do_train:
            resume_from = checkpoint_to_resume(config, folder, record, rows.lengths, say)
            if resume_from is not None and resume_from.finished:
                return {}
            say(estimate)
            estimate.require_fit()
            if resume_from is None and training.should_save:
                make_room(config, folder, delete=True)
        checkpoint = None if resume_from is None else str(resume_from.checkpoint)
        with recording(config, folder, replace(record, resumed_from=checkpoint), encoded):
            if is_only_asked(config):
                return evaluate(config, method, template, splits, encoded, say)
            return train_and_evaluate(config, method, kernels, template, splits, encoded, must_score, checkpoint, say)


def train_and_evaluate(
    config: Config,
    method: Method | None,
    kernels: Kernels,
    template: Template,
    splits: dict[str, Split],
    encoded: dict[str, EncodedSplit],
    must_score: bool,
    resume_from: str | None,
    say: Say,
) -> dict[str, dict]:
    """From the model to the scores. Returns what metrics.json holds."""
    training = config.training
    model = build_model(config, method, say, kernels)
    evaluation = Evaluation(
        EvaluationSettings.of(config), LocalModel(model), template, encoder_of(config, template, "test"), method, say
    )
    rows = {name: split.rows for name, split in encoded.items()}
    questions = {name: Questions(split.records, rows[name]) for name, split in splits.items()}
    score_answers = partial(evaluation.validation_scores, questions["validation"]) if must_score else None
    manifest = manifest_of(config, method, model.dtype)
    live = LiveReport(partial(write_report, training.output_dir)) if training.should_save else None
    trainer = build_trainer(config, model, template, method, rows, manifest, score_answers, live, kernels)
    test = questions.get("test")
    if test is None and training.do_eval and config.generation.predict_with_generate:
        test = questions["validation"]
    if training.do_train:
        evaluation.before_training(test)
        train(config, trainer, resume_from, say)
        if trainer.args.load_best_model_at_end and trainer.args.should_save:
            say(write_best(Path(training.output_dir), trainer.state, trainer.args.metric_for_best_model))
    results = {}
    if training.do_eval and "validation" in rows:
        results["validation"] = validate(trainer, say)
    if test is not None or config.generation.probe:
        trainer.prepare_for_evaluation()
        if live is not None:
            live.write()  # it takes a while until there is more to show
        evaluation.after_training(test)
        say(evaluation.summary())
    results |= evaluation.results
    if results:
        say(message("results", file=evaluation.write(results)))
    if training.do_train and method is not None:
        base, asked = config.model.model_name_or_path, asked_precision(config.model)
        for line in method.next_commands(base, training.output_dir, asked):
            say(line)
    return results


def is_only_asked(config: Config) -> bool:
    """Whether no trainer has anything to do with the model, because it is elsewhere or divided."""
    model = config.model
    return config.generation.engine == VLLM or model.device_map is not None or model.tensor_parallel is not None


def evaluate(
    config: Config,
    method: Method | None,
    template: Template,
    splits: dict[str, Split],
    encoded: dict[str, EncodedSplit],
    say: Say,
) -> dict[str, dict]:
    """Scores of a model that `is_only_asked`. Returns what metrics.json holds."""
    args = config.model
    model: EvaluatedModel
    if config.generation.engine == VLLM:
        model = connect(config.generation, args.model_name_or_path, args.ptuning_checkpoint, template)
    else:
        model = LocalModel(build_model(config, method, say))
    evaluation = Evaluation(
        EvaluationSettings.of(config), model, template, encoder_of(config, template, "test"), method, say
    )
    evaluation.after_training(Questions(splits["test"].records, encoded["test"].rows))
    say(evaluation.summary())
    say(message("results", file=evaluation.write({})))
    return evaluation.results


def validate(trainer: TuningTrainer, say: Say) -> dict[str, float]:
    """The loss on the validation rows."""
    found = trainer.evaluate()
    say(message("validation", eval_loss=found["eval_loss"], eval_perplexity=found["eval_perplexity"]))
    return {name: round(found[name], 6) for name in ("eval_loss", "eval_perplexity", "eval_rows")}


@contextlib.contextmanager
def recording(config: Config, folder: RunFolder, record: RunRecord, encoded: dict[str, EncodedSplit]) -> Iterator[None]:
    """Leaves options, versions, data, outcome and report.html in the run's folder, also after an error or Ctrl-C."""
    if not config.training.should_save:
        yield
        return
    with outcome(folder, then=lambda: print(message("report", file=write_report(folder.path)))):
        folder.write_record(record, trains=config.training.do_train)
        folder.write_data({name: split.summary for name, split in encoded.items()})
        yield


def recorded_run(
    config: Config, method: Method | None, splits: dict[str, Split], encoded: dict[str, EncodedSplit], kernels: Kernels
) -> RunRecord:
    """What a later run that wants to continue this one is held to."""
    with speaking("en"):  # a file that programs read
        described = "" if method is None else method.describe()
    base = read_config(resolve_base(config.model.model_name_or_path))
    return RunRecord.of_this_process(
        config.to_dict(),
        method=described,
        trained=None if method is None else method.memory(family_of(base).dimensions(base)).trained,
        world_size=config.training.world_size,
        data_sha256={name: split.sha256 for name, split in splits.items()},
        rows_sha256=encoded["train"].rows.sha256 if "train" in encoded else None,
        base_fingerprint=base_fingerprint(config.model.model_name_or_path),
        kernels=kernels.to_dict() if config.training.do_train else {},
    )


def prepare(argv: list[str]) -> None:
    """What must happen before TrainingArguments are made: a readable DeepSpeed file, the environment of the process group."""
    check_deepspeed_file(argv)
    distributed.prepare(argv)


def options_of_checkpoint(checkpoint: str) -> list[str]:
    """What a tuned checkpoint knows about its own use, as options that any given flag overrides."""
    manifest, method = read_checkpoint(checkpoint), ["--method", method_of_checkpoint(checkpoint).name]
    if manifest is None:
        return method
    known = {
        "--model_name_or_path": manifest.base.name_or_path,
        "--max_source_length": manifest.max_source_length,
        "--max_target_length": manifest.max_target_length,
        "--source_prefix": manifest.source_prefix,
    }
    return method + [token for flag, value in known.items() if value for token in (flag, str(value))]


def options_of_run(folder: str) -> list[str]:
    """What evaluating a training run without further words means: its test rows, else its validation rows, into FOLDER-eval.

    Raises:
        ConfigError: no such folder, or no run in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a training run's, or options (ptuning evaluate --help)")
    manifest = read_manifest(path)
    on_base = manifest is None or method_class(manifest.method).keeps_base
    options = ["--ptuning_checkpoint" if on_base else "--model_name_or_path", folder, "--output_dir", f"{path}-eval"]
    recorded = next(
        (found for parent in (path, path.parent) if (found := RunFolder(parent).latest_record().get("config"))), None
    )
    if recorded is None:
        return options  # a prefix from elsewhere: what is missing is asked for as for any evaluation
    file = recorded.get("test_file") or recorded.get("validation_file")
    columns = ("prompt_column", "response_column", "history_column")
    stored = ("quantization_bit", "quantization", "double_quantization")
    known = {name: recorded.get(name) for name in (*columns, "data_format", *stored)}
    for name, value in {"test_file": file, **known}.items():
        values = value if isinstance(value, list) else [value]
        options += [f"--{name}", *map(str, values)] if value else []
    return options


def read_data(config: Config) -> dict[str, Split]:
    """Reads and checks every file the run needs, before any model is loaded."""
    data, training = config.data, config.training
    options = FormatOptions(data.data_format, data.prompt_column, data.response_column, data.history_column)
    limits = {}
    if training.do_train:
        limits["train"] = data.max_train_samples
    # A file that is given is used; a dataset's split only where something asks for it.
    evaluates = training.do_eval or (training.do_train and training.eval_strategy != "no")
    if data.sources("validation") and (evaluates or (training.do_train and data.validation_file)):
        limits["validation"] = data.max_eval_samples
    if training.do_predict:
        limits["test"] = data.max_predict_samples
    reading = {"skip_invalid": data.skip_invalid_rows, "overwrite": data.overwrite_cache}
    splits = {name: load_split(name, data.sources(name), options, limit, **reading) for name, limit in limits.items()}
    if "train" in splits:
        splits["train"] = mixed(splits["train"], data.mix or (), training.seed, options, **reading)
    return splits


def encoder_of(config: Config, template: Template, split: str) -> Encoder:
    """Of training rows, or of evaluation's, which may have their own answer length."""
    data = config.data
    target = data.max_target_length if split == "train" else data.eval_target_length
    return Encoder(template, Lengths(data.max_source_length, target), data.source_prefix, data.loss_on)


def encode(config: Config, template: Template, splits: dict[str, Split]) -> dict[str, EncodedSplit]:
    """Every split as ids and labels, or from the cache."""
    workers, overwrite = config.data.preprocessing_num_workers, config.data.overwrite_cache
    return {
        name: encode_split(split, encoder_of(config, template, name), workers, overwrite)
        for name, split in splits.items()
    }


def manifest_of(config: Config, method: Method | None, dtype: torch.dtype) -> Manifest | None:
    """What a checkpoint says about how it was trained."""
    if method is None or not config.training.do_train:
        return None
    data = config.data
    return describe(
        config.model.model_name_or_path,
        method.name,
        method.settings(),
        dtype=str(dtype).removeprefix("torch."),
        precision=asked_precision(config.model),
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        source_prefix=data.source_prefix,
        loss_on=data.loss_on,
    )


def build_model(config: Config, method: Method | None, say: Say, kernels: Kernels | None = None) -> PreTrainedModel:
    """The base, with the checkpoint's weights on it where one is given, ready to train where that is asked for.

    Args:
        kernels: to train with; default: plain.
    """
    args, training = config.model, config.training
    set_seed(training.seed)  # what a method adds is random before it is trained
    model = load_base(
        args.model_name_or_path,
        dtype=computed_dtype(base_dtype(args.dtype, method, training.do_train), training.device, say),
        device=training.device,
        attn_implementation=args.attn_implementation,
        precision=asked_precision(args),
        device_map=args.device_map,
        tensor_parallel=args.tensor_parallel,
    )
    if not training.do_train:
        choose_kernels(model, args.cpu_kernels, say)
        swap_to_answer(model, training.kernels, say)
    if args.ptuning_checkpoint is not None:
        attach_checkpoint(model, args.ptuning_checkpoint, args.model_name_or_path, say)
    if training.do_train:
        assert method is not None  # of a run that trains
        method.start(model)
        if args.ptuning_checkpoint is not None:
            say(message("start_from", noun=method.noun, folder=args.ptuning_checkpoint))
        if kernels is not None:
            say(kernels)
            if kernels.fast:
                swap(model, kernels.product, kernels.answers)
            elif kernels.gpu_loss is not None:
                give_loss(model, kernels.gpu_loss)
        if training.sequence_parallel is not None:
            divide_positions(model)
    return model


if __name__ == "__main__":
    sys.exit(main())
