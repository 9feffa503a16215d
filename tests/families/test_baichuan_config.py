"""Which of the Baichuan models a folder holds is told by its config.json, and official files are written back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ptuning import load_model
from ptuning.checkpoint.base import base_fingerprint, read_base_config
from ptuning.errors import ConfigError, ModelError
from ptuning.families import family_of
from ptuning.families.baichuan.alibi import bias, slopes
from ptuning.families.baichuan.config import BaichuanConfig
from ptuning.families.baichuan.model import BaichuanForCausalLM, NormHead
from ptuning.families.baichuan.tokenizer import BaichuanTokenizer
from ptuning.loading import load_base
from tests.conftest import REPO

BASE = REPO / "models" / "baichuan-tiny"
SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_hidden_layers": 2, "vocab_size": 64}


def official(golden_dir, name="baichuan2-13b") -> dict:
    return json.loads((golden_dir / "baichuan" / name / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("values", "norm_head", "rotary"),
    [
        ({}, False, False),  # Baichuan-13B
        ({"vocab_size": 125696}, True, False),  # Baichuan2-13B
        ({"hidden_size": 4096, "num_attention_heads": 32}, False, True),  # Baichuan-7B
        ({"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 125696}, True, True),  # Baichuan2-7B
        ({"norm_head": True}, True, False),
        ({"vocab_size": 125696, "norm_head": False}, False, False),
        ({"position_embedding": "ROPE"}, False, True),
        ({"hidden_size": 4096, "num_attention_heads": 32, "position_embedding": "alibi"}, False, False),
    ],
)
def test_told_apart_by_content(values, norm_head, rotary):
    config = BaichuanConfig(num_hidden_layers=1, **values)
    assert (config.has_norm_head, config.is_rotary) == (norm_head, rotary)
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
    assert isinstance(model.lm_head, NormHead) == norm_head
    assert config._attn_implementation == ("sdpa" if rotary else "alibi_sdpa")


def test_an_official_folder_loads_by_the_auto_classes():
    assert type(AutoConfig.from_pretrained(BASE)) is BaichuanConfig
    assert type(AutoTokenizer.from_pretrained(BASE)) is BaichuanTokenizer
    for auto in (AutoModelForCausalLM, AutoModel):
        model, info = auto.from_pretrained(BASE, output_loading_info=True)
        assert type(model) is BaichuanForCausalLM and not any(info.values())
    assert model.generation_config.repetition_penalty == 1.05


@pytest.mark.parametrize("name", ["baichuan-13b", "baichuan2-13b"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_saved_under_official_names(golden_dir, tmp_path, name, max_shard_size):
    folder = golden_dir / "baichuan" / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    before = load_file(folder / "model.safetensors")
    after = {key: tensor for file in tmp_path.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    values, written = official(golden_dir, name), json.loads((tmp_path / "config.json").read_text())
    left_out = {"gradient_checkpointing", "transformers_version"}
    assert {key: value for key, value in values.items() if key not in left_out} == {
        key: value for key, value in written.items() if key not in left_out
    }
    assert base_fingerprint(tmp_path) == base_fingerprint(folder)


def test_files_of_the_7b_models_keep_both_names_of_their_length(tmp_path):
    BaichuanConfig(hidden_size=4096, num_attention_heads=32, model_max_length=512).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_max_length"], written["max_position_embeddings"]) == (512, 512)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "baichuan", "max_position_embeddings": 256}))
    assert AutoConfig.from_pretrained(tmp_path).model_max_length == 256


def test_the_official_checkpointing_switch_is_not_taken_for_true(tmp_path, golden_dir):
    (tmp_path / "config.json").write_text(json.dumps(official(golden_dir) | {"gradient_checkpointing": [False]}))
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "gradient_checkpointing")


def test_a_rotary_one_is_llama(tmp_path):
    torch.manual_seed(0)
    config = BaichuanConfig(**SMALL, position_embedding="rope")
    ours = BaichuanForCausalLM(config).eval()
    theirs = LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=4096)).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        padded = torch.nn.functional.pad(ids, (4, 0))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
        assert (ours(padded, attention_mask=mask).logits[:, 4:] - theirs(ids).logits).abs().max() < 1e-6
    ours.save_pretrained(tmp_path)
    assert read_base_config(tmp_path)["position_embedding"] == "rope"
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, theirs(ids).logits)


def test_rotary_keys_are_turned_as_the_model_turns_them():
    family, config = family_of(BaichuanConfig(**SMALL)), BaichuanConfig(**SMALL, position_embedding="rope")
    model = BaichuanForCausalLM(config)
    keys = torch.randn(5, config.head_dim)
    cos, sin = model.model.rotary_emb(keys, torch.tensor([[7]]))
    half = torch.cat((-keys[:, 8:], keys[:, :8]), dim=-1)
    assert (family.rotate_keys(keys, 7, config) - (keys * cos[0] + half * sin[0])).abs().max() < 1e-5
    assert torch.equal(family.rotate_keys(keys, 7, BaichuanConfig(**SMALL)), keys)


@pytest.mark.parametrize("values", [{}, {"norm_head": True}, {"position_embedding": "rope"}])
def test_the_estimate_counts_every_number(values):
    model = BaichuanForCausalLM(BaichuanConfig(**SMALL, **values))
    sizes = family_of(model.config).dimensions(model.config)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (sizes.output_copy, sizes.score_bias) == (bool(values.get("norm_head")), "position_embedding" not in values)


def test_slopes_of_40_heads():
    found = slopes(40)
    assert found[:32] == slopes(32) and found[32:] == slopes(64)[0::2][:8]
    assert slopes(8) == tuple(2.0**-i for i in range(1, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_falls_with_the_distance_whatever_the_padding(dtype):
    visible = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    visible[1, :, :, :2] = False
    whole, padded = bias(visible, 4, dtype).float().softmax(-1)
    assert torch.allclose(padded[:, 2:, 2:], whole[:, :4, :4], atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_texts_behind_each_other_in_a_row_keep_their_distances():
    """Of several texts in one row each query sees its own alone."""
    one, both = torch.ones(4, 4, dtype=torch.bool).tril(), torch.zeros(8, 8, dtype=torch.bool)
    both[:4, :4] = both[4:, 4:] = one
    alone, found = (bias(visible[None, None], 4, torch.float32).softmax(-1) for visible in (one, both))
    assert torch.allclose(found[:, :, :4, :4], alone) and torch.allclose(found[:, :, 4:, 4:], alone)


def test_16_bit_numbers_tell_near_keys_apart_far_from_the_start():
    """The official code's biases there, slope times position, are up to 16 apart."""
    visible = torch.ones(1, 1, 1, 4000, dtype=torch.bool)
    exact, found = (bias(visible, 40, dtype).float().softmax(-1) for dtype in (torch.float32, torch.bfloat16))
    assert (exact - found).abs().max() < 2e-3


