"""A GLM-4 in its original format: the ids of its tiktoken vocabulary, its network, its files."""

import copy
import json
import pickle
import re
from itertools import pairwise

import pytest
import regex
import torch
from transformers import AutoConfig, AutoTokenizer, GlmForCausalLM

from ptuning.checkpoint.base import read_base_config
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.errors import ModelError
from ptuning.families import Dialogue, Offer, Part, Turn, family_of
from ptuning.families.chatglm4.config import ChatGLM4Config
from ptuning.families.chatglm4.family import ChatGLM4ForConditionalGeneration
from ptuning.families.chatglm4.ranks import read_ranks
from ptuning.families.chatglm4.tokenizer import ChatGLM4Tokenizer
from ptuning.loading import load_base, load_template, load_tokenizer
from tests.conftest import CORPUS
from tests.tiny_chatglm4 import write_folder, write_ranks

# As in the official tokenization_chatglm.py.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    *CORPUS,
    *(
        "",
        " ",
        "\n",
        "a\n\n  b \r\n",
        "  two  spaces ",
        "I'LL don't we're",
        "12345678 1.5",
        "abababab aaaaaaa",
        "x\t\ty",
    ),
    *("，。！？……", "é́ ſ ǅ", "👍🏽 ok", "<|user|>\n[gMASK]", "\u3000全角\u00a0"),
]


