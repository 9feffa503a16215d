"""config.json: official names outside, transformers' names inside, other architectures refused by content."""

import json

import pytest
import torch
from transformers import AutoConfig

from ptuning.checkpoint.base import read_base_config
from ptuning.errors import ModelError
from ptuning.families import family_of
from ptuning.families.chatglm2.config import OFFICIAL_NAMES, ChatGLMConfig
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.versions import version_in, version_of
from ptuning.loading import load_tokenizer


@pytest.fixture
def official(golden_dir) -> dict:
    return json.loads((golden_dir / "chatglm2-tiny" / "config.json").read_text(encoding="utf-8"))


def read(folder, values: dict) -> ChatGLMConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return AutoConfig.from_pretrained(folder)


def test_official_names_become_native_ones(tmp_path, official):
    config = read(tmp_path, official)
    assert type(config) is ChatGLMConfig
    native = {"num_hidden_layers": 3, "vocab_size": 320, "intermediate_size": 96, "num_key_value_heads": 2}
    native |= {"head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "attention_bias": True}
    assert {name: getattr(config, name) for name in OFFICIAL_NAMES.values()} == native
    assert {name: getattr(config, name) for name in OFFICIAL_NAMES} == {name: official[name] for name in OFFICIAL_NAMES}
    assert (config.pad_token_id, config.eos_token_id, config.tie_word_embeddings) == (0, 2, False)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def test_every_official_key_is_written_back(tmp_path, official):
    config = read(tmp_path / "in", official)
    config.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert {key: written.get(key) for key in official if key != "transformers_version"} == {
        key: value for key, value in official.items() if key != "transformers_version"
    }
    assert not set(written) & set(OFFICIAL_NAMES.values()), "native names leaked into config.json"
    again = AutoConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(again, name) for name in OFFICIAL_NAMES} == {name: official[name] for name in OFFICIAL_NAMES}
    assert again.rope_parameters == config.rope_parameters


def test_the_defaults_are_the_official_6b():
    config = ChatGLMConfig()
    assert (config.num_layers, config.padded_vocab_size, config.hidden_size) == (28, 65024, 4096)
    assert (config.ffn_hidden_size, config.multi_query_group_num, config.kv_channels) == (13696, 2, 128)
    assert (config.num_attention_heads, config.seq_length, config.add_qkv_bias) == (32, 2048, True)


def test_without_multi_query_attention_every_head_has_its_own_key(tmp_path, official):
    assert read(tmp_path, official | {"multi_query_attention": False}).num_key_value_heads == 4


@pytest.mark.works("chatglm2", "32k")
@pytest.mark.parametrize("rope_ratio", [1, 2, 50])
def test_rope_ratio_divides_positions(tmp_path, official, rope_ratio):
    config = read(tmp_path / "in", official | {"rope_ratio": rope_ratio})
    config.save_pretrained(tmp_path / "out")
    for one in (config, AutoConfig.from_pretrained(tmp_path / "out")):
        model = ChatGLMForConditionalGeneration(one)
        positions = torch.tensor([[0, 1, 7, 200]])
        cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
        frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        angles = (positions[0].double() / rope_ratio)[:, None] * frequencies
        assert torch.allclose(cos[0, :, :4].double(), angles.cos(), atol=1e-5)
        assert torch.allclose(sin[0, :, :4].double(), angles.sin(), atol=1e-5)
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written.get("rope_ratio", 1) == rope_ratio


def test_codegeex2(tmp_path, official):
    name = {"_name_or_path": "THUDM/codegeex2-6b"}
    config = read(tmp_path, official | name | {"seq_length": 8192, "rope_ratio": 1, "torch_dtype": "bfloat16"})
    assert (config.max_position_embeddings, config.rope_parameters["rope_type"]) == (8192, "default")
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_encoding_2d": True}, ["ChatGLM-6B (v1), another architecture"]),
        ({"inner_hidden_size": 16384}, ["ChatGLM-6B (v1), another architecture"]),
        ({"rmsnorm": False}, ["rmsnorm=False means LayerNorm instead of RMSNorm", "(expected True)"]),
        (
            {"apply_residual_connection_post_layernorm": True},
            ["apply_residual_connection_post_layernorm=True means post-layernorm residual", "(expected False)"],
        ),
        ({"add_bias_linear": True}, ["add_bias_linear=True means biases in the dense layers"]),
        ({"post_layer_norm": False}, ["post_layer_norm=False means no final layer norm"]),
        ({"original_rope": False}, ["original_rope=False means a rotary embedding that is not"]),
        ({"vision_config": {"hidden_size": 1792}}, ["this is a model for images (vision_config, as in GLM-4V's)"]),
    ],
)
def test_other_architectures_are_refused_by_content(tmp_path, official, change, words):
    with pytest.raises(ModelError) as caught:
        read(tmp_path / "some-model", official | change)
    message = str(caught.value)
    for word in [*words, "Supported: chatglm2-6b, chatglm2-6b-32k and codegeex2-6b"]:
        assert word in message
    assert "some-model" in message
    with pytest.raises(ModelError) as caught:
        read_base_config(tmp_path / "some-model")
    assert str(caught.value) == message


