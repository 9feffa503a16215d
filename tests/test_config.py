"""Options: one name for flag and YAML key, no unknown ones, every shipped config usable."""

from pathlib import Path

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ptuning.config import parse
from ptuning.errors import ConfigError
from ptuning.methods import defaults_of, method_of

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DEEPSPEED = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
TRAIN = ["--do_train", "--model_name_or_path", "m", "--train_file", "t.json", "--prompt_column", "q"]
TRAIN += ["--response_column", "a", "--output_dir", "out"]


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"ptuning_demo", "ptuning_official", "ptuning_chat"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_parses(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    given = ["--model_name_or_path", "m", "--train_file", "t.json"] if "\nmodel_name" not in path.read_text() else []
    config, notes = parse(["--config", str(path), *given], defaults=defaults_of)
    assert config.training.do_train and not notes
    methods = {"ptuning": "prefix", "prefix": "prefix", "lora": "lora", "full": "full"}
    (method,) = (methods[word] for word in path.stem.split("_") if word in methods)
    assert config.model.method == method
    batch = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    if method == "full":
        assert config.model.pre_seq_len is None and config.training.save_total_limit == 2
        unset_hf_deepspeed_config()
    else:
        assert (config.model.pre_seq_len or config.model.lora_rank) and batch == 16


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_shipped_deepspeed_files(path):
    """What transformers fills in wrongly where it says "auto", and what makes saved logits exact, is written out."""
    config, _ = parse([*TRAIN, "--deepspeed", str(path), "--learning_rate", "3e-4", "--use_cpu", "true"])
    unset_hf_deepspeed_config()
    values = config.training.hf_deepspeed_config.config
    zero = values["zero_optimization"]
    assert values["optimizer"]["params"]["lr"] == 3e-4 and values["optimizer"]["params"]["torch_adam"] is True
    assert values["bf16"]["enabled"] is False and values["train_micro_batch_size_per_gpu"] == 16
    assert zero["stage"] == int(path.stem[4])
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True and zero["memory_efficient_linear"] is False
    device = {"zero3_offload": "cpu", "zero3_nvme": "nvme"}.get(path.stem)
    for part in ("offload_optimizer", "offload_param"):
        assert zero.get(part, {}).get("device") == device


def test_official_values():
    config, _ = parse(["--config", str(CONFIGS[0].parent / "ptuning_official.yaml"), *TRAIN])
    assert (config.model.pre_seq_len, config.training.learning_rate, config.training.max_steps) == (128, 2e-2, 3000)
    assert (config.data.max_source_length, config.data.max_target_length) == (64, 128)
    assert (config.model.prefix_projection, config.model.prefix_dropout) == (False, 0.1)


def test_flags_override_the_file_and_numbers_may_be_written_as_yaml_strings(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("learning_rate: 2e-2\nmax_steps: 7\ndo_train: true\npre_seq_len: 16\n")
    config, _ = parse(["--config", str(path), *TRAIN, "--max_steps=9"])
    assert config.training.learning_rate == 0.02
    assert config.training.max_steps == 9
    assert config.model.pre_seq_len == 16


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--do_predic"], "unknown option --do_predic; did you mean --do_predict?"),
        ([*TRAIN, "--pre_seq_length", "8"], "unknown option --pre_seq_length; did you mean --pre_seq_len?"),
        ([*TRAIN, "--max_steps", "many"], "invalid int value: 'many'"),
        ([*TRAIN, "--max_st", "3"], "unknown option --max_st"),
        (TRAIN[1:], "nothing to do: give --do_train, --do_eval or --do_predict"),
        (TRAIN[:-2], "--output_dir is missing"),
        ([*TRAIN[:3], *TRAIN[5:]], "--do_train needs --train_file"),
        ([*TRAIN, "--do_predict"], "--do_predict needs --test_file"),
        ([*TRAIN, "--quantization_bit", "3"], "quantization_bit is 3; use 8 or 4, or leave it out"),
        ([*TRAIN, "--load_in_4bit", "true"], "--load_in_4bit is no option here: use --quantization_bit 4"),
        ([*TRAIN, "--label_smoothing_factor", "0.1"], "--label_smoothing_factor is not supported"),
        ([*TRAIN, "--logging_nan_inf_filter", "true"], "--logging_nan_inf_filter hides NaN losses"),
        ([*TRAIN, "--generation_mode", "beam"], "invalid choice: 'beam'"),
        ([*TRAIN, "--baseline"], "--baseline compares answers, and none are generated; add --do_predict"),
        ([*TRAIN, "--baseline_from", "run"], "--baseline_from compares answers, and none are generated"),
        ([*TRAIN, "--do_predict", "--test_file", "t", "--baseline", "--baseline_from", "run"], "give one"),
        ([*TRAIN, "--generation_batch_tokens", "0"], "--generation_batch_tokens is 0; use at least 1024"),
        ([*TRAIN, "--early_stopping_patience", "2"], "--early_stopping_patience needs --validation_file"),
        ([*TRAIN, "--resume_from_checkpoint", "true", "--ptuning_checkpoint", "x"], "give one"),
        (["--config"], "--config needs a file"),
        (["--config", "configs/ptuning_dmeo.yaml"], "configs/ptuning_dmeo.yaml: no such file"),
    ],
)
def test_refused(argv, text):
    with pytest.raises(ConfigError) as error:
        parse(argv)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("flags", "method", "rate", "notes"),
    [
        (
            [],
            "prefix of 128",
            2e-2,
            ["--learning_rate 0.02 (default of --method prefix)", "--pre_seq_len 128 (default of --method prefix)"],
        ),
        (["--pre_seq_len", "64", "--learning_rate", "5e-3"], "prefix of 64", 5e-3, []),
        (
            ["--method", "prefix", "--prefix_projection", "--learning_rate", "5e-3"],
            "prefix of 128 with projection",
            5e-3,
            ["--pre_seq_len 128 (default of --method prefix)"],
        ),
        (["--method", "full"], "all weights", 1e-4, ["--learning_rate 0.0001 (default of --method full)"]),
        (["--method=prefix", "--method=full", "--learning_rate=3e-4"], "all weights", 3e-4, []),
    ],
)
def test_what_is_tuned_is_decided_once_and_defaults_are_said(flags, method, rate, notes):
    config, said = parse([*TRAIN, *flags], defaults=defaults_of)
    assert method_of(config.model, trains=True).describe() == method
    assert (config.training.learning_rate, said) == (rate, notes)


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ([], "full"),
        (["--pre_seq_len", "8"], "prefix"),
        (["--method", "prefix"], "prefix"),
        (["--method", "full"], "full"),
    ],
)
def test_the_shape_of_the_official_deepspeed_script_means_all_weights(flags, method):
    argv = [*TRAIN, "--deepspeed", str(DEEPSPEED[0]), "--use_cpu", "true", *flags]
    config, notes = parse(argv, defaults=defaults_of)
    unset_hf_deepspeed_config()
    assert config.model.method == method
    why = "--deepspeed without --pre_seq_len tunes all weights, as the official script does (--method full)"
    assert (why in notes) == (not flags)


