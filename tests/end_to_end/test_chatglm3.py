"""A small ChatGLM3 in the official format, random weights: tuned, evaluated, served."""

import json
import shutil

import pytest
import torch
from fastapi.testclient import TestClient

from ptuning import load_model
from ptuning.checkpoint.manifest import read_manifest
from ptuning.cli import main
from ptuning.families.chatglm3.config import ChatGLM3Config
from ptuning.families.chatglm3.family import ChatGLM3ForConditionalGeneration
from ptuning.families.chatglm3.tokenizer import ChatGLM3Tokenizer
from ptuning.methods import attached
from ptuning.serving.app import create_app
from ptuning.serving.options import ServeOptions
from ptuning.serving.server import build
from tests.end_to_end.conftest import ROOT, full_flags

DEV = ROOT / "data" / "advertise" / "dev.json"
METHODS = {"prefix": {"pre_seq_len": 16, "learning_rate": 0.3}, "lora": {"learning_rate": 1e-2}}


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
    """Method → its run, with scores."""
    folders = {}
    for method, options in METHODS.items():
        folders[method] = tmp_path_factory.mktemp(method) / "run"
        flags = {"model_name_or_path": base, "method": method, "max_steps": 24, "save_steps": 24, "do_predict": True}
        flags |= {"per_device_train_batch_size": 4, "baseline": True, "validation_file": DEV, "max_eval_samples": 4}
        flags |= {"max_predict_samples": 2, "max_target_length": 16, "probe": "false"}
        assert main(["train", *full_flags(folders[method], **flags, **options)]) == 0
    return folders


@pytest.mark.works("chatglm3", "prefix", "LoRA")
@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_and_load(tuned, base, method):
    manifest = read_manifest(tuned[method])
    assert (manifest.method, manifest.base.family, manifest.template) == (method, "chatglm3", "chatglm3")
    scores = json.loads((tuned[method] / "metrics.json").read_text())
    assert scores["tuned"]["answer_loss"] < scores["base"]["answer_loss"] and scores["tuned"]["rows"] == 2
    model, _ = load_model(base, tuned[method], device="cpu")
    assert attached(model).name == method and model.config.rope_parameters["rope_theta"] == 500_000


@pytest.fixture(scope="module")
def client(base, tuned):
    options = ServeOptions(model=str(base), prefix=(("p", str(tuned["prefix"])),), default_model="base")
    worker, metrics = build(options)
    worker.start()
    with TestClient(create_app(worker, options, metrics), base_url="http://127.0.0.1") as client:
        yield client
    worker.close()


@pytest.mark.works("chatglm3", "engine")
def test_serving(client, base, tuned):
    found = {}
    for name, folder in {"base": None, "p": tuned["prefix"]}.items():
        messages = [{"role": "system", "content": "店员"}, {"role": "user", "content": "你好"}]
        body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 8}
        found[name] = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        model, tokenizer = load_model(base, folder, device="cpu")
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt")
        stops = list(tokenizer.template().stop_ids)
        answer = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=stops)[0, ids.shape[1] :]
        assert found[name] == tokenizer.decode(answer).strip()
    assert found["base"] != found["p"]
    body = client.post("/chatglm", json={"prompt": "你好", "history": [["1", "2"]], "max_length": 40}).json()
    assert body["status"] == 200 and body["history"][0] == ["1", "2"]
