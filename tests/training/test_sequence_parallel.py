"""--sequence_parallel: two processes that divide each row train what one process trains; and what doesn't go with it."""

import json
import subprocess

import pytest
import torch

from ptuning.config import parse
from ptuning.data.batch import PadRight
from ptuning.data.positions import OwnPositions, SharedBatches
from ptuning.errors import ConfigError
from ptuning.families import family_of
from ptuning.families.glm130b.config import GLM130BConfig
from ptuning.methods import defaults_of, method_of
from ptuning.methods.prefix.read import read_prefix
from ptuning.training.combinations import check_combinations
from ptuning.training.kernels import kernels_of
from ptuning.training.workload import Workload
from tests.conftest import REPO
from tests.training.divided_rows import RUNS, SCRIPT, train, train_by_options

BASE = REPO / "tests" / "golden" / "chatglm2-tiny"


def config_of(*flags, base=BASE, trains=True):
    argv = ["--do_train", "--train_file", "x"] if trains else ["--do_predict", "--test_file", "x"]
    argv += ["--model_name_or_path", str(base), "--prompt_column", "a", "--response_column", "b"]
    argv += ["--output_dir", "out", "--report_to", "none"]
    return parse([*argv, *map(str, flags)], defaults=defaults_of)[0]


def refusal(monkeypatch, config, *, processes=2, trains=True) -> str:
    monkeypatch.setenv("WORLD_SIZE", str(processes))  # after TrainingArguments, which would wait for the others
    with pytest.raises(ConfigError) as error:
        check_combinations(config, method_of(config.model, trains))
    return str(error.value)


def test_each_process_has_its_positions_of_the_same_rows():
    items = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "row": 4}]
    items += [{"input_ids": [5, 6], "labels": [-100, 6], "row": 2}]
    parts = [OwnPositions(PadRight(0), place, 2)(items) for place in range(2)]
    assert [part["input_ids"].tolist() for part in parts] == [[[5, 6, 7], [5, 6, 0]], [[8, 9, 0], [0, 0, 0]]]
    assert [part["position_ids"].tolist() for part in parts] == [[[0, 1, 2]] * 2, [[3, 4, 5]] * 2]
    # the first part's last token predicts 8, the second's first one
    assert parts[0]["labels"].tolist() == [[-100, -100, 7, 8], [-100, 6, -100, -100]]
    assert parts[1]["labels"].tolist() == [[8, 9, -100, -100], [-100] * 4]
    assert all(part["row"].tolist() == [4, 2] for part in parts)
    batches = SharedBatches([[4, 2], [1]], 2)  # type: ignore[arg-type]
    assert list(batches) == [[4, 2], [4, 2], [1], [1]] and len(batches) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "lora"], "with --method lora: processes that have parts of the same rows train a prefix alone"),
        (["--method", "full"], "with --method full: processes that have parts of the same rows train a prefix alone"),
        (["--attn_implementation", "eager"], "with --attn_implementation eager; use sdpa"),
        (["--micro_batch_tokens", 64], "with --micro_batch_tokens 64: pieces are whole rows, which no process has"),
        (["--loss_average", "rows"], "with --loss_average rows: no process has all labels of a row; use tokens"),
        (["--train_sampling_strategy", "random"], "random, which each process draws for itself; use group_by_length"),
        (["--torch_compile", "true"], "with --torch_compile, with which it has not been tried"),
        (["--auto_find_batch_size", "true"], "with --auto_find_batch_size, with which it has not been tried"),
        (["--neftune_noise_alpha", 5], "with --neftune_noise_alpha, with which it has not been tried"),
        (["--average_tokens_across_devices", "false"], "each process has some labels of every row; leave it out"),
    ],
)
def test_what_refuses(monkeypatch, flags, said):
    text = refusal(monkeypatch, config_of("--sequence_parallel", 2, *flags))
    assert text.startswith("--sequence_parallel 2 with ") and said in text


def test_deepspeed_refuses(monkeypatch):
    config = config_of("--sequence_parallel", 2)
    config.training.deepspeed = str(REPO / "configs" / "zero2.json")  # the flag itself would make a process group
    said = "--sequence_parallel 2 with --deepspeed, whose engine takes each process's rows for its own; leave one of the two out"
    assert said in refusal(monkeypatch, config)


