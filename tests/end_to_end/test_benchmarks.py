"""The benchmarks still run, at toy size: the last line is JSON with the figures the docs quote. No times are asserted."""

import json
import os
import subprocess

import pytest

from benchmarks import methods
from tests.end_to_end.conftest import BIN, ROOT

TOY = [
    "--layers",
    "1",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--groups",
    "1",
    "--ffn",
    "32",
    "--vocab",
    "64",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "figures"),
    [
        ("train.py", [*TOY, "--samples", "16", "--pre_seq_len", "4"], {"ratio", "ours", "official"}),
        (
            "generate.py",
            [*TOY, "--rows", "4", "--single_rows", "1", "--pre_seq_len", "4"],
            {"speedup", "engine_tokens_per_s"},
        ),
        ("full.py", [*TOY, "--samples", "16", "--ways", "plain", "zero3", "--processes", "1"], {"plain", "zero3"}),
        (
            "cpu_serving.py",
            ["--small", "--engines", "int8", "--rounds", "1", "--rows", "2", "--prompts", "8", "--steps", "1"],
            {"int8", "threads"},
        ),
        ("size.py", ["--small", "--bases", "int4", "--train", "int4"], {"int4", "results"}),
    ],
)
def test_last_line_is_json(script, flags, figures):
    done = subprocess.run(
        [BIN / "python", str(ROOT / "benchmarks" / script), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert all(figure in json.dumps(list(summary) + list(summary.get("results", {}))) for figure in figures), summary


@pytest.mark.slow
def test_methods_side_by_side(tmp_path, capsys):
    methods.main(["--small", "--methods", "prefix", "full", "--output_dir", str(tmp_path)])
    *shown, last = capsys.readouterr().out.splitlines()
    prefix, full = json.loads(last)["methods"].values()
    assert prefix["demo"]["trained"] == 131_072 and full["demo"]["trained"] == 2_412_224
    assert prefix["demo"]["checkpoint_mb"] < full["demo"]["checkpoint_mb"]
    assert prefix["same_steps"]["steps"] == prefix["same_time"]["steps"] == full["same_steps"]["steps"] == 3
    assert prefix["same_steps"]["forgetting"]["base_loss"] == full["same_steps"]["forgetting"]["base_loss"]
    assert prefix["serving"]["answers"] == full["serving"]["answers"] == 2
    assert [line.split(",")[0] for line in shown if line.startswith("| ")] == ["| method", "| prefix", "| full"]
    written = (tmp_path / "prefix-3" / "metrics.json").stat().st_mtime_ns
    assert methods.scores(methods.arguments(["--small", "--output_dir", str(tmp_path)]), "prefix", 3)["steps"] == 3
    assert (tmp_path / "prefix-3" / "metrics.json").stat().st_mtime_ns == written  # not trained again
