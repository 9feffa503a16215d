"""Options that don't go together are refused before loading, and the message says both values and the fix."""

import json
import sys

import pytest

from ptuning.config import parse
from ptuning.errors import ConfigError
from ptuning.methods import method_of
from ptuning.quantization import chosen
from ptuning.training.combinations import check_combinations
from ptuning.training.deepspeed_file import ZeroSettings, check_deepspeed_file, read_deepspeed
from tests.conftest import REPO

BASE = REPO / "tests" / "golden" / "chatglm2-tiny"
REQUIRED = ["--do_train", "--train_file", "x", "--prompt_column", "a", "--response_column", "b"]
REQUIRED += ["--output_dir", "out", "--report_to", "none"]
FULL = ["--method", "full"]


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Checks flags with configs/zero3.json as changed: `{"zero_optimization.stage": 2}`; None deletes. Returns the message."""

    def refuse(changes=None, *flags, file="zero3.json", base=BASE) -> str:
        method = [] if {"--pre_seq_len", "--method"} & set(flags) else FULL
        config, _ = parse(["--model_name_or_path", str(base), *REQUIRED, *method, *map(str, flags)])
        if changes is not None:
            values = json.loads((REPO / "configs" / file).read_text())
            for key, value in changes.items():
                *path, last = key.split(".")
                place = values
                for part in path:
                    place = place.setdefault(part, {})
                place.pop(last, None) if value is None else place.update({last: value})
            path = tmp_path / "ds.json"
            path.write_text(json.dumps(values))
            # Not through the flag: TrainingArguments would make a process group.
            config.training.deepspeed = str(path)
        with pytest.raises(ConfigError) as error:
            check_combinations(config, method_of(config.model, trains=True))
        return str(error.value)

    return refuse


@pytest.mark.parametrize("file", [None, "zero2.json", "zero3.json", "zero3_offload.json", "zero3_nvme.json"])
def test_the_shipped_files_pass(file):
    config, _ = parse(["--model_name_or_path", str(BASE), *REQUIRED, *FULL])
    config.training.deepspeed = file and str(REPO / "configs" / file)
    check_combinations(config, method_of(config.model, trains=True))


@pytest.mark.parametrize(
    ("key", "value", "flags", "said"),
    [
        (
            "train_micro_batch_size_per_gpu",
            4,
            ("--per_device_train_batch_size", 8),
            "train_micro_batch_size_per_gpu is 4 in the file and --per_device_train_batch_size is 8",
        ),
        (
            "gradient_accumulation_steps",
            2,
            ("--gradient_accumulation_steps", 16),
            "gradient_accumulation_steps is 2 in the file and --gradient_accumulation_steps is 16",
        ),
        ("gradient_clipping", 0.5, (), "gradient_clipping is 0.5 in the file and --max_grad_norm is 1"),
        (
            "optimizer.params.lr",
            1e-5,
            ("--learning_rate", "1e-4"),
            "optimizer.params.lr is 1e-05 in the file and --learning_rate is 0.0001",
        ),
        ("bf16.enabled", True, (), "bf16.enabled is true in the file and --bf16 is false"),
        ("fp16.enabled", True, (), "fp16.enabled is true in the file and --fp16 is false"),
        (
            "train_batch_size",
            64,
            ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2),
            "train_batch_size is 64 in the file, and the flags give 4 rows × 2 accumulation steps × 1 processes = 8",
        ),
        (
            "scheduler.params.total_num_steps",
            10,
            ("--max_steps", 20),
            "scheduler.params.total_num_steps is 10 in the file and --max_steps is 20",
        ),
    ],
)
def test_a_contradiction_says_both_values(refusal, key, value, flags, said):
    message = refusal({key: value}, *flags)
    assert said in message
    assert f'"{key.rpartition(".")[2]}": "auto" in the file' in message.split(said)[1]
    assert "ds.json" in message


@pytest.mark.parametrize(
    ("changes", "flags", "said"),
    [
        ({"zero_optimization.stage": "auto"}, (), 'zero_optimization.stage is "auto", which nothing fills in'),
        ({"zero_optimization.stage": 4}, (), "zero_optimization.stage is 4; write 0, 1, 2 or 3"),
        (
            {"zero_optimization.stage3_gather_16bit_weights_on_model_save": "auto"},
            (),
            'on_model_save is "auto", which nothing fills in: it would count as false',
        ),
        (
            {"zero_optimization.stage3_gather_16bit_weights_on_model_save": None},
            (),
            "on_model_save is missing: no model could be saved; write true",
        ),
        (
            {"zero_optimization.offload_optimizer": {"device": "auto"}},
            (),
            'offload_optimizer.device is "auto"; write one of none, cpu, nvme',
        ),
        ({"zero_optimization.offload_param": {"device": "nvme"}}, (), "offload_param.nvme_path is missing"),
        (
            {"zero_optimization.stage": 2, "zero_optimization.offload_param": {"device": "cpu"}},
            (),
            "offload_param needs stage 3, found stage 2",
        ),
        (
            {
                "zero_optimization.stage": 2,
                "zero_optimization.offload_optimizer": {"device": "nvme", "nvme_path": "/x"},
            },
            (),
            "offload to NVMe needs stage 3, found stage 2",
        ),
        (
            {"gradient_clipping": None},
            (),
            "gradient_clipping is missing in the file, so DeepSpeed would not clip, and --max_grad_norm is 1",
        ),
        (
            {"gradient_accumulation_steps": None},
            ("--gradient_accumulation_steps", 4),
            "gradient_accumulation_steps is missing in the file, which means 1, and --gradient_accumulation_steps is 4",
        ),
        ({"fp16.enabled": True, "fp16.loss_scale": 1}, (), "fp16.loss_scale is 1: fp16 without loss scaling"),
        ({"fp16.enabled": True, "bf16.enabled": True}, (), "fp16 and bf16 are both enabled"),
        ({}, ("--torch_compile", "true"), "--torch_compile with ZeRO stage 3"),
        ({}, ("--auto_find_batch_size", "true"), "--auto_find_batch_size with ZeRO stage 3"),
    ],
)
def test_refused_with_the_fix(refusal, changes, flags, said):
    assert said in refusal(changes, *flags)


def test_the_prefix_needs_no_gathered_save(tmp_path):
    values = json.loads((REPO / "configs" / "zero3.json").read_text())
    del values["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    config, _ = parse(["--model_name_or_path", str(BASE), *REQUIRED, "--pre_seq_len", "8"])
    config.training.deepspeed = values
    check_combinations(config, method_of(config.model, trains=True))


def test_several_problems_come_together(refusal):
    message = refusal({"gradient_clipping": 0.5, "zero_optimization.stage": "auto"})
    assert "gradient_clipping is 0.5" in message
    assert "stage is" in message


def test_full_tuning_of_a_quantised_base(refusal, tmp_path):
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_bit": 4}))
    assert "base quantised to int4" in refusal(base=tmp_path)
    assert "Tune a prefix or a LoRA (--method prefix, --method lora), or use the 16-bit base" in refusal(base=tmp_path)
    assert "can't divide weights quantised to int4; use stage 2" in refusal({}, "--pre_seq_len", 8, base=tmp_path)


@pytest.mark.parametrize("precision", [chosen(8, None, False), chosen(4, None, False), chosen(None, "nf4", False)])
def test_quantising_at_load(refusal, precision):
    asked, name = precision.option.split(), precision.name
    assert f"all weights can't be tuned on a base quantised to {name}: rounded weights" in refusal(None, *asked)
    for method in (["--pre_seq_len", 8], ["--method", "lora"]):
        assert f"can't divide weights quantised to {name}; use stage 2" in refusal({}, *method, *asked)


@pytest.mark.parametrize("bits", [8, 4])
def test_dora_on_whole_numbers(refusal, bits):
    message = refusal(None, "--method", "lora", "--use_dora", "true", "--quantization_bit", bits)
    assert (
        f"and peft can't compute it where they are int{bits}; use LoRA (without --use_dora), --quantization nf4"
        in message
    )


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("float16", "fp16 without loss scaling, which ends in NaN"),
        ("bfloat16", "give --bf16 true, which keeps them in fp32"),
    ],
)
def test_full_tuning_of_16_bit_weights(refusal, dtype, said):
    assert said in refusal(None, "--dtype", dtype)


def test_a_16_bit_base_under_a_prefix_passes():
    config, _ = parse(["--model_name_or_path", str(BASE), *REQUIRED, "--pre_seq_len", "8", "--dtype", "bfloat16"])
    check_combinations(config, method_of(config.model, trains=True))


def test_the_deepspeed_file_itself(tmp_path, monkeypatch):
    (tmp_path / "zero3.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"zero_3.json: no such file; did you mean .*zero3.json"):
        check_deepspeed_file(["--do_train", "--deepspeed", str(tmp_path / "zero_3.json")])
    (tmp_path / "bad.json").write_text('{\n  "a": 1,\n}')
    # Python 3.13 points at the comma, earlier ones at the bracket behind it.
    with pytest.raises(ConfigError, match=r"bad.json: not valid JSON .*line [23].*no comma after the last entry"):
        read_deepspeed(str(tmp_path / "bad.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected an object"):
        read_deepspeed(str(tmp_path / "list.json"))
    with pytest.raises(ConfigError, match="zero_optimization is 3"):
        read_deepspeed('{"zero_optimization": 3}')
    check_deepspeed_file(["--do_train", "--deepspeed", str(tmp_path / "zero3.json")])
    check_deepspeed_file(["--do_train"])
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        ConfigError, match=r"deepspeed is not installed; pip install 'ptuning\[full\]', or leave --deepspeed"
    ):
        check_deepspeed_file(["--deepspeed", str(tmp_path / "zero3.json")])


def test_settings_of_the_shipped_files():
    def settings(name):
        return ZeroSettings.of(json.loads((REPO / "configs" / name).read_text()))

    assert settings("zero2.json") == ZeroSettings(2, bucket=200_000_000, torch_adam=True)
    assert settings("zero3.json") == ZeroSettings(3, torch_adam=True)
    assert settings("zero3_offload.json") == ZeroSettings(3, "cpu", "cpu", torch_adam=True)
    assert settings("zero3_nvme.json").offload_param == "nvme"