@pytest.mark.parametrize(
    ("number", "processes", "said"),
    [
        (
            2,
            1,
            "2: there is 1 process, and each row is divided among all of them; start with torchrun --nproc-per-node 2",
        ),
        (2, 4, "2: there are 4 processes, and each row is divided among all of them"),
        (4, 4, "a share of 4 heads and 2 key/value groups, which 4 doesn't divide; use 2"),
    ],
)
def test_the_number_of_processes(monkeypatch, number, processes, said):
    assert said in refusal(monkeypatch, config_of("--sequence_parallel", number), processes=processes)


def test_bases_whose_rows_cant_be_divided(monkeypatch):
    alibi = config_of("--sequence_parallel", 2, base=REPO / "tests" / "golden" / "baichuan" / "baichuan-13b")
    text = refusal(monkeypatch, alibi)
    assert "this base's attention adds a bias to each head's scores, which is made for whole rows; leave it out" in text
    assert "a share of 5 heads and 5 key/value groups, which 2 doesn't divide; use 5" in text
    both_ways = GLM130BConfig()
    assert "finds positions" in str(family_of(both_ways).sequence_parallel_refusal(both_ways))


def test_it_is_for_training(monkeypatch):
    config = config_of("--sequence_parallel", 2, trains=False)
    assert "--sequence_parallel 2 is for training; leave it out" in refusal(monkeypatch, config, trains=False)
    with pytest.raises(ConfigError, match=r"--sequence_parallel is 1; use at least 2 \(the processes of torchrun\)"):
        config_of("--sequence_parallel", 1)


def test_what_follows(monkeypatch):
    """No pieces, and half of a row's positions in each process's memory."""
    config = config_of("--sequence_parallel", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    method = method_of(config.model, trains=True)
    check_combinations(config, method)
    assert kernels_of(config, method).micro_batch_tokens == 0 and kernels_of(config, method).fast
    work = Workload.of(config, method, longest=(1001, 900))
    assert (work.length, work.labels) == (501, 501)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path, warm_bin):
    """Losses, gradient norms and the prefix, with its dropout, checkpointing, accumulation, a projection, and on one a process
    without labels; the eval loss on whole rows; and a resumed run to the last bit."""
    texts = ["类型#裙*" + "长袖*" * n for n in range(1, 6)]
    for folder in (tmp_path, tmp_path / "alone"):
        folder.mkdir(exist_ok=True)
        rows = "\n".join(json.dumps({"q": text, "a": text[::-1]}) for text in texts)
        (folder / "rows.json").write_text(rows, encoding="utf-8")
    command = [warm_bin / "torchrun", "--standalone", "--nproc-per-node=2", SCRIPT, tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "each row is divided among 2 processes (--sequence_parallel)" in done.stdout
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in RUNS:
        ours, alone = found[0][name], train(tmp_path, name, None)
        for key in alone["prefix"]:
            assert torch.equal(ours["prefix"][key], found[1][name]["prefix"][key]), key
            assert (ours["prefix"][key] - alone["prefix"][key]).abs().max() <= 1e-5, key
        for figure in ("losses", "norms"):
            assert ours[figure] == pytest.approx(alone[figure], abs=1e-5), figure
        assert ours["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-5)
        assert ours["rate"] == pytest.approx(alone["rate"], rel=1e-2)  # rows of a step
        # half of each row's tokens, and one more where they are odd
        assert all(0 <= 2 * here - whole <= 4 * 8 for here, whole in zip(ours["tokens"], alone["tokens"], strict=True))
    for key, tensor in found[0]["fast"]["prefix"].items():
        assert torch.equal(found[0]["resumed"]["prefix"][key], tensor)
    # pieces would take the rows in another order, each with another one's dropout
    assert train_by_options(tmp_path / "alone", "--micro_batch_tokens", "0") == 0
    ours, alone = (read_prefix(folder / "out").tensors["embedding.weight"] for folder in (tmp_path, tmp_path / "alone"))
    assert (ours - alone).abs().max() <= 1e-5
    scores = [json.loads((folder / "out" / "metrics.json").read_text()) for folder in (tmp_path, tmp_path / "alone")]
    assert scores[0]["validation"]["eval_loss"] == pytest.approx(scores[1]["validation"]["eval_loss"], abs=1e-5)
