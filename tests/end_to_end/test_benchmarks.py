"""The benchmarks still run, at toy size: the last line is JSON with the figures the docs quote. No times are asserted."""

import json
import os
import subprocess

import pytest
import torch

from benchmarks import all as every
from benchmarks import compare, gpu, long, methods, serve
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
        (
            "train.py",
            [
                *TOY,
                "--preload",
                "--samples",
                "16",
                "--pre_seq_len",
                "4",
                "--ways",
                "ours",
                "official",
                "peft_prefix",
                "peft_lora",
            ],
            {"ratio", "ours", "official", "peft_lora"},
        ),
        (
            "generate.py",
            [*TOY, "--rows", "4", "--single_rows", "1", "--pre_seq_len", "4"],
            {"speedup", "engine_tokens_per_s"},
        ),
        ("full.py", [*TOY, "--samples", "16", "--ways", "plain", "zero3", "--processes", "1"], {"plain", "zero3"}),
        (
            "cpu_serving.py",
            ["--small", "--engines", "int8", "--turns", "1", "--rows", "2", "--prompts", "8", "--steps", "1"],
            {"int8", "threads"},
        ),
        ("proof.py", ["--seconds", "2", "--clients", "8", "--most_growth", "1000"], {"equal", "good", "exit_status"}),
        ("size.py", ["--small", "--bases", "int4", "--train"], {"int4", "results"}),
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
def test_methods_side_by_side(tmp_path):
    """One of them: the others differ by their options, and each takes half a minute. The processes that it starts are forks
    of one that has imported everything."""
    flags = ["--small", "--methods", "prefix", "--output_dir", str(tmp_path)]
    code = f"from benchmarks import methods; methods.START = 'fork'; methods.main({flags})"
    done = subprocess.run([BIN / "python", "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    *shown, last = done.stdout.splitlines()
    (prefix,) = json.loads(last)["methods"].values()
    assert prefix["demo"]["trained"] == 131_072 and 0 < prefix["demo"]["checkpoint_mb"] < 1
    assert prefix["same_steps"]["steps"] == prefix["same_time"]["steps"] == 3
    assert prefix["same_steps"]["forgetting"]["base_loss"] > 0
    assert prefix["serving"]["answers"] == 2
    assert [line.split(",")[0] for line in shown if line.startswith("| ")] == ["| method", "| prefix"]
    written = (tmp_path / "prefix-3" / "metrics.json").stat().st_mtime_ns
    assert methods.scores(methods.arguments(["--small", "--output_dir", str(tmp_path)]), "prefix", 3)["steps"] == 3
    assert (tmp_path / "prefix-3" / "metrics.json").stat().st_mtime_ns == written  # not trained again


def test_a_vllm_that_is_not_there(capsys):
    """One that is there is measured by tests/ptuning_vllm/test_real_vllm.py."""
    with pytest.raises(SystemExit):
        serve.main(["--vllm_python", "/no/python"])
    assert "--vllm_python /no/python: no such file; bash scripts/setup_vllm.sh makes" in capsys.readouterr().err


def test_long_rows_in_both_ways(capsys):
    long.main(["--small"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert list(found) == long.ways(long.arguments(["--small"])) and "plain, checkpointing" in found
    for way in found.values():
        assert list(way) == ["128", "256"]
        assert all(figures["seconds"] > 0 and figures["extra_mb"] >= 0 for figures in way.values())


def test_a_length_that_would_take_too_much_is_left_out(capsys):
    assert long.expected({}, 1024) == 0
    assert long.expected({1024: {"extra_mb": 100}}, 2048) == 400  # with the square, as long as nothing else is known
    assert long.expected({1024: {"extra_mb": 100}, 2048: {"extra_mb": 200}}, 8192) == pytest.approx(800)
    long.main(["--small", "--kernels", "plain", "--memory_mb", "0"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert found["plain"]["128"] and found["plain"]["256"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_in_one_line_that_there_is_none(capsys):
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == "no GPU here: run this on a machine with one (CUDA, 30 GB of GPU memory)\n"


def test_gpu_on_a_cpu(tmp_path, capsys, monkeypatch):
    """One way in this process, and what becomes of figures and failures."""
    torch.manual_seed(0)
    gpu.write_base(tmp_path, gpu.TINY_SHAPE)

    def here(command):
        if "generate.py" in command[1]:
            return {"engine_tokens_per_s": 5.0, "batch_1_tokens_per_s": 1.0}
        if "full" in command:
            return {"failed": "out of memory"}
        return gpu.train(gpu.arguments(command[2:]))

    monkeypatch.setattr(gpu, "last_line", here)
    monkeypatch.setattr(gpu, "matmul_rates", lambda device, dtype: {"torch": 1e11})
    output = tmp_path / "found" / "gpu.json"
    flags = ["--small", "--device", "cpu", "--steps", "1", "--batch", "2", "--folder", str(tmp_path)]
    assert gpu.main([*flags, "--output", str(output), "--ways", "prefix", "full"]) == 1  # one has failed
    summary = json.loads(output.read_text())
    found = summary["training"]["prefix"]
    assert (
        found["tokens_per_s"] > 0
        and 0 < found["share"] < 1
        and summary["training"]["full"] == {"failed": "out of memory"}
    )
    shown = capsys.readouterr().out
    assert f"| prefix | {found['samples_per_s']} | {found['tokens_per_s']} |" in shown
    assert "| full | out of memory |" in shown and "answers: 5.0 tokens/s with 64 rows, 1.0 one by one" in shown


def test_every_benchmark_is_run_small_or_left_out_with_a_reason():
    there = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"all", "common", "compare", "__init__"}
    assert there == set(every.SMALL) | set(every.LEFT_OUT) and not set(every.SMALL) & set(every.LEFT_OUT)


def test_all_writes_one_file_and_compare_reads_it(tmp_path, capsys, monkeypatch):
    script = (
        "import json, sys; sys.exit('no') if sys.argv[1:] else print(json.dumps({'tokens_per_s': 100, 'layers': 2}))"
    )
    (tmp_path / "generate.py").write_text(script)
    (tmp_path / "serve.py").write_text(script)
    monkeypatch.setattr(every, "FOLDER", tmp_path)
    monkeypatch.setattr(every, "SMALL", {"generate": [], "serve": ["fails"]})
    old = tmp_path / "runs" / "old.json"
    assert every.main(["--output", str(old), "--only", "generate"]) == 0
    assert every.main(["--output", str(tmp_path / "both.json"), "--only", "generate", "serve"]) == 1
    assert "serve: failed: no" in capsys.readouterr().out
    found = json.loads(old.read_text())
    assert found["results"]["generate"]["tokens_per_s"] == 100 and found["seconds"] >= 0
    new = tmp_path / "new.json"
    found["results"]["generate"]["tokens_per_s"] = 150
    new.write_text(json.dumps(found))
    assert compare.main([str(old), str(new)]) == 0
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.split() == ["generate.tokens_per_s", "100", "150", "1.500", "better"]
    assert json.loads(last) == {"generate.tokens_per_s": 1.5}
    assert compare.main([str(new), str(old)]) == 0
    assert capsys.readouterr().out.splitlines()[-2].endswith("0.667  worse")
    new.write_text("[]")
    with pytest.raises(SystemExit, match=r"new\.json: expected the output of benchmarks/all\.py, found list"):
        compare.main([str(old), str(new)])


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("train.ours.samples_per_second", 1),
        ("train.ratio", 1),
        ("train.ours.peak_rss_mb", -1),
        ("serve.clients.8.first_token_ms_p99", -1),
        ("long.results.plain.1024.kb_per_token", -1),
        ("long.results.plain.1024.seconds", -1),
        ("size.results.int4.decode.tokens_per_s_at_4", 1),
        ("full.plain_1.estimate_ratio", 0),
        ("cpu_serving.int8.rows.4.median", 0),
    ],
)
def test_which_way_a_figure_is_better(name, better):
    assert compare.direction(name) == better
