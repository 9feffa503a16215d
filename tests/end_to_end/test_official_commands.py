"""The official command lines (THUDM ChatGLM2-6B ptuning/*.sh) with only the script path changed; sizes cut for the test."""

import json

import pytest
import torch

from ptuning.checkpoint.manifest import read_manifest
from ptuning.methods.prefix.read import read_prefix
from tests.end_to_end.conftest import BIN, MODEL, ROOT, losses

TORCHRUN = (BIN / "torchrun", "--standalone", "--nnodes=1", "--nproc-per-node=1")
# The launchers' own CPU switch; a free port, because tests run side by side.
DEEPSPEED = (BIN / "deepspeed", "--num_gpus=1", "--master_port")


def official_train(rows_file, output_dir, **cut) -> list[str]:
    """train.sh, word for word but for the paths and what `cut` overrides at the end."""
    line = (
        f"--do_train --train_file {rows_file} --validation_file {rows_file} --preprocessing_num_workers 10 "
        f"--prompt_column content --response_column summary --overwrite_cache --model_name_or_path {MODEL} "
        f"--output_dir {output_dir} --overwrite_output_dir --max_source_length 64 --max_target_length 128 "
        "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16 "
        "--predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000 --learning_rate 2e-2 "
        "--pre_seq_len 128"
    )
    return line.split() + [part for key, value in cut.items() for part in (f"--{key}", str(value))]


def official_evaluate(rows_file, output_dir, checkpoint) -> list[str]:
    """evaluate.sh, word for word but for the paths."""
    line = (
        f"--do_predict --validation_file {rows_file} --test_file {rows_file} --overwrite_cache --prompt_column content "
        f"--response_column summary --model_name_or_path {MODEL} --ptuning_checkpoint {checkpoint} "
        f"--output_dir {output_dir} --overwrite_output_dir --max_source_length 64 --max_target_length 64 "
        "--per_device_eval_batch_size 1 --predict_with_generate --pre_seq_len 128"
    )
    return line.split()


@pytest.mark.slow
def test_train_then_evaluate_under_torchrun(tmp_path, run_main, rows_file):
    cut = {"max_steps": 2, "save_steps": 2, "max_eval_samples": 8}
    run_main(*official_train(rows_file, tmp_path / "out", **cut), launcher=TORCHRUN)
    assert read_prefix(tmp_path / "out" / "checkpoint-2").tensors["embedding.weight"].shape[0] == 128

    evaluate = official_evaluate(rows_file, tmp_path / "out", f"{tmp_path}/out/checkpoint-2")
    run_main(*evaluate, "--max_predict_samples", 5, launcher=TORCHRUN)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tuned"]["rows"] == 5
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "out" / "checkpoint-2").is_dir()  # --overwrite_output_dir of an evaluation deletes nothing


