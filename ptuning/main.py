"""Entry of `python`, `torchrun` and `deepspeed ptuning/main.py`: parse → data → model → train → evaluate; composition only."""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # The launchers put ptuning/ itself on the path, where our `data` or `config` would shadow other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import PreTrainedModel, set_seed

from ptuning import distributed
from ptuning.checkpoint.manifest import Manifest, describe
from ptuning.config import Config, parse
from ptuning.data.encode import IGNORE, Encoder, Lengths
from ptuning.data.formats import Layout
from ptuning.data.load import Split, read_split
from ptuning.data.mix import mixed
from ptuning.data.summary import split_summary
from ptuning.errors import PTuningError
from ptuning.evaluation.best import settle_best, write_best
from ptuning.evaluation.run import Evaluation
from ptuning.loading import load_base, load_tokenizer
from ptuning.methods import Method, attach_checkpoint, defaults_of, method_of, read_checkpoint
from ptuning.report import write_report
from ptuning.training.combinations import check_combinations
from ptuning.training.deepspeed_file import check_deepspeed_file
from ptuning.training.estimate import estimate_run
from ptuning.training.record import outcome, write_data, write_run
from ptuning.training.run import build_trainer, checkpoint_to_resume, train
from ptuning.training.workload import base_dtype


def main(argv: list[str] | None = None) -> int:
    """Runs one command line. Returns the exit status: 0, or 2 for an error that is the input's."""
    try:
        config, notes = parse(
            sys.argv[1:] if argv is None else argv, infer=options_of_checkpoint, prepare=prepare, defaults=defaults_of
        )
        with distributed.session():
            run(config, notes)
    except PTuningError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece, because other processes write too
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run(config: Config, notes: list[str] = ()) -> dict[str, dict]:
    """Trains and evaluates as the config says. Returns what metrics.json holds."""
    distributed.start(config.training.deepspeed is not None, config.training.ddp_timeout)
    say = print if config.training.process_index == 0 else _silent
    for note in notes:
        say(f"note: {note}")
    splits = read_data(config)
    for split in splits.values():
        say(split)
    method = method_of(config.model, config.training.do_train)
    check_combinations(config, method)
    must_score = config.training.do_train and settle_best(config)
    data = {name: split.sha256 for name, split in splits.items()}
    resume_from = checkpoint_to_resume(config, data) if config.training.do_train else None

    tokenizer = load_tokenizer(config.model.model_name_or_path)
    train_encoder, eval_encoder = encoders(config, tokenizer)
    rows, summaries = {}, {}
    for name, split in splits.items():
        rows[name], report = (train_encoder if name == "train" else eval_encoder).training_rows(split.records)
        summaries[name] = split_summary(split, rows[name], report)
        say(f"{name}: {report}")

    if config.training.do_train:
        longest = max(len(row.input_ids) for row in rows["train"])
        labels = max(sum(label != IGNORE for label in row.labels) for row in rows["train"])
        estimate = estimate_run(config, method, longest=(longest, labels))
        say(estimate)
        estimate.require_fit()
    with recorded(config, data, summaries, resume_from):
        model = build_model(config, method, say)
        evaluation = Evaluation(config, model, tokenizer, eval_encoder, say)
        score_answers = None
        if must_score:
            score_answers = partial(evaluation.validation_scores, splits["validation"].records)
        trainer = build_trainer(
            config, model, tokenizer, method, rows, manifest_of(config, method, model.dtype), score_answers
        )
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
    if config.training.do_train and method.keeps_base:
        command, folder = Path(sys.executable).parent / "ptuning", config.training.output_dir
        say(f"Next: {command} chat --ptuning_checkpoint {folder}")
        say(f"      {command} serve --model {config.model.model_name_or_path} --prefix {Path(folder).name}={folder}")
    return results


@contextlib.contextmanager
def recorded(
    config: Config, data: dict[str, str], summaries: dict[str, dict], resume_from: str | None
) -> Iterator[None]:
    """Leaves options, versions, data, outcome and report.html in the run's folder, also after an error or Ctrl-C."""
    args = config.training
    if not args.should_save:
        yield
        return
    folder = Path(args.output_dir)
    write_run(folder, config.to_dict(), data, args.world_size, resume_from, trains=args.do_train)
    write_data(folder, summaries)
    try:
        with outcome(folder):
            yield
    finally:
        try:
            print(f"Report: {write_report(folder)}")
        except Exception as error:  # a report that fails must not hide why the run did
            print(f"note: no report was written: {error!r}", file=sys.stderr)


def prepare(argv: list[str]) -> None:
    """What must happen before TrainingArguments are made: a readable DeepSpeed file, the environment of the process group."""
    check_deepspeed_file(argv)
    distributed.prepare(argv)


def options_of_checkpoint(checkpoint: str) -> list[str]:
    """What a tuned checkpoint knows about its own use, as options that any given flag overrides."""
    manifest = read_checkpoint(checkpoint)
    if manifest is None:
        return []
    known = {
        "--model_name_or_path": manifest.base.name_or_path,
        "--max_source_length": manifest.max_source_length,
        "--max_target_length": manifest.max_target_length,
        "--source_prefix": manifest.source_prefix,
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
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        source_prefix=data.source_prefix,
        loss_on=data.loss_on,
    )


def build_model(config: Config, method: Method | None, say) -> PreTrainedModel:
    """The base, with the checkpoint's weights on it where one is given, ready to train where that is asked for."""
    args, training = config.model, config.training
    set_seed(training.seed)  # what a method adds is random before it is trained
    model = load_base(
        args.model_name_or_path,
        dtype=base_dtype(args.dtype, method, training.do_train),
        device=training.device,
        attn_implementation=args.attn_implementation,
    )
    if args.ptuning_checkpoint is not None:
        attach_checkpoint(model, args.ptuning_checkpoint, args.model_name_or_path)
    if training.do_train:
        method.start(model)
        if args.ptuning_checkpoint is not None:
            say(
                f"Starting a new run from the {method.noun} in {args.ptuning_checkpoint} (to continue a run: "
                "--resume_from_checkpoint)"
            )
    return model


if __name__ == "__main__":
    sys.exit(main())
