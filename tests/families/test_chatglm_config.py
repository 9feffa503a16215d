"""config.json: official names outside, transformers' names inside, other architectures refused by name."""

import json

import pytest
import torch
from transformers import AutoConfig

from ptuning.errors import ModelError
from ptuning.families.chatglm2.config import OFFICIAL_NAMES, ChatGLMConfig
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration


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
        ({"_name_or_path": "THUDM/chatglm3-6b"}, ["THUDM/chatglm3-6b: ChatGLM3 and GLM-4 use another chat template"]),
        ({"_name_or_path": "THUDM/glm-4-9b-chat"}, ["THUDM/glm-4-9b-chat: ChatGLM3 and GLM-4"]),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, official, change, words):
    with pytest.raises(ModelError) as caught:
        read(tmp_path / "some-model", official | change)
    message = str(caught.value)
    for word in [*words, "Supported: chatglm2-6b, chatglm2-6b-32k and codegeex2-6b"]:
        assert word in message
    assert "some-model" in message or "THUDM" in message


def test_a_folder_named_chatglm3_is_refused_but_not_a_model_inside_one(tmp_path, official):
    with pytest.raises(ModelError, match="ChatGLM3"):
        read(tmp_path / "chatglm3-6b", official)
    assert read(tmp_path / "after-chatglm3" / "chatglm2-6b", official).num_layers == 3
