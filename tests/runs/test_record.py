"""The record of a run: complete, and without secrets."""

import json

import pytest

from ptuning.config import parse
from ptuning.runs import RunFolder, RunRecord
from ptuning.runs.record import hide_in_command, hide_secrets, sha256_of_rows

CANARY = "canary-5f3a"


def test_no_secret_reaches_the_folder(tmp_path, monkeypatch):
    argv = ["--do_train", "--model_name_or_path", "m", "--train_file", "t.json", "--output_dir", str(tmp_path)]
    argv += [
        "--pre_seq_len",
        "8",
        "--hub_token",
        CANARY,
        "--max_target_length",
        "77",
        "--generation_batch_tokens",
        "999",
    ]
    argv += ["--lr_scheduler_kwargs", json.dumps({"api_key": CANARY, "num_cycles": 2})]
    argv += ["--run_name", f"https://me:{CANARY}@host/x"]
    monkeypatch.setattr("sys.argv", ["ptuning/main.py", *argv, f"--hub_token={CANARY}", f"WANDB_API_KEY={CANARY}"])
    config, _ = parse(argv)
    path = RunFolder(tmp_path).write_record(RunRecord.of_this_process(config.to_dict()))
    text = path.read_text(encoding="utf-8")
    assert CANARY not in text
    values = json.loads(text)
    assert values["config"]["hub_token"] == "***"
    assert values["config"]["lr_scheduler_kwargs"] == {"api_key": "***", "num_cycles": 2}
    assert (values["config"]["max_target_length"], values["config"]["generation_batch_tokens"]) == (77, 999)
    assert {"include_num_input_tokens_seen", "average_tokens_across_devices"} <= set(values["config"])
    assert values["command"][12:16] == ["--max_target_length", "77", "--generation_batch_tokens", "999"]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["--hub_token", "x", "--seed", "1"], ["--hub_token", "***", "--seed", "1"]),
        (["--hub_token", "--seed", "1"], ["--hub_token", "--seed", "1"]),
        (["--hub-token=x=y"], ["--hub-token=***"]),
        (["HF_TOKEN=x", "apiKey=x", "--db_password", "x"], ["HF_TOKEN=***", "apiKey=***", "--db_password", "***"]),
        (["--metric_for_best_model", "token_f1"], ["--metric_for_best_model", "token_f1"]),
        (
            ["--tokens=5", "--keyboard", "a", "--mix", "a.json:0.5"],
            ["--tokens=5", "--keyboard", "a", "--mix", "a.json:0.5"],
        ),
        (["http://host:8000/a@b"], ["http://host:8000/a@b"]),
    ],
)
def test_secrets_in_a_command(command, shown):
    assert hide_in_command(command) == shown


def test_secrets_in_values():
    values = {"password": "x", "secret": None, "key": 5, "names": ["http://a:b@c"], "deep": {"secret_key": ["x", "y"]}}
    shown = {
        "password": "***",
        "secret": None,
        "key": 5,
        "names": ["http://a:***@c"],
        "deep": {"secret_key": ["***"] * 2},
    }
    assert hide_secrets(values) == shown


def test_the_hash_of_rows_sees_every_number_and_the_order():
    rows = [([1, 2, 3], [-100, 2, 3]), ([4], [4])]
    changed = [
        rows[::-1],
        rows[:1],
        [([1, 2, 9], [-100, 2, 3]), rows[1]],
        [([1, 2, 3], [-100, -100, 3]), rows[1]],
        [([1, 2], [-100, 2]), ([3, 4], [3, 4])],
        [*rows, ([], [])],
    ]
    hashes = {sha256_of_rows(each) for each in [rows, *changed]}
    assert len(hashes) == 7 and sha256_of_rows(iter(rows)) == sha256_of_rows(rows)
