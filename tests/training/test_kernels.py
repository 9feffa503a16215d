"""Which kernels a run trains with: the default, what refuses, the record, and the run that goes on."""

import json
import subprocess

import pytest
import torch

from ptuning.config import parse
from ptuning.errors import ConfigError
from ptuning.kernels import BF16, CHUNKS, LIGER, ONEDNN, TORCH, narrow_refusal
from ptuning.main import main
from ptuning.methods import defaults_of, method_of
from ptuning.methods.prefix.read import read_prefix
from ptuning.runs import RunRecord
from ptuning.training import kernels
from ptuning.training.combinations import check_combinations
from ptuning.training.kernels import MICRO_BATCH_TOKENS, Kernels, kernels_of, with_gpu_loss, with_product
from tests.conftest import REPO
from tests.training.two_ranks import SCRIPT

BASE = REPO / "tests" / "golden" / "chatglm2-tiny"
DEMO = REPO / "models" / "chatglm2-tiny"
FAST = {"kernels": "fast", "product": "torch", "micro_batch_tokens": MICRO_BATCH_TOKENS, "answers": "torch"}
FAST |= {"gpu_loss": None}
NARROW = FAST | {"kernels": "bf16", "product": "bf16"}


def config_of(*flags, trains=True):
    need = ["--train_file", "x"] if trains else ["--test_file", "x"]
    argv = ["--do_train" if trains else "--do_predict", "--model_name_or_path", str(BASE), *need]
    argv += ["--prompt_column", "a", "--response_column", "b", "--output_dir", "out", "--report_to", "none"]
    return parse([*argv, *map(str, flags)], defaults=defaults_of)[0]


def found(*flags, before=None, **known) -> Kernels:
    config = config_of(*flags)
    return kernels_of(config, method_of(config.model, trains=True), before, **known)


@pytest.mark.parametrize("method", ["prefix", "lora", "lora+prefix"])
def test_a_frozen_base_on_a_cpu_has_the_fast_ones(method):
    assert found("--method", method).to_dict() == FAST


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        (["--method", "full"], {}),
        (["--kernels", "plain"], {}),
        (["--bf16", "true"], {}),
        (["--torch_compile", "true"], {}),
        ([], {"device_type": "cuda"}),
        ([], {"deepspeed": True}),
    ],
)
def test_elsewhere_it_is_transformers_own(flags, known):
    assert found(*flags, **known) == Kernels()
    assert found(*flags, "--micro_batch_tokens", 64, **known) == Kernels(micro_batch_tokens=64)


@pytest.mark.parametrize(
    ("flags", "trains", "said"),
    [
        (
            ["--method", "full", "--kernels", "fast"],
            True,
            "--kernels fast: they are for a frozen base (--method prefix or lora), and all weights train; leave it out",
        ),
        (
            ["--bf16", "true", "--kernels", "fast"],
            True,
            "--kernels fast: --bf16 and --fp16 convert weights at each product; leave it out",
        ),
        (
            ["--torch_compile", "true", "--kernels", "fast"],
            True,
            "--kernels fast: --torch_compile makes kernels of its own; leave it out",
        ),
        (
            ["--method", "full", "--kernels", "bf16"],
            True,
            "--kernels bf16: they are for a frozen base (--method prefix or lora), and all weights train; leave it out",
        ),
        (
            ["--dtype", "bfloat16", "--kernels", "bf16"],
            True,
            "--kernels bf16: they are for a base in float32, and --dtype makes it bfloat16; leave it out",
        ),
        (
            ["--quantization_bit", "8", "--kernels", "bf16"],
            True,
            "--kernels bf16: they are for the matrices of a base in float32, and a quantised one multiplies in its own way; leave",
        ),
        (["--kernels", "bf16"], True, "--kernels bf16: no such instruction; leave it out"),
        (["--micro_batch_tokens", "64"], False, "--micro_batch_tokens is for training; leave it out"),
        (["--kernels", "bf16"], False, "--kernels bf16 is for training; leave it out"),
    ],
)
def test_what_refuses(monkeypatch, flags, trains, said):
    monkeypatch.setattr(kernels, "narrow_refusal", lambda: "no such instruction")
    config = config_of(*flags, trains=trains)
    with pytest.raises(ConfigError) as error:
        check_combinations(config, method_of(config.model, trains))
    assert said in str(error.value)


def test_deepspeed_refuses_both():
    config = config_of("--kernels", "fast", "--micro_batch_tokens", 64)
    config.training.deepspeed = str(REPO / "configs" / "zero2.json")  # the flag itself would make a process group
    with pytest.raises(ConfigError) as error:
        check_combinations(config, method_of(config.model, trains=True))
    assert "--kernels fast: DeepSpeed handles weights and gradients in its own way; leave it out" in str(error.value)
    assert (
        "--micro_batch_tokens 64: DeepSpeed's engine counts backward passes, one a batch; leave it out, and give fewer rows"
        in str(error.value)
    )


