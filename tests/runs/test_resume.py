"""The contract for resuming."""

import dataclasses
import json

import pytest

from ptuning.config import parse
from ptuning.errors import ConfigError
from ptuning.runs import RunFolder, RunRecord
from ptuning.runs.resume import (
    BATCH_OPTIONS,
    FREE_OPTIONS,
    LENGTH_OPTIONS,
    chosen_checkpoint,
    conflicts,
    is_finished,
    is_free,
    notes,
    refusal,
)

ARGV = [
    "--do_train",
    "--model_name_or_path",
    "m",
    "--train_file",
    "t.json",
    "--output_dir",
    "/tmp/x",
    "--pre_seq_len",
    "8",
]
OPTIONS = parse(ARGV)[0].to_dict()
COMPARED = sorted(set(OPTIONS) - set(BATCH_OPTIONS) - set(LENGTH_OPTIONS) - {name for name in OPTIONS if is_free(name)})
# One by one, so that an option that becomes free, or a new one that is none of these, needs a decision here.
DECIDED_FREE = """
    baseline baseline_from batch_eval_metrics bf16_full_eval dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_timeout disable_tqdm do_eval do_predict
    enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
    eval_use_gather_object fp16_full_eval generation_batch_tokens generation_mode hub_always_push hub_model_id hub_private_repo
    hub_revision hub_strategy hub_token include_for_metrics include_num_input_tokens_seen local_rank log_level
    log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy
    max_eval_samples max_predict_samples num_beams output_dir overwrite_output_dir per_device_eval_batch_size
    predict_with_generate prediction_loss_only probe project ptuning_checkpoint push_to_hub report_to resume_from_checkpoint
    run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit skip_memory_metrics test_file
    trackio_bucket_id trackio_space_id trackio_static_space_id val_max_target_length validation_file
    overwrite_cache preprocessing_num_workers kernels micro_batch_tokens engine vllm_url vllm_key prefix_store
    device_map tensor_parallel
""".split()  # noqa: SIM905


def record(**changes) -> RunRecord:
    config = {key: value for key, value in changes.items() if key in OPTIONS and not isinstance(value, dict)}
    rest = {key: value for key, value in changes.items() if key not in config}
    known = {"rows_sha256": "a" * 64, "base_fingerprint": "f" * 16, "data_sha256": {"train": "d" * 64}, "cwd": "/"}
    return RunRecord.of_this_process(OPTIONS | config, **known | rest)


