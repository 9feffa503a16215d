"""The committed base model is in the official ChatGLM2 format and small enough to live in the repository."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/chatglm2-tiny"
LIMIT = 12_000_000


@pytest.fixture(scope="module")
def sp() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((MODEL / "config.json").read_text(encoding="utf-8"))


def test_files_and_size():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}
    assert sum(files.values()) <= LIMIT


def test_weights_have_official_names_and_shapes(config):
    hidden, heads, width = config["hidden_size"], config["num_attention_heads"], config["kv_channels"]
    qkv = (heads + 2 * config["multi_query_group_num"]) * width
    layer = {
        "input_layernorm.weight": [hidden],
        "self_attention.query_key_value.weight": [qkv, hidden],
        "self_attention.query_key_value.bias": [qkv],
        "self_attention.dense.weight": [hidden, heads * width],
        "post_attention_layernorm.weight": [hidden],
        "mlp.dense_h_to_4h.weight": [2 * config["ffn_hidden_size"], hidden],
        "mlp.dense_4h_to_h.weight": [hidden, config["ffn_hidden_size"]],
    }
    expected = {f"transformer.encoder.layers.{i}.{k}": v for i in range(config["num_layers"]) for k, v in layer.items()}
    vocabulary = [config["padded_vocab_size"], hidden]
    expected["transformer.embedding.word_embeddings.weight"] = vocabulary
    expected["transformer.output_layer.weight"] = vocabulary
    expected["transformer.encoder.final_layernorm.weight"] = [hidden]
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (not a dict)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors.values())


def test_vocabulary_has_room_for_the_control_ids(sp, config):
    assert [sp.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert sp.vocab_size() + 5 <= config["padded_vocab_size"] and config["padded_vocab_size"] % 64 == 0


@pytest.mark.parametrize("text", ["你好\n\n世界", "  两个  空格 ", "a Ⅷ ﬁ ＡＢ", "𠀀龘 ß 😀", "\t[gMASK]sop</s>"])
def test_every_text_survives_the_tokenizer(sp, text):
    ids = sp.encode(text)
    assert sp.unk_id() not in ids
    assert sp.decode(ids) == text


def test_dummy_prefix_and_newline(sp):
    assert sp.encode("你好", out_type=str)[0].startswith("▁")
    assert sp.encode("\n", out_type=str)[-1] == "<0x0A>"


def test_demo_data_need_no_byte_pieces(sp):
    """The base has met every character of the tasks it is tuned on."""
    for name, fields in (("advertise", ("content", "summary")), ("dialogue", ("prompt", "response"))):
        for line in (ROOT / "data" / name / "train.json").read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            missing = [i for field in fields for i in sp.encode(one[field]) if sp.is_byte(i)]
            assert not missing, line
