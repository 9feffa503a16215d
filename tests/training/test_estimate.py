"""The estimate against what real runs take, and what it says when there is too little."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ptuning import cli
from ptuning.config import parse
from ptuning.config.options import ModelArguments
from ptuning.errors import ConfigError
from ptuning.families import family_of
from ptuning.families.baichuan.config import BaichuanConfig
from ptuning.families.baichuan.model import BaichuanForCausalLM
from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.logits import loss_of
from ptuning.kernels import CHUNKS, LIGER, products, swap
from ptuning.loading import load_base
from ptuning.methods import FullMethod, PrefixMethod, method_of
from ptuning.methods.prefix.attach import attach_prefix
from ptuning.quantization import chosen, precision_of
from ptuning.training import estimate, kernels
from ptuning.training.estimate import Estimate, estimate_run
from ptuning.training.machine import Machine, cgroup_left, free_disk, process_counts
from ptuning.training.memory import activations, layer_activations, need
from ptuning.training.workload import Workload
from tests.conftest import REPO

TINY = REPO / "tests" / "golden" / "chatglm2-tiny"
REQUIRED = ["--do_train", "--train_file", "x", "--prompt_column", "a", "--response_column", "b", "--report_to", "none"]
FULL = ["--method", "full"]
GB = 10**9
OFFICIAL = {  # THUDM/chatglm2-6b's widths
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 65024,
}
TWELVE = {
    "num_layers": 12,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "multi_query_group_num": 2,
    "kv_channels": 64,
    "ffn_hidden_size": 1536,
    "padded_vocab_size": 3072,
}
ALIBI = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 1536,
    "vocab_size": 3072,
}

# Trains random full-length rows in a process of its own and prints estimate and measured peak, both in bytes.
RUN = """
import json, random, sys
from ptuning.main import build_model, manifest_of
from ptuning.config import parse
from ptuning.data.encode import IGNORE, EncodedRow
from ptuning.families import family_of
from ptuning.methods import method_of
from ptuning.training.estimate import estimate_run
from ptuning.training.kernels import kernels_of, with_product
from ptuning.training.machine import peak_rss
from ptuning.training.run import build_trainer

class Tokenizer:
    pad_token_id, model_input_names = 0, ["input_ids"]

config, _ = parse(sys.argv[1:])
method = method_of(config.model, trains=True)
estimate = estimate_run(config, method)
estimate.require_fit()
kernels = with_product(kernels_of(config, method), config)
draw, length, source = random.Random(0), estimate.work.length, config.data.max_source_length
rows = []
for _ in range(16):
    ids = [draw.randrange(3, estimate.work.shape.vocab) for _ in range(length)]
    rows.append(EncodedRow(ids, [IGNORE] * source + ids[source:], ""))
