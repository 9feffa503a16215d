"""Gradient checkpointing where nothing was said: on where it is needed and helps, recorded, and kept when a run is resumed."""

import json
from dataclasses import replace

import pytest

from ptuning import cli, main
from ptuning.config import TuningArguments, parse
from ptuning.methods import method_of
from ptuning.training import checkpointing
from ptuning.training.checkpointing import choose_checkpointing
from ptuning.training.estimate import Estimate, estimate_run
from ptuning.training.machine import Machine
from ptuning.training.resume import run_to_continue
from ptuning.training.trainer import TuningTrainer
from tests.conftest import REPO
from tests.training.test_estimate import GB, OFFICIAL, ChatGLMConfig

MODEL = REPO / "models" / "chatglm2-tiny"
ON = "Gradient checkpointing is on, because memory would not suffice without it"


@pytest.fixture
def choose(tmp_path):
    """P-Tuning of the 6B shape on a GPU of so many GB. Returns the options, the estimate and what was said."""
    ChatGLMConfig(**OFFICIAL).save_pretrained(tmp_path / "6b")

    def of(gpu_gb: float, *flags: str) -> tuple[TuningArguments, Estimate, list[str]]:
        given = ["--do_train", "--model_name_or_path", tmp_path / "6b", "--train_file", "x", "--prompt_column", "a"]
        given += [
            "--response_column",
            "b",
            "--output_dir",
            tmp_path / "run",
            "--report_to",
            "none",
            "--pre_seq_len",
            "128",
        ]
        given += ["--max_source_length", "64", "--per_device_train_batch_size", "16", *flags]
        config, _ = parse(list(map(str, given)))
        method, machine = method_of(config.model, trains=True), Machine(400 * GB, 10**13, int(gpu_gb * GB))
        estimate = estimate_run(config, method, machine, device_type="cuda", processes=(1, 1))
        said: list[str] = []
        return (
            config.training,
            choose_checkpointing(config.training, run_to_continue(config.training), estimate, said.append),
            said,
        )

    return of


def test_on_where_it_is_needed_and_helps_and_off_elsewhere(choose):
    found = {}
    for size in (13, 24, 32, 80):
        training, estimate, said = choose(size)
        assert training.gradient_checkpointing is training.activation_checkpointing is estimate.work.checkpointing
        assert [line.startswith(ON) for line in said] == [True] * training.gradient_checkpointing
        found[size] = training.gradient_checkpointing
    assert found == {13: False, 24: True, 32: True, 80: False}  # with 13 GB the weights alone are too much


def test_tight_is_enough_where_checkpointing_makes_it_fit(choose):
    _, without, _ = choose(1000)
    peak = without.need.device_peak / GB
    assert choose(peak / 0.95)[0].gradient_checkpointing  # it might run out of memory
    assert not choose(peak / 0.85)[0].gradient_checkpointing


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_what_was_said_is_obeyed(choose, name):
    training, estimate, said = choose(24, f"--{name}", "false")
    assert (training.gradient_checkpointing, estimate.work.checkpointing, said) == (False, False, [])
    training, estimate, said = choose(80, f"--{name}", "true")
    assert (training.gradient_checkpointing, estimate.work.checkpointing, said) == (True, True, [])


def test_all_processes_do_the_same(choose, monkeypatch):
    monkeypatch.setattr(checkpointing, "most_anywhere", lambda number: max(number, 1))  # another one needs it
    training, estimate, said = choose(80)
    assert training.gradient_checkpointing and estimate.work.checkpointing and said


def test_the_command_says_so(tmp_path, capsys):
    ChatGLMConfig(**OFFICIAL).save_pretrained(tmp_path / "6b")
    flags = ["estimate", "--model_name_or_path", str(tmp_path / "6b"), "--max_source_length", "64"]
    assert cli.main([*flags, "--gpu_memory_gb", "24"]) == 0
    printed = capsys.readouterr().out
    assert ON in printed and "gradient checkpointing on" in printed
    assert cli.main([*flags, "--gpu_memory_gb", "24", "--gradient_checkpointing", "false"]) == 2
    assert "The nearest setting that fits: --gradient_checkpointing true" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_records_it_and_a_resumed_one_keeps_it(tmp_path, capsys, monkeypatch):
    rows = tmp_path / "rows.json"
    rows.write_text("".join(json.dumps({"q": f"颜色{n}", "a": "白色"}) + "\n" for n in range(8)))
    given = [
        "--do_train",
        "--model_name_or_path",
        MODEL,
        "--train_file",
        rows,
        "--prompt_column",
        "q",
        "--pre_seq_len",
        "4",
    ]
    given += ["--response_column", "a", "--output_dir", tmp_path / "run", "--max_steps", "2", "--save_steps", "1"]
    flags, used = [*map(str, given), "--report_to", "none", "--per_device_train_batch_size", "2"], []
    step = TuningTrainer.training_step

    def watched(self, model, *args, **kwargs):
        used.append(model.is_activation_checkpointing)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(TuningTrainer, "training_step", watched)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "_helps", lambda without, checkpointed: True)
        assert main.main(flags) == 0
    printed = capsys.readouterr().out
    assert ON in printed and "gradient checkpointing on" in printed and used == [True, True]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["gradient_checkpointing"] is True
    # On a machine that has enough memory; what is said now is compared.
    first = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1")]
    assert main.main([*flags, *first]) == 0
    assert used == [True] * 3 and ON not in capsys.readouterr().out
    assert main.main([*flags, *first, "--gradient_checkpointing", "false"]) == 2
    assert "gradient_checkpointing was True, now False" in capsys.readouterr().err
    assert main.main([*flags, "--overwrite_output_dir", "true"]) == 0
    assert used[3:] == [False, False]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["gradient_checkpointing"] is record["config"]["activation_checkpointing"] is False


def test_where_nothing_fits_the_advice_is_the_estimates(choose):
    _, estimate, said = choose(13)
    assert not said and replace(estimate, machine=Machine(400 * GB, 10**13, 13 * GB)).lacking
