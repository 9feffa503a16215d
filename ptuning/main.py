"""Entry of `python`, `torchrun` and `deepspeed ptuning/main.py`: parse → data → model → train → evaluate; composition only."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # The launchers put ptuning/ itself on the path, where our `data` or `config` would shadow other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from transformers import set_seed

from ptuning.checkpoint import describe_full, describe_prefix, read_prefix
from ptuning.config import Config, parse
from ptuning.data.encode import IGNORE, Encoder, Lengths
from ptuning.data.load import Split, read_split
from ptuning.data.records import Columns
from ptuning.errors import PTuningError
from ptuning.evaluation.generate import GenerationOptions
from ptuning.evaluation.predict import predict, table
from ptuning.loading import attach_checkpoint, load_base, load_tokenizer
from ptuning.training import distributed
from ptuning.training.combinations import check_combinations
from ptuning.training.deepspeed_file import check_deepspeed_file
from ptuning.training.estimate import estimate_run
from ptuning.training.run import build_trainer, checkpoint_to_resume, train


def main(argv: list[str] | None = None) -> int:
    """Runs one command line. Returns the exit status: 0, or 2 for an error that is the input's."""
    try:
        config, notes = parse(sys.argv[1:] if argv is None else argv, infer=options_of_checkpoint, prepare=prepare)
        with distributed.session():
            run(config, notes)
    except PTuningError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece, because other processes write too
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run(config: Config, notes: list[str] = ()) -> dict[str, dict[str, float]]:
    """Trains and evaluates as the config says. Returns the scores of each evaluated model."""
    distributed.start(config.training.deepspeed is not None, config.training.ddp_timeout)
    say = print if config.training.process_index == 0 else _silent
    for note in notes:
        say(f"note: {note}")
    splits = read_data(config)
    for split in splits.values():
        say(split)
    check_combinations(config)
    data = {name: split.sha256 for name, split in splits.items()}
    resume_from = checkpoint_to_resume(config, data) if config.training.do_train else None

    tokenizer = load_tokenizer(config.model.model_name_or_path)
    train_encoder, eval_encoder = encoders(config, tokenizer)
    rows = {}
    for name, encoder in (("train", train_encoder), ("validation", eval_encoder)):
        if name in splits:
            rows[name], report = encoder.training_rows(splits[name].records)
            say(f"{name}: {report}")

    if config.training.do_train:
        longest = max(len(row.input_ids) for row in rows["train"])
        labels = max(sum(label != IGNORE for label in row.labels) for row in rows["train"])
        estimate = estimate_run(config, longest=(longest, labels))
        say(estimate)
        estimate.require_fit()
    model = build_model(config, say)
    if model.prefix_encoder is not None:
        description = describe_prefix(model, config.model.model_name_or_path, **description_of(config))
    else:
        description = describe_full(config.model.model_name_or_path, **description_of(config))
    trainer = build_trainer(config, model, tokenizer, rows, description)
    results = {}
    if (
        config.training.do_train
        and config.generation.baseline
        and config.training.do_predict
        and model.prefix_encoder is None
    ):
        results |= score_answers(config, model, tokenizer, splits["test"].records, eval_encoder, say, trained=False)
    if config.training.do_train:
        train(config, trainer, data, resume_from, say)
        say(
            f"Saved the tuned {'prefix' if model.prefix_encoder is not None else 'model'} in {config.training.output_dir}"
        )
    if config.training.do_eval and "validation" in rows:
        results["validation"] = trainer.evaluate()
        say("Validation: loss {eval_loss:.4f}, perplexity {eval_perplexity:.2f}".format(**results["validation"]))
    if config.training.do_predict or (config.training.do_eval and config.generation.predict_with_generate):
        trainer.prepare_for_evaluation()
        split = splits["test" if config.training.do_predict else "validation"]
        scores = score_answers(config, model, tokenizer, split.records, eval_encoder, say)
        results |= scores
        say(table({name: values for name, values in results.items() if name != "validation"}))
    if results and config.training.should_save:
        path = Path(config.training.output_dir) / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        say(f"Wrote {path} and the predictions beside it")
    if config.training.do_train and model.prefix_encoder is not None:
        say(f"Next: {Path(sys.executable).parent}/ptuning chat --ptuning_checkpoint {config.training.output_dir}")
    return results


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
    columns = Columns(data.prompt_column, data.response_column, data.history_column)
    wanted = {}
    if training.do_train:
        wanted["train"] = (data.train_file, data.max_train_samples)
    if data.validation_file and (training.do_train or training.do_eval):
        wanted["validation"] = (data.validation_file, data.max_eval_samples)
    if training.do_predict:
        wanted["test"] = (data.prediction_file, data.max_predict_samples)
    return {
        name: read_split(name, file, columns, limit, data.skip_invalid_rows) for name, (file, limit) in wanted.items()
    }


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


def score_answers(
    config: Config, model, tokenizer, records, encoder: Encoder, say, trained: bool = True
) -> dict[str, dict[str, float]]:
    """Generates and scores; with --baseline also without the prefix.

    Args:
        trained: False before the training of this run has begun.
    """
    settings, data, training = config.generation, config.data, config.training
    official = settings.generation_mode == "official"
    options = GenerationOptions(
        max_new_tokens=data.eval_target_length,
        batch_size=training.per_device_eval_batch_size,
        num_beams=settings.num_beams,
        sample=official,
        max_length=data.max_source_length + data.eval_target_length + 1 if official else None,
        seed=training.seed,
    )
    folder = Path(training.output_dir)
    results = {}
    if settings.baseline and model.prefix_encoder is not None:
        encoder_off = model.detach_prefix()
        say(f"Answering {len(records)} rows with the untuned base")
        path = folder / "predictions_base.jsonl"
        results["base"] = predict(model, tokenizer, records, encoder, options, path)
        model.attach_encoder(encoder_off)
    name = "base" if model.prefix_encoder is None and not (training.do_train and trained) else "tuned"
    say(f"Answering {len(records)} rows with the {'tuned model' if name == 'tuned' else 'model'}")
    path = folder / ("predictions.jsonl" if name == "tuned" else "predictions_base.jsonl")
    results[name] = predict(model, tokenizer, records, encoder, options, path)
    return results


def description_of(config: Config) -> dict:
    """What a prefix checkpoint says about how it was trained."""
    data = config.data
    return {
        "max_source_length": data.max_source_length,
        "max_target_length": data.max_target_length,
        "source_prefix": data.source_prefix,
        "loss_on": data.loss_on,
    }


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
