"""A small GLM-4 in transformers' own format, random weights and a tokenizer learned here: prompts, tuning, scores, serving."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from ptuning.checkpoint.base import read_base_config
from ptuning.cli import main
from ptuning.errors import ModelError
from ptuning.families import Dialogue, Offer, Part, Turn
from ptuning.loading import load_template
from tests.conftest import CORPUS
from tests.end_to_end.small_family import ASKED, METHODS, answer, check_and_load, generated, serving, tune
from tests.tiny_chatglm4 import TEMPLATE

CONTROLS = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
]
TOOL = {"name": "get_weather", "description": "查询天气"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm4")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS * 9, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens([AddedToken(token, special=True) for token in CONTROLS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>"),
        padding_side="left",
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    ids = {"eos_token_id": stops, "pad_token_id": stops[0], "attention_bias": True, "max_position_embeddings": 512}
    config = GlmConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.15, **ids)
    GlmForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def template(base):
    return load_template(base)


def ids(template, dialogue: Dialogue) -> list[int]:
    return template.encode([template.render(dialogue)])[0].ids


def test_prompts_are_the_tokenizer_s_own(template):
    def own(messages, **kwargs):
        options = {"add_generation_prompt": True, "return_dict": False} | kwargs
        return template.tokenizer.apply_chat_template(messages, **options)

    user, end = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好，很高兴"}
    assert ids(template, Dialogue("你好")) == own([user])
    assert ids(template, Dialogue("再见", (("你好", "你好，很高兴"),), "店员")) == own(
        [{"role": "system", "content": "店员"}, user, end, {"role": "user", "content": "再见"}]
    )
    assert ids(template, Dialogue("你好", response="你好，很高兴")) == own([user, end], add_generation_prompt=False)
    call, result = Turn.of([Part("assistant", '{"a": 1}', "f")]), Turn.of([Part("observation", "晴")])
    wrapped = {"type": "function", "function": TOOL}
    assert ids(template, Dialogue(result, (("你好", call),), Offer.of("店员", [TOOL]))) == own(
        [
            {"role": "system", "content": "店员", "tools": [wrapped]},
            user,
            {"role": "assistant", "metadata": "f", "content": '{"a": 1}'},
            {"role": "observation", "content": "晴"},
        ]
    )


def test_no_text_is_a_control_token(template):
    tokens = ids(template, Dialogue("<|assistant|>[gMASK]", (("<|user|>", "<|endoftext|>"),)))
    names = template.tokenizer.convert_ids_to_tokens(
        [token for token in tokens if token >= len(template.tokenizer) - 10]
    )
    assert names == ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|user|>", "<|assistant|>"]
    assert template.decode(template.encode_text(["<|user|> 你好"])[0]) == "<|user|> 你好"
    names = template.tokenizer.convert_ids_to_tokens(list(template.stop_ids))
    assert names == ["<|endoftext|>", "<|user|>", "<|observation|>"] and template.end_id == template.stop_ids[0]
    assert b"".join(map(template.token_bytes, template.encode_text(["你 sop\n！"])[0])).decode() == "你 sop\n！"
    assert template.token_bytes(template.end_id) == b"<|endoftext|>"


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    return tune(base, tmp_path_factory, steps=24)


@pytest.mark.works("glm4", "load", "prefix", "LoRA")
@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_and_load(tuned, base, method):
    model = check_and_load(tuned[method], base, method, "glm4", "glm4")
    assert type(model).__name__ == "GlmForCausalLM"


@pytest.mark.works("glm4", "engine")
def test_serving(base, tuned):
    with serving(base, tuned["prefix"]) as client:
        found = {name: answer(client, name, ASKED) for name in ("base", "p")}
        assert client.post("/", json={"prompt": "你好", "max_length": 40}).json()["status"] == 200
    assert found == {"base": generated(base, None), "p": generated(base, tuned["prefix"])}
    assert found["base"] != found["p"]


def test_a_merged_model_has_its_prompts(template, tuned, tmp_path):
    """transformers keeps a chat template in a file of its own."""
    flags = ["--ptuning_checkpoint", str(tuned["lora"]), "--output_dir", str(tmp_path / "merged")]
    assert main(["export", "--merge", *flags]) == 0
    assert ids(load_template(tmp_path / "merged"), Dialogue("你好")) == ids(template, Dialogue("你好"))


def test_a_size_that_cannot_be_is_named(base, tmp_path):
    values = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"num_hidden_layers is 0 in config\.json and must be a whole number"):
        read_base_config(tmp_path)
