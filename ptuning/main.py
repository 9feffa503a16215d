"""Entry of `python`, `torchrun` and `deepspeed ptuning/main.py`: parse → data → model → train → evaluate; composition only."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # The launchers put ptuning/ itself on the path, where our `data` or `config` would shadow other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from transformers import set_seed

from ptuning.checkpoint import (
    FullDescription,
    PrefixDescription,
    base_fingerprint,
    describe_full,
    describe_prefix,
    read_prefix,
)
from ptuning.config import Config, parse
from ptuning.data.encode import IGNORE, Encoder, Lengths
from ptuning.data.formats import Layout
from ptuning.data.load import Split, read_split
from ptuning.data.mix import mixed
from ptuning.data.summary import split_summary
from ptuning.errors import PTuningError
from ptuning.evaluation.best import settle_best, write_best
from ptuning.evaluation.run import Evaluation
from ptuning.loading import attach_checkpoint, load_base, load_tokenizer
from ptuning.report import write_report
from ptuning import distributed
from ptuning.runs import RunFolder, RunRecord, end_suddenly, exit_status, lock, outcome, terminate_as_interrupt
from ptuning.runs.record import sha256_of_rows
from ptuning.runs.resume import is_finished
from ptuning.training.combinations import check_combinations
from ptuning.training.deepspeed_file import check_deepspeed_file
from ptuning.training.estimate import estimate_run
from ptuning.training.resume import planned_steps
from ptuning.training.run import build_trainer, checkpoint_to_resume, train


def main(argv: list[str] | None = None) -> int:
    """Runs one command line. Returns the exit status: 0, or 2 for an error that is the input's."""
    try:
        config, notes = parse(sys.argv[1:] if argv is None else argv, infer=options_of_checkpoint, prepare=prepare)
        with terminate_as_interrupt(), distributed.session():
            run(config, notes)
    except PTuningError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece, because other processes write too
        return 2
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return exit_status(interrupt)
    return 0


def run(config: Config, notes: list[str] = ()) -> dict[str, dict]:
    """Trains and evaluates as the config says. Returns what metrics.json holds."""
    distributed.start(config.training.deepspeed is not None, config.training.ddp_timeout, end_suddenly)
    with lock(RunFolder(config.training.output_dir)) if config.training.should_save else contextlib.nullcontext():
        return run_alone(config, notes)


def run_alone(config: Config, notes: list[str] = ()) -> dict[str, dict]:
    """The run, once no other one is at work in its folder."""
    say = print if config.training.process_index == 0 else _silent
    for note in notes:
        say(f"note: {note}")
    splits = read_data(config)
    for split in splits.values():
        say(split)
    check_combinations(config)
    must_score = config.training.do_train and settle_best(config)
    data = {name: split.sha256 for name, split in splits.items()}

    tokenizer = load_tokenizer(config.model.model_name_or_path)
    train_encoder, eval_encoder = encoders(config, tokenizer)
    rows, summaries = {}, {}
    for name, split in splits.items():
        rows[name], report = (train_encoder if name == "train" else eval_encoder).training_rows(split.records)
        summaries[name] = split_summary(split, rows[name], report)
        say(f"{name}: {report}")

    record = RunRecord.of_this_process(config.to_dict(), world_size=config.training.world_size, data_sha256=data)
    resume_from = None
    if config.training.do_train:
        base, ids = base_fingerprint(config.model.model_name_or_path), ((r.input_ids, r.labels) for r in rows["train"])
        record = replace(record, rows_sha256=sha256_of_rows(ids), base_fingerprint=base)
        resume_from = checkpoint_to_resume(config, record, say)
        if resume_from and is_finished(Path(resume_from), planned_steps(config.training, len(rows["train"]))):
            say(f"{resume_from} is the end of a finished run; nothing is left to do")
            return {}
        longest = max(len(row.input_ids) for row in rows["train"])
        labels = max(sum(label != IGNORE for label in row.labels) for row in rows["train"])
        estimate = estimate_run(config, longest=(longest, labels))
        say(estimate)
        estimate.require_fit()
    with recorded(config, replace(record, resumed_from=resume_from), summaries):
        model = build_model(config, say)
        evaluation = Evaluation(config, model, tokenizer, eval_encoder, say)
        score_answers = None
        if must_score:
            score_answers = partial(evaluation.validation_scores, splits["validation"].records)
        trainer = build_trainer(config, model, tokenizer, rows, describe(config, model), score_answers)
        test = splits.get("test")
        if test is None and config.training.do_eval and config.generation.predict_with_generate:
            test = splits["validation"]
        if config.training.do_train:
            evaluation.before_training(test and test.records)
            train(config, trainer, resume_from, say)
            if trainer.args.load_best_model_at_end and trainer.args.should_save:
                say(write_best(Path(config.training.output_dir), trainer.state, trainer.args.metric_for_best_model))
        results = {}
        if config.training.do_eval and "validation" in rows:
            found = trainer.evaluate()
            say("Validation: loss {eval_loss:.4f}, perplexity {eval_perplexity:.2f}".format(**found))
            results["validation"] = {
                name: round(found[name], 6) for name in ("eval_loss", "eval_perplexity", "eval_rows")
            }
        if test is not None or config.generation.probe:
            trainer.prepare_for_evaluation()
            evaluation.after_training(test and test.records)
            say(evaluation.summary())
        results |= evaluation.results
        if results:
            say(f"Wrote {evaluation.write(results)} and the predictions beside it")
    if config.training.do_train and model.prefix_encoder is not None:
        command, folder = Path(sys.executable).parent / "ptuning", config.training.output_dir
        say(f"Next: {command} chat --ptuning_checkpoint {folder}")
        say(f"      {command} serve --model {config.model.model_name_or_path} --prefix {Path(folder).name}={folder}")
    return results


