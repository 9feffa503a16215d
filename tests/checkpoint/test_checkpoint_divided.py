"""What can't be divided is refused by name."""

import pytest

from ptuning import distributed
from ptuning.checkpoint.base import read_base_config
from ptuning.checkpoint.divided import check_devices, check_division
from ptuning.config import parse
from ptuning.errors import CheckpointError, ConfigError, ModelError
from ptuning.families import read_config
from ptuning.loading import load_base
from ptuning.methods import attach_checkpoint
from ptuning.quantization import chosen
from tests.conftest import REPO
from tests.end_to_end.conftest import MODEL
from tests.serving.test_serving_loras import lora_folders

__all__ = ["lora_folders"]  # a fixture

BAICHUAN = REPO / "models" / "baichuan-tiny"


@pytest.mark.parametrize(
    ("folder", "asked", "processes", "said"),
    [
        (MODEL, ("none", None), 1, "--device_map is 'none'; use auto"),
        (MODEL, ("auto", 2), 2, "--device_map divides layers, --tensor_parallel matrices; give one"),
        (MODEL, (None, 2), 1, "--tensor_parallel 2 with 1 process; .* torchrun --nproc-per-node 2 -m ptuning.cli"),
        (MODEL, (None, 2), 4, "--tensor_parallel 2 with 4 processes"),
        (MODEL, (None, 1), 1, "--tensor_parallel 1 with 1 process; start as many as divide the model, 2 or more"),
        (MODEL, (None, 3), 3, "2 groups of keys and values, which 3 processes can't divide evenly; use 2$"),
        (BAICHUAN, (None, 2), 2, "--tensor_parallel 2: ALiBi's slopes belong to all heads together; give --device_map"),
    ],
)
def test_refused(folder, asked, processes, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    read_base_config(folder)
    with pytest.raises(ConfigError, match=said):
        check_division(*asked, read_config(folder), None)


def test_quantised_bases_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for asked, said in ((("auto", None), "--device_map auto"), ((None, 2), "--tensor_parallel 2")):
        with pytest.raises(ConfigError, match=f"{said}: a base in nf4 isn't divided; leave it out, or give the 16-bit"):
            check_division(*asked, read_config(MODEL), chosen(None, "nf4", False))


def test_a_lora_is_refused(lora_folders, monkeypatch):
    model = load_base(MODEL, device="cpu")
    monkeypatch.setattr(distributed, "_divided", True)
    with pytest.raises(CheckpointError, match="a LoRA can't be put on a base that --tensor_parallel divides; merge it"):
        attach_checkpoint(model, lora_folders["low"], MODEL)


def test_layers_outside_the_gpus_are_refused():
    check_devices({"model.layers.0": 0, "model.layers.1": 1}, "m")
    check_devices({"": "cpu"}, "m")
    with pytest.raises(
        ModelError, match="leaves 2 of 3 parts on cpu and disk, because the GPUs have too little memory"
    ):
        check_devices({"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"}, "m")


def test_training_refuses_by_name():
    run = ["--model_name_or_path", "m", "--output_dir", "o", "--train_file", "t", "--do_train"]
    for option in (("--tensor_parallel", "2"), ("--device_map", "auto")):
        with pytest.raises(
            ConfigError, match=f"{' '.join(option)} is for answers; training divides a model with --deep"
        ):
            parse([*run, *option])