REFUSED = [
    ({"hidden_size": 0}, "hidden_size is 0 in config.json and must be a whole number of at least 1"),
    ({"vocab_size": "64000"}, 'vocab_size is "64000" in config.json'),
    ({"num_attention_heads": 7}, "hidden_size is 80 in config.json, and num_attention_heads, 7, must divide it"),
    (
        {"position_embedding": "nope"},
        'position_embedding is "nope" in config.json, expected one of alibi, rope. Supported: Bai',
    ),
    (
        {"quantization_config": {"load_in_4bit": True}},
        "quantised by bitsandbytes.* use the 16-bit model with --quantization nf4",
    ),
]


@pytest.mark.parametrize(("values", "text"), REFUSED)
def test_what_is_refused(tmp_path, golden_dir, values, text):
    shutil.copytree(golden_dir / "baichuan" / "baichuan2-13b", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(official(golden_dir) | values))
    with pytest.raises(ModelError, match=text):
        load_base(tmp_path, device="cpu")


def test_attention_that_has_no_alibi_is_refused():
    with pytest.raises(
        ConfigError, match="'flex_attention', and the ALiBi of this model is computed by sdpa or eager alone"
    ):
        load_model(BASE, attn_implementation="flex_attention", device="cpu")


def test_heads_divided_among_processes_are_refused(golden_dir):
    model = load_base(golden_dir / "baichuan" / "baichuan-13b", device="cpu")
    model.config.num_attention_heads = 10
    with pytest.raises(ConfigError, match="5 of 10 heads are here: a model with ALiBi can't be divided by heads"):
        model(torch.tensor([[5, 6]]))
