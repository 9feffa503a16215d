"""What is typed wrongly is answered in one line, before anything is loaded."""

import errno
import os
import subprocess
import sys

import pytest

from ptuning.config import parse
from ptuning.config.parse import option_parser
from ptuning.config.ranges import RANGES
from ptuning.data.files import data_fingerprint, first_character
from ptuning.errors import ConfigError, DataError
from ptuning.methods import method_class
from ptuning.runs import RunFolder, lock
from tests.conftest import REPO

TRAIN = ["--do_train", "--model_name_or_path", "m", "--train_file", "t.json", "--prompt_column", "q"]
TRAIN += ["--response_column", "a", "--output_dir", "out"]


@pytest.mark.parametrize("name", ["train_file", "validation_file", "test_file"])
def test_an_empty_name_of_a_file(name):
    for files in ([""], [" "], ["t.json", ""]):
        with pytest.raises(ConfigError) as caught:
            parse([*TRAIN, f"--{name}", *files])
        assert str(caught.value) == f"--{name} is given an empty name; give a file, or leave --{name} out"


def test_every_numeric_option_has_a_range():
    numeric = {action.dest for action in option_parser()._actions if action.type in (int, float)}
    of_methods = {name for method in ("prefix", "lora", "full") for name in method_class(method).options}
    elsewhere = {"quantization_bit", "label_smoothing_factor", "local_rank"}  # refused in checks; set by the launcher
    assert set(RANGES) == numeric - of_methods - elsewhere


@pytest.mark.parametrize("name", sorted(RANGES))
def test_just_outside_is_refused_and_the_limit_is_not(name):
    allowed = RANGES[name]
    outside = allowed.low if allowed.above else allowed.low - 1
    if allowed.also == outside:
        outside -= 1
    for value in (f"{outside:g}", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"^--{name} is {value}; use {str(allowed)[:8]}"):
            parse([*TRAIN, f"--{name}", value])
    assert allowed.holds(allowed.low + (1e-9 if allowed.above else 0))
    assert allowed.also is None or allowed.holds(allowed.also)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--max_steps 0", "--max_steps is 0; use at least 1, or leave it out for --num_train_epochs"),
        ("--max_steps -2", "--max_steps is -2; use at least 1"),
        ("--num_train_epochs 0", "--num_train_epochs is 0; use more than 0"),
        ("--gradient_accumulation_steps=-1", "--gradient_accumulation_steps is -1; use at least 1 and at most 65536"),
        ("--per_device_train_batch_size 999999999", "at least 1 and at most 65536"),
        (
            "--learning_rate 0",
            "--learning_rate is 0; use more than 0 (a prefix: 2e-2, a LoRA: 1e-3, all weights: 1e-4)",
        ),
        ("--max_grad_norm nan", "--max_grad_norm is nan; use at least 0 (0: no clipping)"),
        ("--adam_beta1 1", "--adam_beta1 is 1; use at least 0 and less than 1"),
        ("--seed 12345678901234567890", "--seed is 12345678901234567890; use a number from 0 to 4294967295"),
        ("--output_dir my run", "'run' belongs to no option; a value with spaces needs quotes"),
        ("—max_steps 2", "'—max_steps' belongs to no option; .* starts with two plain hyphens"),
        ("-x", "'-x' belongs to no option"),
        ("--fsdp full_shard", "--fsdp is not supported: .* --deepspeed configs/zero3.json"),
        ("--push_to_hub", "--push_to_hub is not supported: upload the folder when the run has ended"),
        (
            "--use_liger_kernel",
            "--use_liger_kernel is not supported: the loss of liger-kernel is used by itself on a GPU",
        ),
        ("--report_to nowhere", "--report_to nowhere: no such logger; use .*tensorboard, .*or none"),
    ],
)
def test_refused(options, text):
    with pytest.raises(ConfigError, match=text.replace("(", r"\(").replace(")", r"\)")) as error:
        parse([*TRAIN, *options.split()])
    assert "\n" not in str(error.value)


def test_a_package_that_is_not_there_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("ptuning.config.checks.get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for option, value, package in (
        ("report_to", "wandb", "wandb"),
        ("report_to", "comet_ml", "comet-ml"),
        ("optim", "paged_adamw_8bit", "bitsandbytes"),
        ("optim", "galore_adamw_8bit", "galore-torch"),
        ("optim", "adamw_torch_4bit", "torchao"),
    ):
        with pytest.raises(ConfigError, match=f"--{option} {value}: .*pip install {package},"):
            parse([*TRAIN, f"--{option}", value])
    for optim in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"):
        assert parse([*TRAIN, "--optim", optim])


def test_yaml_that_says_something_twice_or_by_reference_is_refused(tmp_path):
    path, bomb = tmp_path / "x.yaml", "a: &a0 [x, x]\n"
    bomb += "".join(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 13))
    for content, text in (
        ("max_steps: 3\npre_seq_len: 8\nmax_steps: 5\n", "max_steps stands here twice"),
        (bomb, r"\*a0 refers to another value"),
        ("mix: [[a.json:1]]\n", "mix is a list of lists"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=text) as error:
            parse(["--config", str(path), *TRAIN])
        assert str(error.value).startswith(str(path))


def test_a_pipe_as_data_file_does_not_hang(tmp_path):
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    for read in (data_fingerprint, first_character):
        with pytest.raises(DataError, match="this is a pipe or a device, not a file"):
            read(path)


def test_an_output_folder_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for path in (file, file / "run", file / "a" / "b"):
        with (
            pytest.raises(ConfigError, match=rf"--output_dir {path}: {file} is a file; name a new folder"),
            lock(RunFolder(path)),
        ):
            pass
    with (
        pytest.raises(ConfigError, match="x…: File name too long; name a folder that can be made"),
        lock(RunFolder(tmp_path / ("x" * 300))),
    ):
        pass
    assert file.read_text() == "kept" and list(tmp_path.iterdir()) == [file]


def test_the_example_client_says_that_no_server_answers():
    command = [sys.executable, str(REPO / "scripts" / "request_example.py"), "--url", "http://127.0.0.1:9/chatglm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: no server answers at http://127.0.0.1:9/chatglm; start one with")


@pytest.mark.parametrize(
    ("number", "why"), [(errno.EROFS, "on a read-only file system"), (errno.EACCES, "not writable for this user")]
)
def test_an_output_folder_where_nothing_may_be_written(tmp_path, monkeypatch, number, why):
    def refuses(self, *args, **kwargs):
        raise OSError(number, "no", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuses)
    for path in (tmp_path / "a" / "run", tmp_path):
        with pytest.raises(ConfigError) as error, lock(RunFolder(path)):
            pass
        assert str(error.value) == f"--output_dir {path}: {tmp_path} is {why}; name a folder elsewhere"
