"""What people type elsewhere, and --help."""

import re

import pytest

from ptuning.config.help import EVALUATION, TRAINING
from ptuning.config.names import ANSWERS, OLD_VALUES, RENAMED, WITHOUT_EFFECT
from ptuning.config.parse import option_parser, parse
from ptuning.errors import ConfigError

KNOWN = {action.dest: action for action in option_parser()._actions}
BASE = [
    "--do_train",
    "--model_name_or_path",
    "m",
    "--train_file",
    "t",
    "--prompt_column",
    "p",
    "--response_column",
    "r",
]
BASE += ["--output_dir", "o"]


def test_answers_and_new_names_lead_to_options_that_are_there():
    assert not set(ANSWERS) & set(KNOWN) and not set(RENAMED) & set(KNOWN) and not set(WITHOUT_EFFECT) & set(KNOWN)
    assert set(RENAMED.values()) <= set(KNOWN)
    for text in ANSWERS.values():
        own = text.partition("torchrun")[0].partition("hf download")[0]  # a launcher's options are its own
        assert set(re.findall(r"--(\w+)", own)) <= set(KNOWN), text


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("--lr 1e-3", "--lr is no option here: use --learning_rate"),
        ("--batch_size 4", "use --per_device_train_batch_size"),
        ("--cutoff_len 512", "use --max_source_length and --max_target_length"),
        ("--finetuning_type lora", r"use --method prefix, lora, lora\+prefix or full"),
        ("--adapter_name_or_path x", "use --ptuning_checkpoint"),
        ("--pissa_init true", "--lora_init default, gaussian or orthogonal"),
        ("--packing true", "those of similar length share a batch"),
        ("--use_auth_token x", "hf auth login"),
        ("--generation_max_length 9", "use --val_max_target_length"),
        ("--logging_dir x", "TENSORBOARD_LOGGING_DIR"),
        ("--group_by_length false", "use --train_sampling_strategy random"),
        ("--ignore_pad_token_for_loss false", "a loss on padding isn't offered"),
        ("--optim adamw_hf", "--optim adamw_hf: transformers has it no more; use --optim adamw_torch"),
        ("--learning_rat 1", "unknown option --learning_rat; did you mean --learning_rate"),
    ],
)
def test_names_from_elsewhere_are_answered(typed, text):
    with pytest.raises(ConfigError, match=text):
        parse([*BASE, *typed.split()])


def test_official_flags_with_one_meaning_are_accepted():
    typed = (
        "--lang zh --ignore_pad_token_for_loss --group_by_length true --resize_position_embeddings false --no_cuda true"
    )
    config, notes = parse([*BASE, *typed.split(), "--generation_num_beams", "2"])
    assert config.generation.num_beams == 2 and config.training.use_cpu
    assert [note.split()[0] for note in notes if "no effect" in note] == [
        "--lang",
        "--ignore_pad_token_for_loss",
        "--group_by_length",
        "--resize_position_embeddings",
    ]


def test_old_values_are_those_of_options():
    for (name, old), new in OLD_VALUES.items():
        choices = list(map(str, KNOWN[name].choices))
        assert new in choices and old not in choices


@pytest.mark.parametrize(("task", "groups"), [("--do_train", TRAINING), ("--do_predict", EVALUATION)])
def test_help_shows_what_is_used_in_groups(task, groups, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([task, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for title, names in groups.items():
        assert f"\n{title}:\n" in shown
        assert all(f"  --{name} " in shown for name in names)
    assert len(re.findall(r"^  --", shown, re.M)) == sum(map(len, groups.values())) <= 30
    assert "--help_all" in shown and "-length" not in shown  # one spelling


def test_help_all_shows_every_option_once(capsys):
    with pytest.raises(SystemExit):
        parse(["--do_train", "--help_all"])
    shown = re.findall(r"^  (--\S+)", capsys.readouterr().out, re.M)
    assert len(shown) == len(set(shown)) and {name for name in KNOWN if name != "help"} == {s[2:] for s in shown}


def test_a_yaml_file_in_front_is_the_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 3e-3\n")
    config, _ = parse([str(file), *BASE, "--max_steps", "7"])
    assert config.training.learning_rate == 3e-3 and config.training.max_steps == 7