def test_a_gpu_refuses():
    config = config_of("--kernels", "fast")
    config.training.use_cpu = False
    said = kernels.check_kernels(config, method_of(config.model, trains=True))
    assert said == ["--kernels fast: they are for CPUs, and this run is on a GPU; leave it out"]


def test_a_number_below_0():
    with pytest.raises(ConfigError, match=r"--micro_batch_tokens is -1; use at least 1 \(0: no pieces\)"):
        config_of("--micro_batch_tokens", -1)


@pytest.mark.parametrize(
    ("recorded", "flags", "expected"),
    [
        ({}, [], Kernels()),  # a run of an older version goes on as it began
        (FAST | {"micro_batch_tokens": 100}, [], Kernels("fast", TORCH, 100)),
        (FAST, ["--kernels", "plain"], Kernels("plain", TORCH, MICRO_BATCH_TOKENS)),  # refused by the comparison
        (Kernels(micro_batch_tokens=7).to_dict(), [], Kernels(micro_batch_tokens=7)),
        (FAST, ["--micro_batch_tokens", 0], Kernels("fast", TORCH, 0)),
        (NARROW, [], Kernels("bf16", BF16, MICRO_BATCH_TOKENS)),
        (NARROW, ["--kernels", "fast"], Kernels("fast", TORCH, MICRO_BATCH_TOKENS)),  # refused by the comparison
        (FAST, ["--kernels", "bf16"], Kernels("bf16", BF16, MICRO_BATCH_TOKENS)),  # too
    ],
)
def test_a_resumed_run_keeps_what_isnt_given(recorded, flags, expected):
    assert found(*flags, before=RunRecord(kernels=recorded)) == expected


def test_products_in_bf16_arent_measured_and_go_on_where_they_can(monkeypatch):
    monkeypatch.setattr(kernels, "fastest_product", lambda: pytest.fail("measured"))
    monkeypatch.setattr(kernels, "narrow_refusal", lambda: None)
    config = config_of("--kernels", "bf16")
    new = with_product(kernels_of(config, method_of(config.model, True)), config)
    assert (new.kernels, new.product, new.fast, new.loss) == ("bf16", BF16, True, CHUNKS)
    before = RunRecord(kernels=new.to_dict())
    assert with_product(found(before=before), config_of(), before) == new
    monkeypatch.setattr(kernels, "narrow_refusal", lambda: "this processor doesn't")
    with pytest.raises(
        ConfigError, match="was trained with --kernels bf16, and this processor doesn't; continue it on a mach"
    ):
        with_product(found(before=before), config_of(), before)


def test_a_record_of_a_later_version():
    with pytest.raises(
        ConfigError, match=r"the record of the run has kernels .*'tiles': 3.*doesn't know; continue it with"
    ):
        found(before=RunRecord(kernels={"tiles": 3}))


def test_the_product_is_measured_once_and_kept(monkeypatch):
    monkeypatch.setattr(kernels, "products", lambda: (TORCH, ONEDNN))
    monkeypatch.setattr(kernels, "fastest_product", lambda: ONEDNN)
    config, fast = config_of(), Kernels("fast", TORCH, 512)
    assert with_product(fast, config).product == ONEDNN
    before = RunRecord(kernels=fast.to_dict())
    assert with_product(kernels_of(config, method_of(config.model, True), before), config, before).product == TORCH
    kept = RunRecord(kernels=FAST | {"product": ONEDNN})
    resumed = kernels_of(config, method_of(config.model, True), kept)
    assert with_product(resumed, config, kept).product == ONEDNN
    monkeypatch.setattr(kernels, "products", lambda: (TORCH,))
    assert with_product(resumed, config, kept).product == TORCH  # and the comparison of the records says it
    for flags in (["--dtype", "bfloat16"], ["--quantization_bit", "8"]):  # oneDNN's already, or no plain product
        assert with_product(fast, config_of(*flags)).product == TORCH
    assert with_product(Kernels(), config).product == TORCH


