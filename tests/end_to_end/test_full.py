"""All weights tuned by real processes: ZeRO-2 and ZeRO-3 on two, against one process without DeepSpeed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptuning import load_model
from ptuning.checkpoint.manifest import read_manifest
from ptuning.errors import CheckpointError
from ptuning.methods.prefix.attach import attach_prefix, prefix_of
from tests.end_to_end.conftest import BIN, MODEL, ROOT, full_flags, losses
from tests.end_to_end.inside import IDS

CONFIGS = ROOT / "configs"
DEV = ROOT / "data" / "advertise" / "dev.json"
INSIDE = "tests/end_to_end/inside.py"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The reference: one process without DeepSpeed, four rows a step. Returns its folder."""
    import subprocess

    folder = tmp_path_factory.mktemp("one") / "run"
    command = [BIN / "python", ROOT / "ptuning" / "main.py", *full_flags(folder, per_device_train_batch_size=4)]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=600)
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same_run(folder, reference) -> None:
    assert losses(folder) == pytest.approx(losses(reference), abs=1e-4)  # measured: 2e-6
    tuned, expected = weights(folder), weights(reference)
    assert set(tuned) == set(expected)
    # Adam divides by gradients near 0, so rounding shows in single weights, which moved by 4e-3 in 4 steps; measured: 2e-4.
    assert max((tuned[name] - expected[name]).abs().max() for name in expected) < 1e-3
    assert torch.cat([(tuned[name] - expected[name]).abs().flatten() for name in expected]).mean() < 1e-6


@pytest.mark.works("chatglm2", "full")
@pytest.mark.slow
def test_zero3_under_the_deepspeed_launcher(tmp_path, run_main, one_process, free_port):
    launcher = (BIN / "deepspeed", "--num_gpus=2", "--master_port", free_port)
    flags = full_flags(tmp_path / "run", deepspeed=CONFIGS / "zero3.json", save_total_limit=1)
    done = run_main(*flags, launcher=launcher, script=INSIDE, LOOK="logits", FOUND=str(tmp_path))
    same_run(tmp_path / "run", one_process)
    assert "effective batch 4 = 2 rows × 1 accumulation steps × 2 processes" in done.stdout
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["learning_rate"] for entry in entries if "loss" in entry] == [1e-3, 7.5e-4, 5e-4, 2.5e-4]
    assert all(entry["grad_norm"] > 0 for entry in entries if "loss" in entry)

    # the saved model is a complete official folder and computes exactly what the model in training computed
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        config = json.loads((folder / "config.json").read_text())
        assert config["original_rope"] is True and config["tie_word_embeddings"] is False
        for file in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
            assert (folder / file).is_file()
        expected = load_file(tmp_path / "logits.safetensors")["logits"]
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)
    description = read_manifest(tmp_path / "run" / "checkpoint-4")
    assert (description.step, description.base.name_or_path) == (4, str(MODEL))
    assert (description.max_source_length, description.template) == (48, "chatglm2")
    model, _ = load_model(tmp_path / "run")
    attach_prefix(model, 4)  # a tuned model is a base like any other


@pytest.mark.slow
def test_a_tuned_model_is_the_base_of_a_prefix(tmp_path, run_main, train_flags, one_process):
    run_main(*train_flags(tmp_path / "prefix", model_name_or_path=one_process, max_steps=1))
    model, _ = load_model(one_process, tmp_path / "prefix")
    assert prefix_of(model).pre_seq_len == 8
    with pytest.raises(CheckpointError, match="fingerprint"):  # and of no other
        load_model(MODEL, tmp_path / "prefix")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3_offload"])
def test_other_configs_under_torchrun(tmp_path, run_main, one_process, two_processes, config):
    flags = full_flags(tmp_path / "run", deepspeed=CONFIGS / f"{config}.json", save_steps=100)
    run_main(*flags, launcher=two_processes)
    same_run(tmp_path / "run", one_process)