NAMES = {  # transformers' → official
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.layers": "transformer.encoder.layers",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def template(folder):
    return load_template(folder)


def merged(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as tiktoken defines it: the neighbours with the lowest rank are merged, of several the first."""
    ids = []
    for piece in regex.findall(PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while found := [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            at = min(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def ids(template, dialogue: Dialogue) -> list[int]:
    return template.encode([template.render(dialogue)])[0].ids


def test_ids_are_tiktoken_s(folder, template):
    ranks = read_ranks(folder / "tokenizer.model")
    assert max(len(token) for token in ranks) > 5 and len(ranks) == 420
    assert template.encode_text(TEXTS) == [merged(text, ranks) for text in TEXTS]
    for text, found in zip(TEXTS, template.encode_text(TEXTS), strict=True):
        assert template.decode(found) == text
        assert b"".join(map(template.token_bytes, found)) == text.encode()


def test_control_tokens_follow_the_ranks_and_no_text_is_one(template):
    tokenizer = template.tokenizer
    assert tokenizer.convert_ids_to_tokens([420, 422, 424, 426, 427, 428, 429]) == [
        *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    ]
    assert len(tokenizer) == 434 and template.stop_ids == (420, 427, 429) and template.pad_id == 420
    tokens = ids(template, Dialogue("<|assistant|>[gMASK]", (("<|user|>", "<|endoftext|>"),)))
    assert [token for token in tokens if token >= 420] == [422, 424, 427, 428, 427, 428]
    rows = tokenizer(["你好 1 2 3", "a"], padding=True)
    assert rows["input_ids"][0][:2] == [422, 424] and rows["input_ids"][1][0] == 420
    assert rows["attention_mask"][1][0] == 0 and rows.keys() == {"input_ids", "attention_mask"}


def test_prompts_are_the_tokenizer_s_own(template):
    def own(messages, **kwargs):
        options = {"add_generation_prompt": True, "return_dict": False} | kwargs
        return template.tokenizer.apply_chat_template(messages, **options)

    user, wrapped = {"role": "user", "content": "你好"}, {"type": "function", "function": {"name": "f"}}
    assert ids(template, Dialogue("你好")) == own([user])
    assert ids(template, Dialogue("再见", (("你好", "\n很高兴"),), "店员")) == own(
        [
            {"role": "system", "content": "店员"},
            user,
            {"role": "assistant", "content": "\n很高兴"},
            {"role": "user", "content": "再见"},
        ]
    )
    call, result = Turn.of([Part("assistant", '{"a": 1}', "f")]), Turn.of([Part("observation", "晴")])
    assert ids(template, Dialogue(result, (("你好", call),), Offer.of("店员", [{"name": "f"}]))) == own(
        [
            {"role": "system", "content": "店员", "tools": [wrapped]},
            user,
            {"role": "assistant", "metadata": "f", "content": '{"a": 1}'},
            {"role": "observation", "content": "晴"},
        ]
    )


def test_it_is_told_apart_on_every_way_in(folder):
    assert read_base_config(folder)["model_type"] == "chatglm4"
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(config) is ChatGLM4Config and family_of(config).name == "chatglm4"
    for each in (tokenizer, load_tokenizer(folder), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert type(each) is ChatGLM4Tokenizer and each("你好").input_ids == tokenizer("你好").input_ids
    assert type(load_base(folder, device="cpu")) is ChatGLM4ForConditionalGeneration


def test_numbers_that_config_json_leaves_out_are_the_official_ones():
    config = ChatGLM4Config(rope_ratio=500)
    assert (config.vocab_size, config.num_hidden_layers, config.head_dim, config.rms_norm_eps) == (
        *(151552, 40, 128, 1.5625e-07),
    )
    assert config.eos_token_id == [151329, 151336, 151338] and config.pad_token_id == 151329
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}


@pytest.mark.works("chatglm4", "load")
def test_the_network_is_the_native_format_s(folder):
    """The names and rows of files become those of transformers' own class, which reads GLM-4 in the native format."""
    model = load_base(folder, device="cpu", dtype="float32")
    native = GlmForCausalLM(family_of(model.config).native_config(model.config)).eval()
    files = TensorFiles.find(folder, ModelError)
    weights = {}
    for name in native.state_dict():
        file = name
        for own, official in NAMES.items():
            file = file.replace(own, official)
        if "self_attn" in file:
            layer, part, kind = re.split(r"\.self_attn\.([qkv])_proj\.", file)
            rows = files.read(f"{layer}.self_attention.query_key_value.{kind}").split([64, 32, 32])
            weights[name] = rows["qkv".index(part)]
        else:
            weights[name] = files.read(file)
    native.load_state_dict(weights)
    tokens = torch.arange(24).view(2, 12) * 17 % 434
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, native(tokens).logits)
    assert native.config.rope_parameters["rope_theta"] == 5e6 and native.config.rms_norm_eps == 1e-6


def test_saved_it_is_official_and_still_a_glm4(folder, tmp_path):
    model = load_base(folder, device="cpu")
    model.save_pretrained(tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (
        written["model_type"] == "chatglm" and "rope_parameters" not in written and "num_hidden_layers" not in written
    )
    assert (written["rope_ratio"], written["multi_query_group_num"], written["eos_token_id"]) == (
        500,
        2,
        [420, 427, 429],
    )
    assert (
        type(AutoConfig.from_pretrained(tmp_path / "model")) is ChatGLM4Config
    )  # by its name: its vocabulary is small
    names = set(TensorFiles.find(tmp_path / "model", ModelError).files)
    assert names == set(family_of(model.config).weight_sources(dict(model.named_parameters())))
    assert "transformer.encoder.layers.1.self_attention.query_key_value.bias" in names
    load_tokenizer(folder).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "model" / file).read_bytes() == (folder / file).read_bytes()
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert values["added_tokens_decoder"]["427"]["content"] == "<|user|>"
    assert values["tokenizer_class"] == "ChatGLM4Tokenizer" and "# 可用工具" in values["chat_template"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({b"!": 500}, r"tokenizer\.model: the ranks don't count from 0 to 419: 1 stands in the place of 0"),
        ({b"!!!!": 420, b"!": None}, r"tokenizer\.model: there is no token for the byte 33"),
    ],
)
def test_ranks_that_cannot_be_are_named(folder, tmp_path, change, words):
    ranks = read_ranks(folder / "tokenizer.model") | change
    if ranks[b"!"] is None:
        ranks = {token: index for index, token in enumerate(token for token, rank in ranks.items() if rank is not None)}
    with pytest.raises(ModelError, match=f"{words}; copy tokenizer.model again from the official model"):
        ChatGLM4Tokenizer(str(write_ranks(ranks, tmp_path)))


@pytest.mark.parametrize("line", [b"IQ==", b"IQ== one", b"!! 3", b"\xff\x0e\x05<unk>"])
def test_a_line_that_is_none_is_named(tmp_path, line):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"AA== 0\n" + line)
    with pytest.raises(ModelError, match=r"tokenizer\.model:2: '.*' isn't a token in base64 and its rank; copy"):
        read_ranks(path)