@pytest.mark.parametrize("folder", ["chatglm2-not-chatglm3", "chatglm3-6b", "chatglm3-6b/chatglm2-6b", "glm-4/tuned"])
def test_a_folders_name_says_nothing(tmp_path, official, folder):
    assert read(tmp_path / folder, official).num_layers == 3
    assert family_of(read_base_config(tmp_path / folder)).name == "chatglm2"
    named = official | {"_name_or_path": "/models/chatglm3-6b/chatglm2-not-chatglm3"}  # as older transformers saved it
    assert read(tmp_path / folder, named).num_layers == 3


TOLD = {
    "its name": ({"_name_or_path": "THUDM/chatglm3-6b"}, {}, "chatglm3"),
    "its name in a path": ({"_name_or_path": "/data/my-ChatGLM3/"}, {}, "chatglm3"),
    "role tokens": (
        {},
        {"tokenizer_config.json": '{"added_tokens_decoder": {"9": {"content": "<|user|>"}}}'},
        "chatglm3",
    ),
    "special tokens": (
        {},
        {"special_tokens_map.json": '{"additional_special_tokens": ["<|observation|>"]}'},
        "chatglm3",
    ),
    "code": ({}, {"tokenization_chatglm.py": 'role_special_tokens = ["<|system|>", "<|user|>"]'}, "chatglm3"),
    "tokenizer's name": ({}, {"tokenizer_config.json": '{"name_or_path": "THUDM/chatglm3-6b"}'}, "chatglm3"),
    "a file that is no JSON": ({}, {"tokenizer_config.json": "{"}, "chatglm2"),
    "GLM-4's name": ({"_name_or_path": "THUDM/glm-4-9b-chat"}, {}, "chatglm4"),
    "GLM-4's vocabulary": ({"padded_vocab_size": 151552}, {}, "chatglm4"),
    "GLM-4's tokenizer": ({}, {"tokenizer_config.json": '{"tokenizer_class": "ChatGLM4Tokenizer"}'}, "chatglm4"),
    "GLM-4's name and roles": (
        {"_name_or_path": "THUDM/glm-4-9b"},
        {"tokenization_chatglm.py": '"<|user|>"'},
        "chatglm4",
    ),
}


@pytest.mark.parametrize(("values", "files", "version"), TOLD.values(), ids=TOLD)
def test_relatives_with_the_same_keys_are_told_apart_by_content(tmp_path, official, values, files, version):
    """Without this one would load as the other and answer with the wrong template."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(official | values), encoding="utf-8")
    assert version_in(folder) == version
    assert version_of(official | values, folder) == version
    model_type = {"chatglm2": "chatglm"}.get(version, version)
    assert read_base_config(folder)["model_type"] == AutoConfig.from_pretrained(folder).model_type == model_type


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_layers": "four"}, 'num_layers is "four" in config.json and must be a whole number of at least 1'),
        ({"hidden_size": 127.5}, "hidden_size is 127.5 in config.json and must be"),
        ({"padded_vocab_size": None}, "padded_vocab_size is null in config.json and must be"),
        ({"kv_channels": [128]}, r"kv_channels is \[128\] in config.json and must be"),
        ({"seq_length": True}, "seq_length is true in config.json and must be"),
        ({"ffn_hidden_size": 0}, "ffn_hidden_size is 0 in config.json and must be"),
        (
            {"num_attention_heads": 7},
            "num_attention_heads is 7 in config.json, and multi_query_group_num, 2, must divide",
        ),
    ],
)
def test_sizes_that_cannot_be_are_named(tmp_path, official, values, text):
    (tmp_path / "config.json").write_text(json.dumps(official | values), encoding="utf-8")
    with pytest.raises(ModelError, match=text) as error:
        load_tokenizer(tmp_path)
    assert len(str(error.value)) < len(str(tmp_path)) + 250


def test_the_cache_is_on_in_a_saved_config_though_training_turned_it_off(tmp_path, official):
    config = read(tmp_path / "in", official)
    config.use_cache = False
    config.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["use_cache"] is True
