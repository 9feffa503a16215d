"""A LoRA and a prefix together: saving, reading, what belongs together, and what each is alone."""

import json
import shutil

import pytest
import torch

from ptuning.checkpoint.manifest import describe
from ptuning.config.options import ModelArguments
from ptuning.errors import CheckpointError, ConfigError
from ptuning.methods import SaveTarget, attach_checkpoint, attached, bare, detach, method_of, read_checkpoint
from tests.methods.test_lora import logits, randomise


@pytest.fixture(scope="module")
def base(golden_dir):
    return golden_dir / "chatglm2-tiny"


def started(load_tiny, base, **given):
    model = load_tiny()
    method = method_of(ModelArguments(str(base), method="lora+prefix", pre_seq_len=4, **given), trains=True)
    method.start(model)
    randomise(model, seed=0)
    return model.eval(), method


def save(model, method, base, folder):
    about = describe(base, method.name, method.settings())
    method.save(model, None, about, SaveTarget(folder, writes=True, device=torch.device("cpu")))
    return folder


@pytest.mark.parametrize("projection", [False, True])
def test_saved_it_computes_the_same_and_each_part_is_a_checkpoint(load_tiny, base, tmp_path, projection):
    model, method = started(load_tiny, base, prefix_projection=projection)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in trained) and any("prefix_encoder" in name for name in trained)
    assert all("lora_" in name or name.startswith("prefix_encoder") for name in trained)
    assert not any("lora_" in name and name.startswith("prefix_encoder") for name in trained)
    together = logits(model)
    with bare(model):
        alone = logits(model)
    assert torch.equal(alone, logits(load_tiny())) and not torch.allclose(alone, together)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    folder = save(model, method, base, tmp_path / "saved")
    assert read_checkpoint(folder).method == "lora+prefix"
    again = load_tiny()
    attach_checkpoint(again, folder, base)
    assert torch.equal(logits(again), together) and attached(again) is type(method)
    seen = [together, alone]
    for part in ("lora", "prefix"):
        detach(again)
        attach_checkpoint(again, folder / part, base)
        assert not any(torch.allclose(logits(again), other) for other in seen)
        seen.append(logits(again))
    detach(again)
    assert torch.equal(logits(again), alone)


def test_it_goes_on_from_a_checkpoint(load_tiny, base, tmp_path):
    model, method = started(load_tiny, base)
    folder = save(model, method, base, tmp_path / "saved")
    options = ModelArguments(str(base), method="lora+prefix", ptuning_checkpoint=str(folder), lora_dropout=0.3)
    again, more = load_tiny(), method_of(options, trains=True)
    attach_checkpoint(again, folder, base)
    more.start(again)
    assert torch.equal(logits(again.eval()), logits(model))
    with pytest.raises(CheckpointError, match="pre_seq_len is 4 in the checkpoint and 7 was asked for"):
        method_of(ModelArguments(str(base), method="lora+prefix", ptuning_checkpoint=str(folder), pre_seq_len=7), True)


def test_parts_of_two_saves_are_refused(load_tiny, base, tmp_path):
    model, method = started(load_tiny, base)
    folder = save(model, method, base, tmp_path / "one")
    randomise(model, seed=1)
    other = save(model, method, base, tmp_path / "two")
    shutil.rmtree(folder / "lora")
    with pytest.raises(CheckpointError, match=r"one: its part lora/ is missing; copy the whole folder"):
        read_checkpoint(folder)
    shutil.copytree(other / "lora", folder / "lora")
    with pytest.raises(
        CheckpointError, match=r"lora/ptuning_config.json: not of the save that .*one/ptuning_config.json"
    ):
        read_checkpoint(folder)


def test_a_part_alone_is_not_taken_for_both(load_tiny, base, tmp_path):
    folder = save(*started(load_tiny, base), base, tmp_path / "saved")
    options = ModelArguments(str(base), method="lora+prefix", ptuning_checkpoint=str(folder / "lora"))
    with pytest.raises(
        CheckpointError, match=r"expected one of method 'lora\+prefix', found a checkpoint of method 'lora'"
    ):
        method_of(options, trains=True)


def test_options_of_neither_part_are_refused(base):
    with pytest.raises(ConfigError, match="--lora_rank is 0"):
        method_of(ModelArguments(str(base), method="lora+prefix", pre_seq_len=4, lora_rank=0), trains=True)
    with pytest.raises(ConfigError, match="--lora_rank is for --method lora, and --method is prefix"):
        method_of(ModelArguments(str(base), method="prefix", pre_seq_len=4, lora_rank=4), trains=True)


def test_the_manifest_has_the_settings_of_both(load_tiny, base, tmp_path):
    folder = save(*started(load_tiny, base), base, tmp_path / "saved")
    settings = json.loads((folder / "ptuning_config.json").read_text())["settings"]
    assert (settings["lora_rank"], settings["pre_seq_len"], settings["prefix_projection"]) == (8, 4, False)