@pytest.mark.slow
def test_train_under_the_deepspeed_launcher(tmp_path, run_main, rows_file, free_port):
    cut = {"max_steps": 2, "save_steps": 2, "max_eval_samples": 4, "gradient_accumulation_steps": 2}
    launcher = (*DEEPSPEED, str(free_port))
    run_main(*official_train(rows_file, tmp_path / "out", **cut), launcher=launcher, DS_ACCELERATOR="cpu")
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_full_tuning_line_of_ds_train_finetune(tmp_path, run_main, rows_file, free_port):
    """ds_train_finetune.sh, script path and DeepSpeed file changed; two processes, and no --fp16, which a CPU lacks."""
    line = (
        f"--deepspeed {ROOT}/configs/zero3.json --do_train --train_file {rows_file} --test_file {rows_file} "
        f"--prompt_column content --response_column summary --overwrite_cache --model_name_or_path {MODEL} "
        f"--output_dir {tmp_path}/ft --overwrite_output_dir --max_source_length 64 --max_target_length 64 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 1 --gradient_accumulation_steps 1 "
        "--predict_with_generate --max_steps 5000 --logging_steps 10 --save_steps 1000 --learning_rate 1e-4"
    )
    launcher = (BIN / "deepspeed", "--num_gpus=2", "--master_port", str(free_port))
    done = run_main(*line.split(), "--max_steps", 2, launcher=launcher, DS_ACCELERATOR="cpu")
    assert "effective batch 8 = 4 rows × 1 accumulation steps × 2 processes" in done.stdout
    assert (tmp_path / "ft" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("bits", [None, 4])
def test_train_chat(tmp_path, run_main, bits):
    dialogue = ROOT / "data" / "dialogue"
    line = (
        f"--do_train --train_file {dialogue}/train.json --validation_file {dialogue}/dev.json --preprocessing_num_workers 10 "
        "--prompt_column prompt --response_column response --history_column history --overwrite_cache "
        f"--model_name_or_path {MODEL} --output_dir {tmp_path}/chat --overwrite_output_dir --max_source_length 256 "
        "--max_target_length 256 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
        "--gradient_accumulation_steps 16 --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000 "
        "--learning_rate 1e-2 --pre_seq_len 128"
    )
    cut = ["--max_steps", 1, "--max_train_samples", 32, "--max_eval_samples", 8, "--quantization_bit", bits]
    done = run_main(*line.split(), *(cut if bits else cut[:-2]))
    assert "effective batch 16 = 1 rows × 16 accumulation steps × 1 processes" in done.stdout


@pytest.mark.slow
def test_train_and_evaluate_on_4_bits(tmp_path, run_main, rows_file):
    """train.sh and evaluate.sh with the `--quantization_bit 4` that they end in."""
    cut = {
        "quantization_bit": 4,
        "max_steps": 2,
        "save_steps": 2,
        "max_eval_samples": 4,
        "gradient_accumulation_steps": 2,
    }
    done = run_main(*official_train(rows_file, tmp_path / "out", **cut), launcher=TORCHRUN)
    assert "parameters in int4" in done.stdout
    assert read_manifest(tmp_path / "out" / "checkpoint-2").base.precision == "int4"
    assert done.stdout.count("--quantization_bit 4") == 2  # of the commands to type next
    line = official_evaluate(rows_file, tmp_path / "out", f"{tmp_path}/out/checkpoint-2")
    done = run_main(*line, "--quantization_bit", 4, "--max_predict_samples", 3, launcher=TORCHRUN)
    assert "was trained on a base in" not in done.stdout
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["tuned"]["rows"] == 3


@pytest.mark.slow
def test_evaluate_finetune(tmp_path, run_main, rows_file):
    """evaluate_finetune.sh: a whole model, without a prefix."""
    line = (
        f"--do_predict --validation_file {rows_file} --test_file {rows_file} --overwrite_cache --prompt_column content "
        f"--response_column summary --model_name_or_path {MODEL} --output_dir {tmp_path}/out --overwrite_output_dir "
        "--max_source_length 256 --max_target_length 256 --per_device_eval_batch_size 1 --predict_with_generate --fp16_full_eval"
    )
    run_main(*line.split(), "--max_predict_samples", 2, "--quantization_bit", 4, launcher=TORCHRUN)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["base"]["rows"] == 2


@pytest.mark.slow
def test_two_processes_compute_the_same_as_one(tmp_path, run_main, train_flags, rows_file, free_port):
    """DDP on two CPU processes, the same global batch: equal curves, one checkpoint, every row answered once."""
    same = {"max_steps": 3, "train_sampling_strategy": "sequential", "prefix_dropout": 0}
    predict = ["--do_predict", "--test_file", str(rows_file), "--max_predict_samples", "5", "--max_target_length", "12"]
    run_main(*train_flags(tmp_path / "one", per_device_train_batch_size=8, **same), *predict)
    launcher = (BIN / "torchrun", "--nnodes=1", "--nproc-per-node=2", f"--master-port={free_port}")
    run_main(*train_flags(tmp_path / "two", per_device_train_batch_size=4, **same), *predict, launcher=launcher)
    first, second = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert first == pytest.approx(second, rel=1e-5)
    tuned, expected = read_prefix(tmp_path / "two").tensors, read_prefix(tmp_path / "one").tensors
    assert torch.allclose(tuned["embedding.weight"], expected["embedding.weight"], atol=1e-4)
    answers = [
        [(line["index"], line["predict"]) for line in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / "one" / "predictions.jsonl", tmp_path / "two" / "predictions.jsonl")
    ]
    assert answers[0] == answers[1]
    assert [index for index, _ in answers[0]] == list(range(5))
    assert not list((tmp_path / "two").glob("*.part*"))
