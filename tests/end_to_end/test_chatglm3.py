"""A small ChatGLM3 in the official format, random weights: tuned, evaluated, served."""

import shutil

import pytest
import torch

from ptuning import load_model
from ptuning.families.chatglm3.config import ChatGLM3Config
from ptuning.families.chatglm3.family import ChatGLM3ForConditionalGeneration
from ptuning.families.chatglm3.tokenizer import ChatGLM3Tokenizer
from tests.end_to_end.conftest import ROOT
from tests.end_to_end.small_family import METHODS, answer, check_and_load, serving, tune


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "my-model"
    folder.mkdir()
    shutil.copy(ROOT / "models" / "chatglm2-tiny" / "tokenizer.model", folder)
    ChatGLM3Tokenizer(str(folder / "tokenizer.model")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "kv_channels": 16}
    rest = {"multi_query_group_num": 2, "padded_vocab_size": 2056, "seq_length": 512, "rope_ratio": 50}
    ChatGLM3ForConditionalGeneration(ChatGLM3Config(**sizes, **rest, initializer_range=0.15)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    return tune(base, tmp_path_factory, steps=24)


@pytest.mark.works("chatglm3", "prefix", "LoRA")
@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_and_load(tuned, base, method):
    model = check_and_load(tuned[method], base, method, "chatglm3", "chatglm3")
    assert model.config.rope_parameters["rope_theta"] == 500_000


@pytest.mark.works("chatglm3", "engine")
def test_serving(base, tuned):
    found, messages = {}, [{"role": "system", "content": "店员"}, {"role": "user", "content": "你好"}]
    with serving(base, tuned["prefix"]) as client:
        for name, folder in {"base": None, "p": tuned["prefix"]}.items():
            found[name] = answer(client, name, messages)
            model, tokenizer = load_model(base, folder, device="cpu")
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt")
            stops = list(tokenizer.template().stop_ids)
            new = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=stops)[0, ids.shape[1] :]
            assert found[name] == tokenizer.decode(new).strip()
        body = client.post("/chatglm", json={"prompt": "你好", "history": [["1", "2"]], "max_length": 40}).json()
    assert found["base"] != found["p"]
    assert body["status"] == 200 and body["history"][0] == ["1", "2"]
