"""Prefixes come and go while others are answered."""

import contextlib
import json
import shutil

import httpx
import pytest

from ptuning.checkpoint.base import resolve_base
from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.methods.prefix.export import export_official, export_peft
from ptuning.methods.prefix.read import read_prefix
from ptuning.serving.options import ServeOptions
from ptuning.serving.server import build
from tests.serving.conftest import ADMIN, BASE, running, wait_until
from tests.serving.test_serving_engine import Ask, body

KEY = {"Authorization": f"Bearer {ADMIN}"}


def names(server) -> list[str]:
    return [model["id"] for model in server.get("/v1/models").json()["data"]]


def delete(server, name):
    return httpx.delete(f"{server.url}/v1/prefixes/{name}", headers=KEY, timeout=120)


def test_added_and_removed(prefix_folders):
    with running({"ads": prefix_folders["ads"]}) as server:
        assert server.chat(model="late").status_code == 404
        added = server.post("/v1/prefixes", {"name": "late", "path": str(prefix_folders["talk"])}, headers=KEY)
        assert added.status_code == 200 and added.json()["id"] == "late" and added.json()["pre_seq_len"] == 24
        assert names(server) == ["chatglm2-tiny", "ads", "late"]
        assert server.chat(model="late").status_code == 200
        removed = delete(server, "late")
        assert removed.status_code == 200 and removed.json()["deleted"] is True
        assert names(server) == ["chatglm2-tiny", "ads"]
        assert server.chat(model="late").status_code == 404 and delete(server, "late").status_code == 404


def test_a_prefix_served_late_answers_as_one_served_early(server, prefix_folders):
    with running({}) as other:
        other.post("/v1/prefixes", {"name": "proj", "path": str(prefix_folders["proj"])}, headers=KEY)
        assert (
            other.chat(model="proj").json()["choices"][0]["message"]
            == server.chat(model="proj").json()["choices"][0]["message"]
        )


def test_what_runs_finishes_when_its_prefix_is_removed(gated):
    with gated() as (server, gate), contextlib.ExitStack() as stack:
        asked = [Ask(stack, server, body("你好", name, max_tokens=10)) for name in ("ads", "ads", "base", "talk")]
        wait_until(lambda: server.worker.places.live == 4, "all are there")
        assert delete(server, "ads").status_code == 200
        assert server.chat(model="ads").status_code == 404
        gate.open()
        results = [ask.result() for ask in asked]
        assert [result.status_code for result in results] == [200] * 4
        # Nothing of the removed prefix stays in memory.
        wait_until(lambda: not server.worker.engine.has_work, "nothing runs")
        assert server.chat().status_code == 200
        kept = [entry.prefix.name for entry in server.worker.engine.prefix_cache._entries.values() if entry.prefix]
        assert "ads" not in kept


def test_adding_does_not_drop_a_request(gated, prefix_folders):
    with gated() as (server, gate), contextlib.ExitStack() as stack:
        asked = Ask(stack, server, body("你好", "talk", max_tokens=10))
        wait_until(lambda: server.worker.engine.has_work, "it has begun")
        adding = Ask(stack, server, {"name": "new", "path": str(prefix_folders["ads"])}, "/v1/prefixes")
        adding.client.headers.update(KEY)
        gate.open()
        assert asked.result().status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "text"),
    [
        ({"name": "x", "path": "/no/such"}, 400, "/no/such"),
        ({"name": "x", "path": "a\0b"}, 400, "a"),
        ({"name": "x", "path": "~nobody-of-this-name/x"}, 400, "x"),
        ({"name": "x", "path": "y" * 1000}, 400, "y"),
        ({"name": "x", "path": str(BASE)}, 400, "base model"),
        ({"name": "base", "path": "/x"}, 409, "the base's name"),
        ({"name": "chatglm2-tiny", "path": "/x"}, 409, "the base's name"),
        ({"name": "ads", "path": "/x"}, 409, "already"),
        ({"name": "a/b", "path": "/x"}, 400, "can't be a model's name"),
        ({"name": "x"}, 400, "path: missing"),
    ],
)
def test_what_cannot_be_added(server, content, status, text):
    answer = server.post("/v1/prefixes", content, headers=KEY)
    assert answer.status_code == status and text in answer.json()["error"]["message"]
    assert server.chat().json()["choices"][0]["message"]["content"].startswith("你好！")


def test_the_base_stays(server):
    for name in ("base", "chatglm2-tiny"):
        assert delete(server, name).status_code == 400


def test_a_prefix_of_another_base_or_template_is_refused(server, prefix_folders, tmp_path):
    for change, text in (({"template": "llama"}, "template"), ({"base": {"fingerprint": "0" * 16}}, "fingerprint")):
        folder = shutil.copytree(prefix_folders["ads"], tmp_path / text)
        file = folder / "ptuning_config.json"
        values = json.loads(file.read_text())
        values |= change if "base" not in change else {"base": values["base"] | change["base"]}
        file.write_text(json.dumps(values))
        answer = server.post("/v1/prefixes", {"name": "other", "path": str(folder)}, headers=KEY)
        assert answer.status_code == 400 and text in answer.json()["error"]["message"]


def test_folders_of_other_programs(prefix_folders, tmp_path):
    config = ChatGLMConfig.from_pretrained(resolve_base(BASE))
    checkpoint = read_prefix(prefix_folders["ads"])
    official = export_official(checkpoint, config, tmp_path / "official")
    peft = export_peft(checkpoint, config, tmp_path / "peft", str(BASE))
    with running({"ours": prefix_folders["ads"], "official": official, "peft": peft}) as server:
        texts = {
            name: server.chat(model=name, max_tokens=30).json()["choices"][0]["message"]["content"]
            for name in ("ours", "official", "peft", "base")
        }
    assert texts["ours"] == texts["official"] == texts["peft"] != texts["base"]


def test_prefixes_under_output_are_found(prefix_folders, tmp_path, monkeypatch, caplog):
    (tmp_path / "output").mkdir()
    shutil.copytree(prefix_folders["ads"], tmp_path / "output" / "run-1")
    other = shutil.copytree(prefix_folders["talk"], tmp_path / "output" / "other-base")
    values = json.loads((other / "ptuning_config.json").read_text())
    values["base"]["fingerprint"] = "0" * 16
    (other / "ptuning_config.json").write_text(json.dumps(values))
    (tmp_path / "output" / "scores").mkdir()
    monkeypatch.chdir(tmp_path)
    worker, _ = build(ServeOptions(model=str(BASE)))
    assert [served.name for served in worker.served()] == ["chatglm2-tiny", "run-1"]
    (left_out,) = [record for record in caplog.records if record.message == "prefix left out"]
    assert "fingerprint" in left_out.fields["reason"]


def test_the_source_prefix_of_training_is_used(prefix_folders, tmp_path):
    folder = shutil.copytree(prefix_folders["ads"], tmp_path / "with-source")
    file = folder / "ptuning_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source_prefix": "写广告："}))
    with running({"plain": prefix_folders["ads"], "with": folder}) as server:
        counts = {name: server.chat(model=name).json()["usage"]["prompt_tokens"] for name in ("plain", "with")}
    assert counts["with"] > counts["plain"]