@contextlib.contextmanager
def recorded(config: Config, record: RunRecord, summaries: dict[str, dict]) -> Iterator[None]:
    """Leaves options, versions, data, outcome and report.html in the run's folder, also after an error or Ctrl-C."""
    if not config.training.should_save:
        yield
        return
    folder = RunFolder(config.training.output_dir)
    with outcome(folder, then=lambda: print(f"Report: {write_report(folder.path)}")):
        folder.write_record(record, trains=config.training.do_train)
        folder.write_data(summaries)
        yield


def prepare(argv: list[str]) -> None:
    """What must happen before TrainingArguments are made: a readable DeepSpeed file, the environment of the process group."""
    check_deepspeed_file(argv)
    distributed.prepare(argv)


def options_of_checkpoint(checkpoint: str) -> list[str]:
    """What a prefix checkpoint knows about its own use, as options that any given flag overrides."""
    description = read_prefix(checkpoint).description
    if description is None:
        return []
    known = {
        "--model_name_or_path": description.base.name_or_path,
        "--max_source_length": description.max_source_length,
        "--max_target_length": description.max_target_length,
        "--source_prefix": description.source_prefix,
    }
    return [token for flag, value in known.items() if value for token in (flag, str(value))]


def read_data(config: Config) -> dict[str, Split]:
    """Reads and checks every file the run needs, before any model is loaded."""
    data, training = config.data, config.training
    layout = Layout(data.data_format, data.prompt_column, data.response_column, data.history_column)
    wanted = {}
    if training.do_train:
        wanted["train"] = (data.train_file, data.max_train_samples)
    if data.validation_file and (training.do_train or training.do_eval):
        wanted["validation"] = (data.validation_file, data.max_eval_samples)
    if training.do_predict:
        wanted["test"] = (data.prediction_file, data.max_predict_samples)
    splits = {
        name: read_split(name, file, layout, limit, data.skip_invalid_rows) for name, (file, limit) in wanted.items()
    }
    if "train" in splits:
        splits["train"] = mixed(splits["train"], data.mix or (), training.seed, layout, data.skip_invalid_rows)
    return splits


def encoders(config: Config, tokenizer) -> tuple[Encoder, Encoder]:
    """One for training rows, one for evaluation, which may have its own answer length."""
    data = config.data
    training = Lengths(data.max_source_length, data.max_target_length)
    evaluation = Lengths(data.max_source_length, data.eval_target_length)
    return (
        Encoder(tokenizer, training, data.source_prefix, data.loss_on),
        Encoder(tokenizer, evaluation, data.source_prefix, data.loss_on),
    )


def _silent(*_) -> None:
    """Stands for print on all but the first process."""


def describe(config: Config, model) -> PrefixDescription | FullDescription:
    """What a checkpoint says about how it was trained."""
    data = config.data
    how = {
        "max_source_length": data.max_source_length,
        "max_target_length": data.max_target_length,
        "source_prefix": data.source_prefix,
        "loss_on": data.loss_on,
    }
    base = config.model.model_name_or_path
    return describe_full(base, **how) if model.prefix_encoder is None else describe_prefix(model, base, **how)


def build_model(config: Config, say):
    """The base with the prefix of the checkpoint, a new prefix, or none (all weights are tuned)."""
    args, training = config.model, config.training
    set_seed(training.seed)  # the prefix is random before it is trained
    dtype = args.dtype
    if dtype == "auto" and training.do_train and args.pre_seq_len is None and args.ptuning_checkpoint is None:
        dtype = "float32"  # the optimizer's master weights; bf16/fp16 autocast does the computing
    model = load_base(
        args.model_name_or_path, dtype=dtype, device=training.device, attn_implementation=args.attn_implementation
    )
    if args.ptuning_checkpoint is not None:
        attach_checkpoint(
            model, args.ptuning_checkpoint, args.model_name_or_path, args.pre_seq_len, args.prefix_projection or None
        )
        if training.do_train:
            say(
                f"Starting a new run from the prefix in {args.ptuning_checkpoint} (to continue a run: --resume_from_checkpoint)"
            )
    elif args.pre_seq_len is not None:
        model.attach_prefix(args.pre_seq_len, args.prefix_projection)
    if model.prefix_encoder is not None:
        model.prefix_encoder.dropout.p = args.prefix_dropout
    return model


if __name__ == "__main__":
    sys.exit(main())