def test_a_checkpoint_to_go_on_from_brings_its_own_length():
    config, notes = parse([*TRAIN, "--ptuning_checkpoint", "x"], defaults=defaults_of)
    assert (config.model.method, config.model.pre_seq_len) == ("prefix", None)
    assert notes == ["--learning_rate 0.02 (default of --method prefix)"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--method", "ia3"], "--method ia3: no such method; there are full, lora, prefix"),
        (["--method", "lora", "--lora_rank", "0"], "--lora_rank is 0; use at least 1 (usual: 8 to 64)"),
        (
            ["--method", "lora", "--lora_alpha", "0"],
            "--lora_alpha is 0; use more than 0 (usual: 2 to 4 times --lora_rank)",
        ),
        (["--method", "lora", "--lora_alpha", "nan"], "--lora_alpha is nan; use more than 0"),
        (
            ["--method", "lora", "--lora_dropout", "1"],
            "--lora_dropout is 1; use 0 up to, not including, 1 (usual: 0 to 0.1)",
        ),
        (
            ["--method", "lora", "--lora_init", "pissa"],
            "--lora_init pissa: use one of default, gaussian, orthogonal (pissa",
        ),
        (["--method", "lora", "--pre_seq_len", "8"], "--pre_seq_len is for --method prefix, and --method is lora"),
        (
            ["--method", "lora", "--prefix_dropout", "0"],
            "--prefix_dropout is for --method prefix, and --method is lora",
        ),
        (["--lora_rank", "8"], "--lora_rank is for --method lora, and --method is prefix; leave one of them out"),
        (["--lora_dropout", "0.1"], "--lora_dropout is for --method lora, and --method is prefix"),
        (["--use_dora"], "--use_dora is for --method lora, and --method is prefix"),
        (["--method", "full", "--lora_target", "all"], "--lora_target is for --method lora, and --method is full"),
        (["--pre_seq_len", "0"], "--pre_seq_len is 0; use at least 1 (official: 128)"),
        (["--prefix_dropout", "1"], "--prefix_dropout is 1.0; use 0 up to, not including, 1"),
        (["--method", "full", "--pre_seq_len", "8"], "--pre_seq_len is for --method prefix, and --method is full"),
        (
            ["--method", "full", "--prefix_projection"],
            "--prefix_projection is for --method prefix, and --method is full",
        ),
        (
            ["--method", "full", "--prefix_dropout", "0"],
            "--prefix_dropout is for --method prefix, and --method is full",
        ),
        (
            ["--method", "full", "--ptuning_checkpoint", "x"],
            "--ptuning_checkpoint with --method full: what is tuned is",
        ),
    ],
)
def test_methods_refuse_what_they_cannot_use(flags, text):
    with pytest.raises(ConfigError) as error:
        method_of(parse([*TRAIN, *flags], defaults=defaults_of)[0].model, trains=True)
    assert text in str(error.value)


