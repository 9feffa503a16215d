"""What the small bases of a family go through in the tests: tuned with scores, loaded back, served."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi.testclient import TestClient
from transformers import PreTrainedModel

from ptuning import load_model
from ptuning.checkpoint.manifest import read_manifest
from ptuning.cli import main
from ptuning.methods import attached
from ptuning.serving.app import create_app
from ptuning.serving.options import ServeOptions
from ptuning.serving.server import build
from tests.end_to_end.conftest import ROOT, full_flags

DEV = ROOT / "data" / "advertise" / "dev.json"
METHODS = {"prefix": {"pre_seq_len": 16, "learning_rate": 0.3}, "lora": {"learning_rate": 1e-2}}
ASKED = [{"role": "user", "content": "你好"}]


def tune(base: Path, factory, steps: int) -> dict[str, Path]:
    """Method → its run, with scores.

    Args:
        factory: pytest's tmp_path_factory.
    """
    folders = {}
    for method, options in METHODS.items():
        folders[method] = factory.mktemp(method) / "run"
        flags = {"model_name_or_path": base, "method": method, "max_steps": steps, "save_steps": steps}
        flags |= {"do_predict": True, "baseline": True, "validation_file": DEV, "probe": "false"}
        flags |= {"per_device_train_batch_size": 4, "max_eval_samples": 4, "max_predict_samples": 2}
        assert main(["train", *full_flags(folders[method], **flags, max_target_length=16, **options)]) == 0
    return folders


def check_and_load(run: Path, base: Path, method: str, family: str, template: str) -> PreTrainedModel:
    """What a run of `tune` must have left; the tuned model."""
    manifest = read_manifest(run)
    assert (manifest.method, manifest.base.family, manifest.template) == (method, family, template)
    scores = json.loads((run / "metrics.json").read_text())
    assert scores["tuned"]["answer_loss"] < scores["base"]["answer_loss"] and scores["tuned"]["rows"] == 2
    model, _ = load_model(base, run, device="cpu")
    assert attached(model).name == method
    return model


@contextmanager
def serving(base: Path, prefix: Path) -> Iterator[TestClient]:
    """A server in this process, with the prefix as `p`."""
    options = ServeOptions(model=str(base), prefix=(("p", str(prefix)),), default_model="base")
    worker, metrics = build(options)
    worker.start()
    try:
        with TestClient(create_app(worker, options, metrics), base_url="http://127.0.0.1") as client:
            yield client
    finally:
        worker.close()


def answer(client: TestClient, model: str, messages: list[dict]) -> str:
    """Eight greedy tokens."""
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8}
    return client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def generated(base: Path, tuned: Path | None) -> str:
    """The same of transformers' `generate`, by the tokenizer's own chat template."""
    model, tokenizer = load_model(base, tuned, device="cpu")
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).lstrip()
    return text.rstrip("\ufffd").strip()  # half a character at the end isn't shown