def another(value):
    """A value unlike this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "something else"


def test_every_option_is_compared_or_decided_to_be_free():
    free = {name for name in OPTIONS if is_free(name)}
    assert free == set(DECIDED_FREE) & set(OPTIONS)
    assert set(OPTIONS) == free | set(COMPARED) | set(BATCH_OPTIONS) | set(LENGTH_OPTIONS)
    for name in (
        "learning_rate",
        "seed",
        "dtype",
        "prefix_dropout",
        "prompt_column",
        "max_train_samples",
        "lr_scheduler_type",
    ):
        assert name in COMPARED
    later = {"overwrite_cache", "preprocessing_num_workers"}  # patterns may be for options that are yet to come
    for pattern in FREE_OPTIONS:
        assert pattern in later or any(
            is_free(name) for name in OPTIONS if name.startswith(pattern.strip("*")) or "*" in pattern
        )


@pytest.mark.parametrize("name", COMPARED)
def test_a_changed_option_is_refused(name):
    was, now = OPTIONS[name], another(OPTIONS[name])
    assert conflicts(record(), record(**{name: now})) == [f"{name} was {was!r}, now {now!r}"]
    assert conflicts(record(**{name: now}), record()) == [f"{name} was {now!r}, now {was!r}"]


@pytest.mark.parametrize("name", sorted(set(DECIDED_FREE) & set(OPTIONS)))
def test_a_free_option_may_change(name):
    assert conflicts(record(), record(**{name: another(OPTIONS[name])})) == []


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ({}, {}, []),
        ({}, {"kernels": "plain", "product": "torch", "micro_batch_tokens": 0}, []),  # a record of 0.0
        ({}, {"kernels": "fast"}, ["kernels was 'plain', now 'fast'"]),
        (
            {"gpu_loss": "liger"},
            {"gpu_loss": "chunks"},
            [
                "gpu_loss was 'liger', now 'chunks' (what computes the loss on a GPU: liger-kernel has gone, or another device or "
                "--kernels plain has come)"
            ],
        ),
        ({"micro_batch_tokens": 512}, {"micro_batch_tokens": 64}, ["micro_batch_tokens was 512, now 64"]),
        (
            {"kernels": "fast", "product": "onednn"},
            {"kernels": "fast", "product": "torch"},
            [
                "product was 'onednn', now 'torch' (of the two libraries that multiply, which this machine has only one of)"
            ],
        ),
    ],
)
def test_kernels_are_compared_as_what_they_came_to(was, now, said):
    assert conflicts(record(kernels=was), record(kernels=now)) == said


def test_an_option_that_this_test_does_not_know_is_compared():
    before, now = record(), record()
    before.config["lora_rank"], now.config["lora_rank"] = 8, 16
    assert conflicts(before, now) == ["lora_rank was 8, now 16"]


def test_nothing_has_changed():
    assert conflicts(record(), record()) == notes(record(), record()) == []


def test_other_rows_or_another_base():
    found = conflicts(record(), record(rows_sha256="b" * 64, base_fingerprint="e" * 16))
    assert found == [
        "the base's weights have changed (fingerprint ffffffffffffffff, now eeeeeeeeeeeeeeee)",
        "the training data has changed (sha256 aaaaaaaaaaaa…, now bbbbbbbbbbbb…)",
    ]
    # An older record has only the hash of the file.
    old = record(rows_sha256=None, base_fingerprint=None)
    assert conflicts(old, record()) == []
    assert "sha256 cccc" in conflicts(dataclasses.replace(old, data_sha256={"train": "c" * 64}), record())[0]


@pytest.mark.parametrize(
    ("option", "was", "now", "allowed"),
    [
        ("max_steps", 24, 48, True),
        ("max_steps", 48, 24, False),
        ("max_steps", -1, 24, False),
        ("max_steps", 24, -1, False),
        ("num_train_epochs", 3.0, 5.0, True),
        ("num_train_epochs", 5.0, 3.0, False),
    ],
)
def test_a_run_may_get_longer(option, was, now, allowed):
    before, after = record(**{option: was}), record(**{option: now})
    if allowed:
        assert conflicts(before, after) == []
        assert [
            f"{option} goes from {was:g} to {now:g}" in line and "linear" in line for line in notes(before, after)
        ] == [True]
    else:
        assert conflicts(before, after) == [f"{option} was {was!r}, now {now!r} (it may only go up)"]


def test_epochs_do_not_count_beside_steps():
    assert notes(record(max_steps=5), record(max_steps=5, num_train_epochs=9.0)) == []


def test_another_spelling_of_a_path_is_no_change(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.json", "b.json", "zero.json"):
        (data / name).write_text("{}")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    spellings = ["data/a.json", "./data/../data/a.json", str(data / "a.json"), "~/data/a.json", "link/a.json"]
    first = record(train_file="data/a.json", cwd=str(tmp_path), mix=["data/b.json:0.5"])
    monkeypatch.chdir(data)  # another working directory
    for spelling in spellings:
        now = record(train_file=spelling, cwd=str(tmp_path), mix=[spelling.replace("a.json", "b.json") + ":0.5"])
        assert conflicts(first, now) == []
    assert conflicts(first, record(train_file="a.json", cwd=str(data), mix=["b.json:0.5"])) == []
    assert conflicts(first, record(train_file="b.json", cwd=str(data), mix=["b.json:0.5"]))
    assert conflicts(first, record(train_file="a.json", cwd=str(data), mix=["b.json:0.6"]))
    several = record(train_file=["data/a.json", "data/b.json"], cwd=str(tmp_path))
    assert conflicts(several, record(train_file=["a.json", "../data/b.json"], cwd=str(data))) == []
    assert conflicts(several, record(train_file=["b.json", "a.json"], cwd=str(data)))
    assert conflicts(several, record(train_file="a.json", cwd=str(data)))


def test_a_deepspeed_file_counts_by_what_it_says(tmp_path):
    file, moved = tmp_path / "zero3.json", tmp_path / "moved.json"
    file.write_text('{"a": 1}')
    moved.write_text('{"a": 1}')
    before = record(deepspeed=str(file))
    assert conflicts(before, record(deepspeed=str(moved))) == []
    file.write_text('{"a": 2}')
    assert conflicts(before, record(deepspeed=str(file))) == [
        f"deepspeed was {str(file)!r}, now {str(file)!r} with other contents"
    ]
    assert conflicts(before, record(deepspeed=None))


def test_an_option_that_the_record_does_not_know_is_said(tmp_path):
    before = record()
    del before.config["prefix_dropout"], before.config["probe"]
    assert conflicts(before, record()) == []
    assert [("prefix_dropout" in line, "probe" in line) for line in notes(before, record())] == [(True, False)]


def test_a_run_that_began_with_a_prefix():
    """Its length came from the checkpoint; to resume, it has to be given."""
    before = record(pre_seq_len=None, ptuning_checkpoint="old")
    assert conflicts(before, record(pre_seq_len=8)) == []
    assert conflicts(record(pre_seq_len=None), record(pre_seq_len=8)) == ["pre_seq_len was None, now 8"]


def test_the_record_survives_being_written(tmp_path):
    written = record(mix=None)
    RunFolder(tmp_path).write_record(written)
    again = RunFolder(tmp_path).record_at(5)
    assert conflicts(again, written) == notes(again, written) == []


# --- the checkpoint ---------------------------------------------------------------------------------------------------------


def make(folder, step=4, state=None, record=True, **files):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state = {"global_step": step, "max_steps": 9, "log_history": []} if state is None else state
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for name in files.get("names", ()):
        (checkpoint / name).write_text("")
    if record:
        (folder / "run.json").write_text("{}")
    return checkpoint


@pytest.mark.parametrize("wish", [None, False, "false", "None", ""])
def test_no_wish_to_resume(tmp_path, wish):
    make(tmp_path)
    assert chosen_checkpoint(RunFolder(tmp_path), wish) is None


def test_the_latest_or_the_one_named(tmp_path):
    checkpoints = [make(tmp_path, step) for step in (4, 20, 100)]
    assert (
        chosen_checkpoint(RunFolder(tmp_path), "True") == chosen_checkpoint(RunFolder(tmp_path), True) == checkpoints[2]
    )
    assert chosen_checkpoint(RunFolder(tmp_path / "other"), str(checkpoints[0])) == checkpoints[0]


def test_what_is_no_checkpoint(tmp_path):
    checkpoint = make(tmp_path / "run")
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        chosen_checkpoint(RunFolder(tmp_path / "none"), "true")
    with pytest.raises(ConfigError, match=f"did you mean {checkpoint}"):
        chosen_checkpoint(RunFolder(tmp_path), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"needs trainer_state\.json"):
        chosen_checkpoint(RunFolder(tmp_path), str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "reason", "flag"),
    [
        ({"record": False}, "there is no", "--ptuning_checkpoint"),
        ({"names": ["pytorch_model.bin", "config.json"]}, "pytorch_model.bin", "--ptuning_checkpoint"),
        ({"state": {"global_step": 4}}, "has no max_steps, log_history", "--ptuning_checkpoint"),
        ({"state": [1]}, "has no global_step", "--ptuning_checkpoint"),
        ({"record": False, "names": ["model.safetensors"]}, "there is no", "--model_name_or_path"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_of_another_program(tmp_path, options, reason, flag, named):
    checkpoint = make(tmp_path, **options)
    with pytest.raises(ConfigError) as caught:
        chosen_checkpoint(RunFolder(tmp_path), str(checkpoint) if named else "true")
    assert reason in str(caught.value) and f"start a new run from it: {flag} {checkpoint}" in str(caught.value)


def test_the_refusal_names_every_difference_and_the_way_out(tmp_path):
    checkpoint = make(tmp_path)
    text = str(refusal(checkpoint, ["seed was 42, now 7", "dtype was 'auto', now 'float32'"]))
    assert text == (
        f"--resume_from_checkpoint {checkpoint} would not continue the same run: seed was 42, now 7; dtype was 'auto', now "
        f"'float32'. Use the old values, or start a new run from it: --ptuning_checkpoint {checkpoint}"
    )


def test_a_finished_run(tmp_path):
    checkpoint = make(tmp_path, 9)
    assert [is_finished(checkpoint, steps) for steps in (8, 9, 10)] == [True, True, False]
    (checkpoint / "trainer_state.json").write_text("{")
    assert not is_finished(checkpoint, 8)
