"""A small GLM-4 in transformers' own format, random weights and a tokenizer learned here: prompts, tuning, scores, serving."""

import json

import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from ptuning import load_model
from ptuning.checkpoint.base import read_base_config
from ptuning.checkpoint.manifest import read_manifest
from ptuning.cli import main
from ptuning.errors import ModelError
from ptuning.families import Dialogue, Offer, Part, Turn
from ptuning.loading import load_template
from ptuning.methods import attached
from ptuning.serving.app import create_app
from ptuning.serving.options import ServeOptions
from ptuning.serving.server import build
from tests.conftest import CORPUS
from tests.end_to_end.conftest import ROOT, full_flags
from tests.tiny_chatglm4 import TEMPLATE

DEV = ROOT / "data" / "advertise" / "dev.json"
CONTROLS = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
]
METHODS = {"prefix": {"pre_seq_len": 16, "learning_rate": 0.3}, "lora": {"learning_rate": 1e-2}}
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
    """Method → its run, with scores."""
    folders = {}
    for method, options in METHODS.items():
        folders[method] = tmp_path_factory.mktemp(method) / "run"
        flags = {"model_name_or_path": base, "method": method, "max_steps": 24, "save_steps": 24, "do_predict": True}
        flags |= {"per_device_train_batch_size": 4, "baseline": True, "validation_file": DEV, "max_eval_samples": 4}
        flags |= {"max_predict_samples": 2, "max_target_length": 16, "probe": "false"}
        assert main(["train", *full_flags(folders[method], **flags | options)]) == 0
    return folders


@pytest.mark.works("glm4", "load", "prefix", "LoRA")
@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_and_load(tuned, base, method):
    manifest = read_manifest(tuned[method])
    assert (manifest.method, manifest.base.family, manifest.template) == (method, "glm4", "glm4")
    scores = json.loads((tuned[method] / "metrics.json").read_text())
    assert scores["tuned"]["answer_loss"] < scores["base"]["answer_loss"] and scores["tuned"]["rows"] == 2
    model, _ = load_model(base, tuned[method], device="cpu")
    assert attached(model).name == method and type(model).__name__ == "GlmForCausalLM"


@pytest.mark.works("glm4", "engine")
def test_serving(base, tuned):
    options = ServeOptions(model=str(base), prefix=(("p", str(tuned["prefix"])),), default_model="base")
    worker, metrics = build(options)
    worker.start()
    found, messages = {}, [{"role": "user", "content": "你好"}]
    try:
        with TestClient(create_app(worker, options, metrics), base_url="http://127.0.0.1") as client:
            for name in ("base", "p"):
                body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 8}
                found[name] = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            assert client.post("/", json={"prompt": "你好", "max_length": 40}).json()["status"] == 200
    finally:
        worker.close()
    for name, folder in {"base": None, "p": tuned["prefix"]}.items():
        model, tokenizer = load_model(base, folder, device="cpu")
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True).lstrip()
        assert found[name] == text.rstrip("\ufffd").strip()  # half a character at the end isn't shown
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