model = build_model(config, method, print, kernels)
template = family_of(model.config).template(Tokenizer())
manifest = manifest_of(config, method, model.dtype)
build_trainer(config, model, template, method, {"train": rows}, manifest, kernels=kernels).train()
print(json.dumps({"estimate": estimate.need.host_peak, "peak": peak_rss(), "rss": estimate.process_rss}))
"""


@pytest.fixture(scope="session")
def twelve(tmp_path_factory):
    """A 12-layer base with random weights, in the official format."""
    folder = tmp_path_factory.mktemp("twelve")
    torch.manual_seed(0)
    ChatGLMForConditionalGeneration(ChatGLMConfig(**TWELVE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def alibi(tmp_path_factory):
    """As wide, with ALiBi, keys and values of each head, and a normalised output layer."""
    folder = tmp_path_factory.mktemp("alibi")
    torch.manual_seed(0)
    BaichuanForCausalLM(BaichuanConfig(**ALIBI, norm_head=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def official(tmp_path):
    """config.json of the 6B model; there are no weights beside it, so reading any would fail."""
    ChatGLMConfig(**OFFICIAL).save_pretrained(tmp_path / "6b")
    return tmp_path / "6b"


def config_of(base, output_dir, *flags):
    """All weights, unless the flags say otherwise."""
    lengths = ["--max_source_length", "64", "--max_target_length", "128"]
    where = ["--model_name_or_path", str(base), "--output_dir", str(output_dir)]
    method = [] if {"--pre_seq_len", "--method"} & set(flags) else FULL
    return parse([*where, *REQUIRED, *method, *lengths, *map(str, flags)])[0]


def estimate_of(config, *args, **figures) -> Estimate:
    return estimate_run(config, method_of(config.model, trains=True), *args, **figures)


def work_of(config, **figures) -> Workload:
    return Workload.of(config, method_of(config.model, trains=True), **figures)


def zero(name: str) -> dict:
    return json.loads((REPO / "configs" / name).read_text())


# Each method, precision, kind of kernels and checkpointing, in pairs: all of their combinations took five minutes.
IN_ONE_PIECE = ["--kernels", "fast", "--micro_batch_tokens", "0"]
FAST, PLAIN, LORA, PREFIX = ["--kernels", "fast"], ["--kernels", "plain"], ["--method", "lora"], ["--pre_seq_len", "16"]
MEASURED = [
    ("tiny", PREFIX, None, FAST, False),
    ("tiny", LORA, None, PLAIN, True),
    ("tiny", FULL, None, [], False),
    ("tiny", PREFIX, 4, IN_ONE_PIECE, True),
    ("twelve", PREFIX, None, FAST, True),
    ("twelve", PREFIX, None, PLAIN, False),
    ("twelve", PREFIX, 8, IN_ONE_PIECE, False),
    ("twelve", PREFIX, 4, PLAIN, True),
    ("twelve", LORA, None, FAST, False),
    ("twelve", LORA, None, IN_ONE_PIECE, True),
    ("twelve", LORA, None, PLAIN, True),
    ("twelve", FULL, None, [], True),
    ("alibi", PREFIX, None, FAST, True),
    ("alibi", LORA, None, FAST, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "bits", "kernels", "checkpointing"), MEASURED)
def test_within_15_percent_of_the_measured_peak(
    request, tmp_path, warm_bin, name, method, bits, kernels, checkpointing
):
    base = TINY if name == "tiny" else request.getfixturevalue(name)
    flags = ["--model_name_or_path", base, "--output_dir", tmp_path / "out", *REQUIRED]
    flags += ["--max_source_length", 64, "--max_target_length", 128, "--per_device_train_batch_size", 4]
    flags += ["--max_steps", 3, "--save_strategy", "no", "--gradient_checkpointing", checkpointing]
    flags += [*method, *kernels, *([] if bits is None else ["--quantization_bit", bits])]
    command = [warm_bin / "python", "-c", RUN, *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found["estimate"] / found["peak"])
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.15), found


@pytest.mark.parametrize(
    ("asked", "gigabytes"),
    [((8, None, False), 6.75), ((4, None, False), 3.91), ((None, "nf4", False), 4.26), ((None, "nf4", True), 3.99)],
)
def test_a_quantized_base_of_the_6b_shape(official, tmp_path, asked, gigabytes):
    """Matrices of 5.7 B numbers in one byte or half a one, and their scales; 0.53 B in two."""
    precision = chosen(*asked)
    config = config_of(official, tmp_path, "--pre_seq_len", 128, *precision.option.split())
    work = work_of(config, device_type="cuda", processes=(1, 1))
    assert need(work, 0).device["weights"] == pytest.approx(gigabytes * GB, rel=0.01)
    stored = [precision.bytes_of(*each, 2) for each in work.shape.layer_matrices]
    assert work.base_bytes == 28 * sum(stored) + work.plain_parameters * 2
    said = f"base of 6.24 B parameters in {precision.name}"
    assert said in str(estimate_of(config, device_type="cuda", processes=(1, 1)))


def test_bytes_of_a_loaded_quantized_base(twelve, tmp_path):
    for bits in (8, 4):
        config = config_of(twelve, tmp_path, "--pre_seq_len", 16, "--quantization_bit", bits)
        work = replace(work_of(config, device_type="cpu", processes=(1, 1)), scale_bytes=4)
        model = load_base(twelve, device="cpu", precision=precision_of(bits))
        assert work.base_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


def saved_by_autograd(model):
    """Bytes that a forward pass on 2 rows of 100 tokens, 60 of them labels, keeps for the backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(3, 3000, (2, 100))
    labels = ids.clone()
    labels[:, :40] = -100
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, ids, labels)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize(("prefix", "fast"), [(None, False), (16, False), (16, True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(prefix, fast, checkpointing):
    config = ChatGLMConfig(**(TWELVE | {"num_layers": 3}), attn_implementation="sdpa")
    model = ChatGLMForConditionalGeneration(config)
    if prefix is not None:
        attach_prefix(model, prefix)
    if fast:
        swap(model, products()[-1])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    measured = saved_by_autograd(model)
    work = replace(small_work(config, prefix), batch=2, length=100, labels=60, checkpointing=checkpointing)
    if fast:
        work = replace(work, lean=True, split=True, kept_ffn=2, loss_by=CHUNKS)
    counted = activations(work)
    if checkpointing:  # the hook sees neither the layer that is computed again nor what the checkpoints were given
        counted -= layer_activations(work)
        measured += 0 if prefix is None else 2 * prefix * 3 * 2 * 128 * 4
    assert counted == pytest.approx(measured, rel=0.02)
    base = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("prefix_encoder."))
    assert work.shape.parameters == base
    assert work.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("given", [{}, {"lora_dropout": 0.0, "lora_rank": 32}, {"lora_target": ["attention"]}])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_activations_of_a_lora_are_what_autograd_saves(tmp_path, given, fast, checkpointing):
    ChatGLMForConditionalGeneration(ChatGLMConfig(**(TWELVE | {"num_layers": 3}))).save_pretrained(tmp_path)
    options = ModelArguments(str(tmp_path), method="lora", **given)
    method, model = method_of(options, trains=True), load_base(tmp_path, device="cpu")
    method.start(model)
    if fast:
        swap(model, products()[-1])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    measured = saved_by_autograd(model)
    terms = method.memory(family_of(model.config).dimensions(model.config))
    work = replace(small_work(model.config, None), batch=2, length=100, labels=60, checkpointing=checkpointing)
    work = replace(work, frozen=True, trained=terms.trained, inputs=4 * (terms.inputs + terms.dropped))
    if fast:
        work = replace(work, lean=True, split=True, kept_ffn=2, loss_by=CHUNKS)
    counted = activations(work) - (layer_activations(work) if checkpointing else 0)
    # Without dropout query, key and value share one input in fp32, which is counted three times.
    shared = 2 * 512 * 4 * 200 * 3 if given.get("lora_dropout") == 0 and not checkpointing else 0
    # Nothing before the first of the 3 layers needs a gradient, so that some of its masks aren't kept.
    assert counted - shared == pytest.approx(measured, rel=0.06)
    assert work.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def small_work(config, prefix) -> Workload:
    shape = family_of(config).dimensions(config)
    method = FullMethod() if prefix is None else PrefixMethod(prefix)
    terms = method.memory(shape)
    return Workload(
        shape=shape,
        method=method.describe(),
        trained=terms.trained,
        frozen=terms.frozen_base,
        positions=terms.positions,
        weight_bytes=4,
        compute_bytes=4,
        autocast=False,
        batch=1,
        length=10,
        labels=5,
        accumulation=1,
        checkpointing=False,
        eager=False,
        optimizer_bytes=8,
        processes=1,
        local_processes=1,
        cpu=True,
        zero=None,
        checkpoints=1,
        save_optimizer=True,
    )


def test_known_figures_of_the_6b_model(official, tmp_path):
    """12.5 GB of bf16 weights; 16 bytes a parameter for full tuning, divided by ZeRO-3."""
    config = config_of(official, tmp_path, "--pre_seq_len", 128, "--gradient_checkpointing", "true")
    work = work_of(config, device_type="cuda", processes=(1, 1))
    assert work.shape.parameters == 6_243_584_000
    assert work.trained == 1_835_008
    assert need(work, 0).device["weights"] == pytest.approx(12.5 * GB, rel=0.01)
    full = replace(work_of(config_of(official, tmp_path), device_type="cuda", processes=(8, 8)), weight_bytes=2)

    def states(name, processes=8) -> float:
        work = work_of(config_of(official, tmp_path), deepspeed=zero(name), device_type="cuda", processes=(8, 8))
        needed = need(replace(work, weight_bytes=2, compute_bytes=2, processes=processes), 0)
        return sum(needed.device.get(k, 0) for k in ("weights", "optimizer", "gradients")) / full.shape.parameters

    assert states("zero3.json") == pytest.approx(16 / 8, rel=0.01)
    assert states("zero2.json") == pytest.approx(2 + 14 / 8, rel=0.01)
    offload = work_of(
        config_of(official, tmp_path), deepspeed=zero("zero3_offload.json"), device_type="cuda", processes=(1, 1)
    )
    hosted = need(replace(offload, weight_bytes=2), 0).host
    assert hosted["optimizer"] + hosted["weights"] + hosted["gradients"] == 20 * full.shape.parameters


@pytest.mark.parametrize(
    ("gpu_gb", "flags", "fix"),
    [
        (24, ["--pre_seq_len", 128, "--per_device_train_batch_size", 32], "--gradient_checkpointing true"),
        (10, ["--pre_seq_len", 128, "--per_device_train_batch_size", 1], "--quantization_bit 8"),
        (7, ["--pre_seq_len", 128, "--per_device_train_batch_size", 1], "--quantization_bit 4"),
        (80, ["--bf16", "true"], "--deepspeed configs/zero3_offload.json"),
        (30, ["--bf16", "true"], "--method prefix --pre_seq_len 128"),
    ],
)
def test_names_the_nearest_setting_that_fits(official, tmp_path, gpu_gb, flags, fix):
    machine = Machine(host=(400 if gpu_gb == 80 else 30) * GB, disk=10**13, gpu=gpu_gb * GB)
    config = config_of(official, tmp_path, *flags)
    estimate = estimate_of(config, machine, device_type="cuda", processes=(1, 1))
    with pytest.raises(ConfigError, match=r"this run can't fit: it needs memory per GPU .* of .* GB free") as error:
        estimate.require_fit()
    assert fix in str(error.value)
    assert "nearest setting that fits" in str(error.value)


def test_the_nearest_setting_really_fits(official, tmp_path):
    """Following the advice passes the check that gave it."""
    machine = Machine(host=64 * GB, disk=10**13, gpu=16 * GB)
    flags = ["--pre_seq_len", 128, "--per_device_train_batch_size", 64, "--max_source_length", 512]
    with pytest.raises(ConfigError) as error:
        estimate_of(config_of(official, tmp_path, *flags), machine, device_type="cuda", processes=(1, 1)).require_fit()
    advice = str(error.value).split("nearest setting that fits: ")[1].split(" (about")[0].split()
    config = config_of(official, tmp_path, *flags, *advice)
    estimate_of(config, machine, device_type="cuda", processes=(1, 1)).require_fit()
    effective = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    assert effective == 64


def test_too_little_disk(official, tmp_path):
    machine = Machine(host=400 * GB, disk=200 * GB, gpu=10**12)
    flags = ["--max_steps", 3000, "--save_steps", 500]
    estimate = estimate_of(config_of(official, tmp_path, *flags), machine, device_type="cuda", processes=(1, 1))
    with pytest.raises(ConfigError, match=r"disk for checkpoints .* of 200\.0 GB free.*--save_total_limit 1"):
        estimate.require_fit()


def test_nothing_fits(official, tmp_path):
    machine = Machine(host=2 * GB, disk=10**13, gpu=None)
    estimate = estimate_of(config_of(official, tmp_path), machine, processes=(1, 1))
    with pytest.raises(ConfigError, match="No setting fits; the smallest found still needs"):
        estimate.require_fit()


def test_a_run_that_fits_says_what_it_takes(tmp_path):
    estimate = estimate_of(config_of(TINY, tmp_path, "--pre_seq_len", 8), processes=(2, 2))
    assert isinstance(estimate, Estimate)
    estimate.require_fit()
    text = str(estimate)
    assert "prefix of 8, base of" in text
    assert "2 processes" in text
    for row in ("host memory per node", "disk for checkpoints"):
        assert row in text
    assert text.count("fits") == 2


def test_a_real_longest_row_counts_instead_of_the_limit(tmp_path):
    config = config_of(TINY, tmp_path, "--max_source_length", 4096)
    assert activations(work_of(config, longest=(100, 50))) < activations(work_of(config)) / 10


def test_a_batch_in_pieces_takes_the_memory_of_one(tmp_path):
    flags = ["--pre_seq_len", 16, "--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 1]
    whole, pieces, plain = (
        work_of(config_of(TINY, tmp_path, *flags, *more), device_type="cpu")
        for more in (["--micro_batch_tokens", 0], [], ["--kernels", "plain"])
    )
    assert (pieces.lean, pieces.split, pieces.kept_ffn, pieces.micro_batch_tokens) == (True, True, 2, 512)
    assert (plain.lean, plain.split, plain.kept_ffn, plain.micro_batch_tokens) == (False, False, 3, 0)
    assert activations(pieces) == pytest.approx(activations(whole) * 512 / (16 * 193), rel=0.01)
    assert activations(whole) < activations(plain)
    assert pieces.accumulates and not whole.accumulates
    # A row longer than a piece is a piece by itself.
    assert activations(replace(pieces, micro_batch_tokens=10)) == activations(replace(pieces, batch=1))


@pytest.mark.parametrize(
    ("flags", "by"),
    [
        (["--pre_seq_len", 128], CHUNKS),
        (["--method", "lora"], CHUNKS),
        (["--method", "lora", "--quantization_bit", 4], CHUNKS),
        (["--pre_seq_len", 128, "--kernels", "plain"], None),
        (["--pre_seq_len", 128, "--bf16", "true"], None),
        (["--pre_seq_len", 128, "--torch_compile", "true"], None),
        (["--method", "full"], None),
    ],
)
def test_a_gpu_has_no_more_logits_than_its_loss_computes(official, tmp_path, flags, by):
    """65,024 logits a label in fp32 where plain modules compute the loss, else 4,096 numbers of its gradient in bf16."""
    config = config_of(official, tmp_path, *flags, "--per_device_train_batch_size", 16)
    work = work_of(config, device_type="cuda", processes=(1, 1))
    assert work.chunked == by
    all_logits, labels = replace(work, loss_by=None), 16 * 129
    saved = labels * (65024 * 4 - 4096 * 2) if by else 0
    assert activations(all_logits) - activations(work) == saved
    if by:
        peaks = [need(each, 0).device_peak for each in (all_logits, work)]
        assert peaks[0] - peaks[1] > saved  # and the logits' gradient
    zero2 = work_of(config, deepspeed=zero("zero2.json"), device_type="cuda", processes=(1, 1))
    assert zero2.chunked is None


def test_matrices_in_bf16_lie_beside_the_base(official, tmp_path, monkeypatch):
    """Packed twice, 4 bytes a number of the layers' matrices; the advice where it doesn't fit begins with leaving them."""
    config = config_of(official, tmp_path, "--pre_seq_len", 128, "--kernels", "bf16", "--dtype", "float32")
    work = work_of(config, device_type="cpu", processes=(1, 1))
    fast = replace(work, narrow=False)
    assert need(work, 0).device["16-bit copies"] == 28 * 4 * (4096 * (4096 + 512) + 4096 * 4096 + 3 * 4096 * 13696)
    assert need(work, 0).device_peak - need(fast, 0).device_peak == work.narrow_bytes
    machine = Machine(host=40 * GB, disk=10**13, gpu=None)
    with pytest.raises(ConfigError, match="nearest setting that fits: --kernels fast"):
        estimate_of(config, machine, device_type="cpu", processes=(1, 1)).require_fit()


def test_on_this_machine_it_is_the_loss_that_is_installed(official, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "gpu_loss", lambda: LIGER)
    config = config_of(official, tmp_path, "--pre_seq_len", 128)
    assert work_of(config, processes=(1, 1)).loss_by == CHUNKS  # on a CPU, by the fast kernels
    config.training.use_cpu = False
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert work_of(config, processes=(1, 1)).loss_by == LIGER


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cgroup_limits(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("0::/a/b\n")
    for group, limit in (("a", "1000"), ("a/b", "max")):
        write(root / group / "memory.max", limit + "\n")
        write(root / group / "memory.current", "700\n")
        write(root / group / "memory.stat", "anon 500\ninactive_file 150\n")
    assert cgroup_left(root, membership) == 450  # the parent's limit, dropped cache counted as free
    membership.write_text("0::/outside/of/the/container\n")
    assert cgroup_left(root / "a", membership) == 450
    (root / "a" / "memory.max").write_text("max\n")
    assert cgroup_left(root, membership) is None
    membership.write_text("4:memory:/job\n0::/\n")
    write(root / "memory" / "job" / "memory.limit_in_bytes", "5000")
    write(root / "memory" / "job" / "memory.usage_in_bytes", "4000")
    write(root / "memory" / "job" / "memory.stat", "total_inactive_file 10\n")
    assert cgroup_left(root, membership) == 1010
    (root / "memory" / "job" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert cgroup_left(root, membership) is None
    assert cgroup_left(root, tmp_path / "not there") is None


def test_free_disk_of_a_folder_that_is_not_there(tmp_path):
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(free_disk(tmp_path), rel=0.1)


def test_process_counts(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert process_counts() == (1, 1)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert process_counts() == (16, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # accelerate's, under DeepSpeed's launcher
    assert process_counts() == (16, 8)


def test_the_command(official, capsys, tmp_path):
    """`ptuning estimate` needs only the model, and answers for another machine than this one."""
    flags = [
        "estimate",
        "--model_name_or_path",
        str(official),
        "--max_source_length",
        "64",
        "--output_dir",
        str(tmp_path),
    ]
    elsewhere = ["--gpu_memory_gb", "80", "--host_memory_gb", "1000", "--num_gpus", "8"]
    zero3 = ["--deepspeed", str(REPO / "configs" / "zero3.json"), "--save_total_limit", "1", "--max_steps", "10"]
    status = cli.main([*flags, *elsewhere, *zero3, "--save_strategy", "no"])
    printed = capsys.readouterr()
    assert "all weights, base of 6.24 B parameters, 8 processes (8 on this node), ZeRO-3" in printed.out
    assert "of   80.0 GB free" in printed.out
    assert status == 0, printed.err
    assert cli.main([*flags, *FULL, "--gpu_memory_gb", "24", "--host_memory_gb", "32", "--save_strategy", "no"]) == 2
    printed = capsys.readouterr()
    assert "too much" in printed.out
    assert "nearest setting that fits: --method prefix --pre_seq_len 128" in printed.err
    assert cli.main([*flags, "--gpu_memory_gb", "40", "--host_memory_gb", "32", "--save_strategy", "no"]) == 0
    assert "Estimate for prefix of 128, base of 6.24 B parameters, 1 process" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value"),
    [("num_gpus", "0"), ("num_nodes", "0"), ("gpu_memory_gb", "0"), ("host_memory_gb", "-1"), ("disk_gb", "nan")],
)
def test_a_size_that_is_none(official, capsys, flag, value):
    assert cli.main(["estimate", f"--{flag}", value, "--model_name_or_path", str(official)]) == 2
    assert f"error: --{flag} is {value}; use " in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--gpu_memory_gb", "80"], ["--host_memory_gb", "2000"]])
def test_another_machine_is_all_that_counts(official, capsys, monkeypatch, given):
    """Nothing of this one: neither its memory and disk, nor whether it has DeepSpeed or a GPU without bf16."""
    here = (
        *(f"ptuning.training.machine.{name}" for name in ("free_disk", "available_memory")),
        "torch.cuda.mem_get_info",
    )
    for name in here:
        monkeypatch.setattr(name, lambda *_: pytest.fail("asked this machine"))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a))
    zero = ["--deepspeed", str(REPO / "configs" / "zero3.json"), "--num_gpus", "8"]
    flags = ["estimate", "--model_name_or_path", str(official), "--output_dir", "/not/here", *zero, *given]
    flags += ["--per_device_train_batch_size", "1", "--max_source_length", "64"]
    assert cli.main(flags) == 0
    printed = capsys.readouterr().out
    assert ("memory per GPU" in printed) == (given[0] == "--gpu_memory_gb")
    assert "(what there is: --disk_gb)" in printed
    assert cli.main([*flags, "--disk_gb", "30"]) == 2
    printed = capsys.readouterr()
    assert "of   30.0 GB free: too much" in printed.out
    assert "it needs disk for checkpoints" in printed.err and "--save_strategy no" in printed.err


def test_another_disk_of_this_machine(capsys):
    flags = ["estimate", "--model_name_or_path", str(TINY), "--pre_seq_len", "8"]
    assert cli.main([*flags, "--disk_gb", "0.000001"]) == 2
    assert "it needs disk for checkpoints" in capsys.readouterr().err


def test_a_gpu_elsewhere_trains_all_weights_in_bf16(official, capsys):
    flags = ["estimate", "--model_name_or_path", str(official), *FULL, "--gpu_memory_gb", "200"]
    assert cli.main(flags) == 0
    assert "16-bit copies 12.5 GB" in capsys.readouterr().out


@pytest.fixture(scope="module")
def fresh_rss() -> int:
    """Bytes of a process that only estimates; that of the tests has grown by whatever ran in it before."""
    code = "import ptuning.training.estimate as estimate; print(estimate.current_rss())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("file", ["none", "zero2.json", "zero3.json", "zero3_offload.json", "zero3_nvme.json"])
def test_docs_say_what_the_estimate_says(official, capsys, monkeypatch, fresh_rss, file):
    """Every "X GB with N" in docs/training.md's table of configurations."""
    monkeypatch.setattr(estimate, "current_rss", lambda: fresh_rss)
    lines = (REPO / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if re.match(rf"\| `?{file}`? \|", line)).split(" | ")
    how = ["--method", "full"] if file == "none" else ["--deepspeed", str(REPO / "configs" / file)]
    batch = ["--per_device_train_batch_size", "4", "--max_source_length", "64", "--gradient_checkpointing", "true"]
    flags = ["estimate", "--model_name_or_path", str(official), *how, *batch, "--host_memory_gb", "1000"]
    said = 0
    for name, cell in (("memory per GPU", row[2]), ("host memory per node", row[3])):
        for size, count in re.findall(r"(\d+) GB with (\d+)", cell):
            assert cli.main([*flags, "--gpu_memory_gb", "1000", "--num_gpus", count]) == 0
            found = float(re.search(rf"{name} +([\d.]+) GB", capsys.readouterr().out)[1])
            # A process of the tests is larger than one that only estimates.
            assert int(size) == pytest.approx(found, abs=1 + 0.5 * int(count) * (name != "memory per GPU")), (
                name,
                count,
            )
            said += 1
    assert said >= 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "zero3", "offload"])
def test_two_processes_within_15_percent(warm_bin, way):
    """All weights of the 12-layer model on two processes, through the benchmark, whose last line says estimate / measured."""
    command = [
        warm_bin / "python",
        REPO / "benchmarks" / "full.py",
        "--ways",
        way,
        "--processes",
        "2",
        "--samples",
        "8",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--batch", "8"], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])[f"{way}_2"]
    print(found)
    assert found["estimate_ratio"] == pytest.approx(1, abs=0.15), found


def test_cards_name_what_fits_them(official, capsys):
    """Each cell as the estimate of that run says it."""
    flags = ["estimate", "--model_name_or_path", str(official), "--per_device_train_batch_size", "4"]
    lengths = ["--max_source_length", "64", "--max_target_length", "128"]
    assert cli.main([*flags, *lengths, "--cards"]) == 0
    _, names, *lines = capsys.readouterr().out.splitlines()
    table = {line.split(" GB")[0]: re.split(r"  +", line.split(" GB")[1].strip()) for line in lines}
    columns = names.split()[1:]
    assert columns == ["full", "lora", "prefix", "lora+prefix"]
    assert table["6"][0] == "–" and table["80"][0] == "–"  # all weights need the fp32 state of 6 B
    prefix = {size: cells[columns.index("prefix")] for size, cells in table.items()}
    assert prefix["6"].startswith("int4") and prefix["12"].startswith("int8") and prefix["24"].startswith("16 bit ")
    for size, cell in prefix.items():
        kind, gigabytes = cell.rsplit(" ", 1)
        how = {"16": [], "in": ["--quantization_bit", kind.strip("*")[3:]]}[kind[:2]]
        how += ["--gradient_checkpointing", str("*" in kind).lower()]
        assert "**" not in kind
        assert cli.main([*flags, *lengths, *how, "--method", "prefix", "--gpu_memory_gb", size]) == 0
        said = capsys.readouterr().out
        assert float(re.search(r"memory per GPU +([\d.]+) GB", said)[1]) == pytest.approx(float(gigabytes), abs=0.1), (
            cell
        )
    docs = (REPO / "docs" / "training.md").read_text(encoding="utf-8")
    for size in ("6", "8", "12", "16", "24"):
        assert f"| {size} GB | {' | '.join(table[size])} |" in docs
    assert cli.main([*flags, "--cards", "--num_gpus", "2"]) == 2
    assert "--cards is about one GPU of each size" in capsys.readouterr().err
