"""A small GLM-4 in its original format: tuned, evaluated, loaded, served."""

import json

import pytest
from fastapi.testclient import TestClient

from ptuning import load_model
from ptuning.checkpoint.manifest import read_manifest
from ptuning.cli import main
from ptuning.methods import attached
from ptuning.serving.app import create_app
from ptuning.serving.options import ServeOptions
from ptuning.serving.server import build
from tests.end_to_end.conftest import ROOT, full_flags
from tests.tiny_chatglm4 import write_folder

DEV = ROOT / "data" / "advertise" / "dev.json"
METHODS = {"prefix": {"pre_seq_len": 16, "learning_rate": 0.3}, "lora": {"learning_rate": 1e-2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """Method → its run, with scores."""
    folders = {}
    for method, options in METHODS.items():
        folders[method] = tmp_path_factory.mktemp(method) / "run"
        flags = {"model_name_or_path": base, "method": method, "max_steps": 12, "save_steps": 12, "do_predict": True}
        flags |= {"per_device_train_batch_size": 4, "baseline": True, "validation_file": DEV, "max_eval_samples": 4}
        flags |= {"max_predict_samples": 2, "max_target_length": 16, "probe": "false"}
        assert main(["train", *full_flags(folders[method], **flags | options)]) == 0
    return folders


@pytest.mark.works("chatglm4", "prefix", "LoRA")
@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_and_load(tuned, base, method):
    manifest = read_manifest(tuned[method])
    assert (manifest.method, manifest.base.family, manifest.template) == (method, "chatglm4", "glm4")
    scores = json.loads((tuned[method] / "metrics.json").read_text())
    assert scores["tuned"]["answer_loss"] < scores["base"]["answer_loss"] and scores["tuned"]["rows"] == 2
    model, _ = load_model(base, tuned[method], device="cpu")
    assert attached(model).name == method and model.config.rope_parameters["rope_theta"] == 5e6


@pytest.mark.works("chatglm4", "engine")
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