@pytest.mark.parametrize("flags", [["--pre_seq_len", "8"], ["--prefix_projection"], ["--prefix_dropout", "0"]])
def test_what_to_train_without_training_is_refused(flags):
    config, notes = parse(["--do_predict", "--test_file", "t", *TRAIN[1:], *flags], defaults=defaults_of)
    assert (notes, config.model.method) == ([], None)
    with pytest.raises(
        ConfigError, match=f"{flags[0]} says what to train, and without --do_train nothing is; to evaluate"
    ):
        method_of(config.model, trains=False)


def test_evaluating_alone_tunes_nothing():
    config, _ = parse(["--do_predict", "--test_file", "t", *TRAIN[1:]], defaults=defaults_of)
    assert method_of(config.model, trains=False) is None


def test_yaml_that_is_no_mapping(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("- do_train\n")
    with pytest.raises(ConfigError, match="expected 'option: value' lines, found list"):
        parse(["--config", str(path)])
    path.write_text("do_train: [\n")
    with pytest.raises(ConfigError, match="can't be read as YAML"):
        parse(["--config", str(path)])
    near = tmp_path / "y.yaml"
    with pytest.raises(ConfigError, match=r"did you mean .*x\.yaml"):
        parse(["--config", str(near)])


def test_flags_of_the_official_scripts_that_have_nothing_left_to_do_are_named():
    config, notes = parse([*TRAIN, "--pre_seq_len", "8", "--use_fast_tokenizer", "true", "--max_steps", "5"])
    assert config.training.max_steps == 5
    assert [note.split()[0] for note in notes] == ["--use_fast_tokenizer"]


def test_a_validation_file_is_evaluated_whenever_a_checkpoint_is_due():
    config, _ = parse([*TRAIN, "--validation_file", "v.json", "--save_steps", "250"])
    assert (config.training.eval_strategy, config.training.eval_steps) == ("steps", 250)
    config, _ = parse([*TRAIN, "--validation_file", "v.json", "--eval_strategy", "no"])
    assert config.training.eval_strategy == "no"


def test_checkpoint_fills_in_what_is_not_given():
    argv = ["--do_predict", "--ptuning_checkpoint", "ckpt", *TRAIN[5:], "--test_file", "t", "--max_source_length", "99"]
    known = ["--model_name_or_path", "base", "--max_source_length", "64", "--max_target_length", "32"]
    config, _ = parse(argv, infer=lambda checkpoint: known if checkpoint == "ckpt" else [])
    assert config.model.model_name_or_path == "base"
    assert (config.data.max_source_length, config.data.max_target_length) == (99, 32)


def test_the_record_of_a_run_has_every_option_and_no_secret():
    values = parse([*TRAIN, "--hub_token", "secret"])[0].to_dict()
    assert {"model_name_or_path", "train_file", "num_beams", "learning_rate", "seed"} <= values.keys()
    assert "secret" not in str(values)


DATASET_RUN = [*TRAIN[: TRAIN.index("--train_file")], *TRAIN[TRAIN.index("--train_file") + 2 :]]


def test_one_file_is_recorded_by_its_name_and_several_as_a_list():
    one, several = (parse([*TRAIN, "--train_file", *files])[0] for files in (["a.json"], ["a.json", "b.csv"]))
    assert (one.data.train_file, several.data.train_file) == (["a.json"], ["a.json", "b.csv"])
    assert one.to_dict()["train_file"] == "a.json"
    assert several.to_dict()["train_file"] == ["a.json", "b.csv"]


def test_a_dataset_gives_what_no_file_gives():
    data = parse([*DATASET_RUN, "--dataset_name", "o/n", "--dataset_config_name", "zh", "--test_file", "t.json"])[
        0
    ].data
    assert data.sources("train") == ["dataset:o/n:zh:train"]
    assert data.sources("validation") == ["dataset:o/n:zh:validation"]
    assert data.sources("test") == ["t.json"]
    data = parse([*TRAIN, "--validation_file", "v.json"])[0].data
    assert data.sources("test") == ["v.json"], "answers are scored on the validation rows where there are no others"


def test_the_best_checkpoint_of_a_dataset_is_found_on_its_validation_split():
    assert parse([*DATASET_RUN, "--dataset_name", "o/n"])[0].training.eval_strategy == "no"
    config, _ = parse([*DATASET_RUN, "--dataset_name", "o/n", "--early_stopping_patience", "2"])
    assert config.training.eval_strategy == "steps"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--train_file", "a.json", "--dataset_name", "o/n"],
            "--dataset_name o/n and --train_file a.json both give the training rows; leave one out, or read both: --train_file "
            "a.json dataset:o/n:train",
        ),
        (["--dataset_config_name", "zh", "--train_file", "a"], "--dataset_config_name zh needs --dataset_name"),
        ([], "--do_train needs --train_file"),
        (
            ["--do_train", "false", "--do_predict", "--test_file", "t", "--dataset_name", "o/n"],
            "--dataset_name o/n: each split that is used has a file; leave one of the two out",
        ),
    ],
)
def test_sources_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError) as caught:
        parse([*DATASET_RUN, *options])
    assert str(caught.value).startswith(message)
