"""What a run writes to stderr is its progress bars, one at a time, and nothing that looks like a problem."""

import re
import sys

from tests.end_to_end.conftest import ROOT

BARS = r"(?P<name>Loading weights|train|[\w.]+json|predictions\w*|probe\w*)?:? *\d+%\|"
DEMO = {
    "config": ROOT / "configs" / "ptuning_demo.yaml",
    "max_steps": 2,
    "save_steps": 1,
    "eval_steps": 1,
    "max_train_samples": 64,
    "max_eval_samples": 4,
    "max_predict_samples": 4,
    "max_target_length": 8,
    "gradient_checkpointing": True,  # the name that transformers warns of
    "metric_for_best_model": "bleu-4",  # answers in the middle of training
}


def test_the_demo_shows_bars_and_nothing_else(tmp_path, run_main):
    flags = [part for name, value in DEMO.items() for part in (f"--{name}", str(value))]
    done = run_main(*flags, "--output_dir", str(tmp_path / "run"), cwd=ROOT)
    pieces = [piece for piece in re.split(r"[\r\n]", done.stderr) if piece.strip()]
    bars = [re.match(BARS, piece.strip()) for piece in pieces]
    assert [piece for piece, bar in zip(pieces, bars, strict=True) if bar is None] == []
    names = [bar["name"] for bar in bars]
    assert "predictions" in names and "predictions_validation" not in names  # the trainer's bar is there then


def test_an_estimate_says_nothing_on_stderr(run_main):
    flags = ["estimate", "--model_name_or_path", str(ROOT / "models" / "chatglm2-tiny"), "--host_memory_gb", "8"]
    done = run_main(
        *flags,
        script="ptuning/cli.py",
        launcher=("env", "-u", "DS_ACCELERATOR", sys.executable, "-P"),
        PYTHONPATH=str(ROOT),
    )
    assert "host memory per node" in done.stdout and done.stderr == ""
