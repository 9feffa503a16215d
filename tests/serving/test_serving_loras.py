"""LoRAs are served as prefixes are: by name, live, in one running batch with them and the base."""

import random

import httpx
import pytest
import torch

from ptuning.checkpoint.manifest import describe
from ptuning.config.options import ModelArguments
from ptuning.loading import load_base
from ptuning.methods import SaveTarget, detach, method_of
from tests.methods.test_lora import randomise
from tests.serving.conftest import ADMIN, BASE, ask_together, running
from tests.serving.test_serving_engine import QUESTIONS, body, one_by_one

LORAS = {"low": {}, "thin": {"lora_rank": 2, "use_rslora": True}}


@pytest.fixture(scope="module")
def lora_folders(tmp_path_factory):
    """Random LoRAs of the small base, saved as training saves them. Read only."""
    parent, model = tmp_path_factory.mktemp("loras"), load_base(BASE, device="cpu")
    for seed, (name, given) in enumerate(LORAS.items()):
        method = method_of(ModelArguments(str(BASE), method="lora", **given), trains=True)
        method.start(model)
        randomise(model, seed)
        target = SaveTarget(parent / name, True, torch.device("cpu"))
        method.save(model, None, describe(BASE, method.name, method.settings()), target)
        detach(model)
    return {name: parent / name for name in LORAS}


def test_two_loras_two_prefixes_and_the_base_in_one_batch(prefix_folders, lora_folders):
    served = {name: prefix_folders[name] for name in ("ads", "proj")} | lora_folders
    chance, names = random.Random(0), ["base", *served]
    requests = [
        body(chance.choice(QUESTIONS), names[i % 5], max_tokens=chance.randrange(1, 40), stream=i % 3 == 0)
        for i in range(24)
    ]
    with running(served) as server:
        expected = one_by_one(server.worker, requests)  # before anything is asked, the worker's thread is idle
        kinds = {
            model["id"]: (model["kind"], model["pre_seq_len"]) for model in server.get("/v1/models").json()["data"]
        }
        assert kinds == {
            "chatglm2-tiny": ("base", 0),
            "ads": ("prefix", 8),
            "proj": ("prefix", 5),
            "low": ("LoRA", 0),
            "thin": ("LoRA", 0),
        }

        assert ask_together(server, requests, chance) == expected
        assert len({server.chat(model=name, max_tokens=24).text.partition("content")[2] for name in names}) == 5


def test_added_and_removed_while_others_are_served(prefix_folders, lora_folders):
    key = {"Authorization": f"Bearer {ADMIN}"}
    with running({"ads": prefix_folders["ads"]}) as server:
        before = server.chat().json()["choices"]
        added = server.post("/v1/prefixes", {"name": "late", "path": str(lora_folders["low"])}, headers=key)
        assert added.status_code == 200 and added.json()["kind"] == "LoRA"
        late = server.chat(model="late").json()["choices"]
        assert late != before == server.chat().json()["choices"]
        assert httpx.delete(f"{server.url}/v1/prefixes/late", headers=key, timeout=30).status_code == 200
        assert server.chat(model="late").status_code == 404 and server.chat().json()["choices"] == before
    with running({"early": lora_folders["low"]}) as server:
        assert server.chat(model="early").json()["choices"] == late