@pytest.mark.parametrize(
    ("flags", "recorded", "here", "expected"),
    [
        ([], None, LIGER, LIGER),
        ([], None, CHUNKS, CHUNKS),
        ([], None, None, None),  # no GPU after all
        (["--method", "lora"], None, LIGER, LIGER),
        (["--method", "full"], None, LIGER, None),
        (["--kernels", "plain"], None, LIGER, None),
        (["--bf16", "true"], None, LIGER, None),
        (["--torch_compile", "true"], None, LIGER, None),
        ([], {}, LIGER, None),  # a run of an older version goes on as it began
        ([], {"gpu_loss": CHUNKS}, LIGER, CHUNKS),
        ([], {"gpu_loss": LIGER}, LIGER, LIGER),
        ([], {"gpu_loss": LIGER}, CHUNKS, CHUNKS),  # refused by the comparison
        ([], {"gpu_loss": LIGER}, None, None),
    ],
)
def test_what_computes_the_loss_on_a_gpu(monkeypatch, flags, recorded, here, expected):
    monkeypatch.setattr(kernels, "gpu_loss", lambda: here)
    config, before = config_of(*flags), None if recorded is None else RunRecord(kernels=recorded)
    method = method_of(config.model, trains=True)
    known = kernels_of(config, method, before, device_type="cuda")
    assert with_gpu_loss(known, config, method, before).gpu_loss is None  # a CPU
    config.training.use_cpu = False
    assert with_gpu_loss(known, config, method, before).gpu_loss == expected


def test_what_is_said():
    assert str(Kernels(gpu_loss=LIGER)) == "Training kernels: plain, the loss by liger-kernel"
    assert str(Kernels(gpu_loss=CHUNKS)) == "Training kernels: plain, the loss in chunks of labels"
    assert str(Kernels("fast", ONEDNN, 512)) == (
        "Training kernels: fast, products by oneDNN (measured: faster), at most 512 tokens at a time "
        "(--kernels plain: transformers' own modules, slower)"
    )
    assert str(Kernels()) == "Training kernels: plain"
    assert str(Kernels("bf16", BF16, 512)) == (
        "Training kernels: bf16, frozen matrices multiplied in bf16 (less exact than fp32: --kernels fast), at most 512 tokens at "
        "a time (--kernels plain: transformers' own modules, slower)"
    )


@pytest.mark.parametrize(
    ("product", "options"),
    [
        (TORCH, []),
        (ONEDNN, ["--micro_batch_tokens", "80"]),
        (TORCH, ["--kernels", "plain"]),
        (BF16, ["--kernels", "bf16"]),
    ],
)
def test_a_resumed_run_is_the_run_to_the_last_bit(tmp_path, monkeypatch, capsys, options, product):
    """Three steps at once, and two and one more, through the command line; the second start measures otherwise."""
    if product not in (*kernels.products(), BF16):
        pytest.skip("this torch has no oneDNN")
    if product == BF16 and (why := narrow_refusal()) is not None:
        pytest.skip(why)
    rows = tmp_path / "train.json"
    texts = ["类型#裙*" + "长袖*" * n for n in range(1, 13)]
    rows.write_text("\n".join(json.dumps({"q": text, "a": text[::-1]}) for text in texts), encoding="utf-8")
    flags = ["--do_train", "--model_name_or_path", str(DEMO), "--train_file", str(rows), "--report_to", "none"]
    flags += [
        "--prompt_column",
        "q",
        "--response_column",
        "a",
        "--pre_seq_len",
        "4",
        "--per_device_train_batch_size",
        "4",
    ]
    flags += ["--logging_steps", "1", "--save_steps", "2", "--lr_scheduler_type", "constant", *options]

    def run(folder, steps, chosen, *more):
        monkeypatch.setattr(kernels, "fastest_product", lambda: chosen)
        return main([*flags, "--output_dir", str(tmp_path / folder), "--max_steps", str(steps), *more])

    assert run("whole", 3, product) == 0
    record = json.loads((tmp_path / "whole" / "run.json").read_text())["kernels"]
    assert record["product"] == (TORCH if "plain" in options else product)
    assert run("parts", 2, product) == 0
    other = ONEDNN if product == TORCH else TORCH
    assert run("parts", 3, other, "--resume_from_checkpoint", "true") == 0
    whole, parts = (read_prefix(tmp_path / folder).tensors for folder in ("whole", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    capsys.readouterr()
    changed = ["--kernels", "fast"] if "plain" in options else ["--kernels", "plain"]
    assert run("parts", 4, product, "--resume_from_checkpoint", "true", *changed) == 2
    assert "kernels was" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("loss_average", ["tokens", "rows"])
def test_two_processes_add_up_in_the_last_piece(tmp_path, warm_bin, loss_average):
    """Ranks with different numbers of pieces: the losses and the prefix of whole batches."""
    found = {}
    for tokens in (0, 40):
        command = [warm_bin / "torchrun", "--standalone", "--nproc-per-node=2", SCRIPT]
        command += [tmp_path / str(tokens), tokens, loss_average]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found[tokens] = [torch.load(tmp_path / f"{tokens}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(*(each["prefix"] for each in found[40]))  # both ranks have taken the same steps
    assert found[40][0]["calls"] != found[40][1]["calls"]
    assert (found[40][0]["prefix"] - found[0][0]["prefix"]).abs().max() <= 1e-5
    assert max(abs(a - b) for a, b in zip(found[40][0]["losses"], found[0][0]["losses"], strict=True)) <= 1e-5