@pytest.mark.slow
def test_zero3_under_accelerate_launch(tmp_path, run_main, one_process, free_port):
    # `--cpu` would start one process: there accelerate leaves several to MPI
    launcher = (
        BIN / "accelerate",
        "launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
    )
    launcher += ("--dynamo_backend=no", f"--main_process_port={free_port}")
    run_main(*full_flags(tmp_path / "run", deepspeed=CONFIGS / "zero3.json", save_steps=100), launcher=launcher)
    same_run(tmp_path / "run", one_process)


@pytest.mark.slow
def test_one_process_with_deepspeed_and_no_launcher(tmp_path, run_main, one_process):
    flags = full_flags(
        tmp_path / "run", deepspeed=CONFIGS / "zero3.json", per_device_train_batch_size=4, save_steps=100
    )
    run_main(*flags)
    same_run(tmp_path / "run", one_process)


@pytest.mark.slow
def test_prefix_under_zero_equals_one_process(tmp_path, run_main, free_port):
    prefix = {"method": "prefix", "pre_seq_len": 8, "prefix_dropout": 0, "learning_rate": 2e-2, "save_steps": 100}
    run_main(*full_flags(tmp_path / "one", per_device_train_batch_size=4, **prefix))
    launcher = (BIN / "torchrun", "--nnodes=1", "--nproc-per-node=2", f"--master-port={free_port}")
    for config in ("zero2", "zero3"):
        flags = full_flags(tmp_path / config, deepspeed=CONFIGS / f"{config}.json", **prefix)
        run_main(*flags, launcher=launcher)
        assert losses(tmp_path / config) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_evaluation_in_step_equals_one_process(tmp_path, run_main, two_processes):
    """13 rows on two processes, few at a time: forward calls for nobody on the one that is done first."""
    evaluate = {"do_train": None, "do_eval": True, "do_predict": True, "validation_file": DEV, "max_eval_samples": 13}
    evaluate |= {"max_predict_samples": 13, "per_device_eval_batch_size": 2, "max_target_length": 16}
    evaluate |= {"generation_batch_tokens": 200}
    run_main(*full_flags(tmp_path / "one", **evaluate))
    run_main(*full_flags(tmp_path / "two", deepspeed=CONFIGS / "zero3.json", **evaluate), launcher=two_processes)
    rows = [json.loads(line) for line in (tmp_path / "two" / "predictions_base.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(13))
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    pairs = [(two["base"].pop("intervals"), one["base"].pop("intervals"))]
    pairs += [(two[group], one[group]) for group in ("base", "validation")]
    for found, expected in pairs:
        assert found.keys() == expected.keys()
        for metric in expected:
            assert found[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-5), metric


@pytest.mark.slow
def test_a_nan_on_one_process_stops_both_with_the_same_message(tmp_path, run_main, two_processes):
    flags = full_flags(tmp_path / "run", deepspeed=CONFIGS / "zero3.json")
    done = run_main(*flags, launcher=two_processes, script=INSIDE, LOOK="poison", FOUND=str(tmp_path), check=False)
    assert done.returncode != 0
    source = ROOT / "data" / "advertise" / "train.json"
    message = f"step 2: the loss is nan on {source}:7, {source}:8. No checkpoint had been saved yet."
    assert done.stderr.count(message) == 2


@pytest.mark.slow
def test_a_full_disk_is_noticed_before_writing(tmp_path, run_main, two_processes):
    flags = full_flags(tmp_path / "run", deepspeed=CONFIGS / "zero3.json")
    done = run_main(*flags, launcher=two_processes, script=INSIDE, LOOK="full_disk", FOUND=str(tmp_path), check=False)
    assert done.returncode != 0
    assert "a checkpoint needs 0.11 GB of disk and 0.00 GB are free" in done.stderr
    assert "--save_total_limit" in done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert not list((tmp_path / "run").glob("checkpoint-*"))
