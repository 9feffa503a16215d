"""Against a vLLM that runs: bash scripts/test_vllm.sh. Answers must be those of this package's engine, one by one."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks import serve
from ptuning.cli import main
from tests.conftest import REPO
from tests.serving.conftest import BASE, ask_together, prefix_folders, running, wait_until
from tests.serving.test_serving_engine import QUESTIONS, body, one_by_one
from tests.serving.test_serving_loras import lora_folders
from tests.serving.test_serving_vllm import front, text

__all__ = ["lora_folders", "prefix_folders"]  # fixtures

PYTHON = os.environ.get("PTUNING_TEST_VLLM")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs vLLM's own environment: bash scripts/test_vllm.sh")

SMALL_CACHE = ("--num-gpu-blocks-override", "30", "--max-model-len", "640")


class Vllm:
    """vLLM's server in a process of its own."""

    def __init__(self, model, store, log, flags=()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.model, self.store, self.log, self.flags = model, store, log, flags
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        transfer = {
            "kv_connector": "PrefixConnector",
            "kv_connector_module_path": "ptuning_vllm.connector",
            "kv_role": "kv_consumer",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"prefix_store": str(self.store), "max_prefixes": 2},
        }
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--skip-tokenizer-init"]
        command += ["--enable-scale-out", "--host", "127.0.0.1", "--port", self.port, "--dtype", "float32"]
        command += ["--block-size", "32", "--kv-transfer-config", json.dumps(transfer), *self.flags]
        own = {"PYTHONPATH": str(REPO), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        own |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], env=os.environ | own, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self._ready, f"vLLM answers ({self.log})", seconds=600)

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        time.sleep(0.5)
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The exported model, the store, and logs."""
    parent = tmp_path_factory.mktemp("vllm")
    asked = ["--format", "vllm", "--model_name_or_path", str(BASE), "--dtype", "float32"]
    assert main(["export", *asked, "--output_dir", str(parent / "model")]) == 0
    (parent / "store").mkdir()
    return parent


@contextlib.contextmanager
def vllm(folders, *flags):
    made = Vllm(folders / "model", folders / "store", folders / "vllm.log", flags)
    made.start()
    try:
        yield made
    finally:
        made.kill()


def shuffled(names, count, tokens):
    chance = random.Random(0)
    made = [
        body(f"{chance.choice(QUESTIONS)}{i}", names[i % len(names)], max_tokens=tokens, stream=i % 3 == 0)
        for i in range(count)
    ]
    chance.shuffle(made)
    return made


@pytest.fixture(scope="module")
def expected(prefix_folders):
    """80 requests to the base and three prefixes, and this package's answers, one by one."""
    requests = shuffled(["base", *prefix_folders], 80, 64)
    with running(prefix_folders) as server:
        return requests, one_by_one(server.worker, requests)


def same(server, expected) -> str:
    requests, answers = expected
    found = ask_together(server, requests, random.Random(1))
    return f"{sum(one == two for one, two in zip(found, answers, strict=True))} of {len(answers)}"


@pytest.mark.works("chatglm2", "vLLM")
def test_a_mixture_bad_requests_logprobs_and_a_kill(folders, prefix_folders, lora_folders, expected):
    served = prefix_folders | lora_folders
    with (
        vllm(folders, "--enable-lora", "--max-lora-rank", "8") as made,
        front([made], folders / "store", served) as server,
    ):
        stop, refused = threading.Event(), []

        def disturb():
            ids, salt = [0] * 8 + [5, 6, 7, 8], "0" * 32
            rule = {"max_tokens": 4, "detokenize": False}
            bad = [
                {"kv_transfer_params": {"prefix": salt, "length": 8}, "cache_salt": salt},
                {"kv_transfer_params": {"prefix": "../x", "length": 8}, "cache_salt": "../x"},
                {"kv_transfer_params": {"prefix": salt, "length": 12}, "cache_salt": salt},
                {"kv_transfer_params": {"prefix": [1], "length": "x"}},
                {"kv_transfer_params": {"prefix": salt, "length": 8}},
            ]
            while not stop.is_set():
                for each in bad:
                    asked = {"token_ids": ids, "sampling_params": rule} | each
                    refused.append(httpx.post(f"{made.url}/inference/v1/generate", json=asked, timeout=300).status_code)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            assert same(server, expected) == "80 of 80"
        finally:
            stop.set()
            thread.join()
        assert set(refused) == {400, 500} and len(refused) >= 5, refused  # 400: not a salt for vLLM

        loras = shuffled(list(lora_folders), 8, 24)
        with running(served) as own:
            answers = one_by_one(own.worker, loras)
            asked = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8}
            for name in ("base", "ads", "low"):
                theirs, ours = (each.chat(model=name, **asked).json()["choices"][0] for each in (server, own))
                assert theirs["message"] == ours["message"]
                pairs = zip(theirs["logprobs"]["content"], ours["logprobs"]["content"], strict=True)
                assert max(abs(one["logprob"] - two["logprob"]) for one, two in pairs) < 1e-3
        assert same(server, (loras, answers)) == "8 of 8"

        with ThreadPoolExecutor(40) as pool:
            asked = [pool.submit(server.chat, "你好" * 9, "ads", max_tokens=1500, temperature=1) for _ in range(40)]
            wait_until(lambda: server.worker.stats().running >= 20, "they run")
            made.kill()
            assert 503 in {one.result().status_code for one in asked} <= {200, 503}
        assert server.get("/health").status_code == 503
        made.start()
        wait_until(lambda: server.get("/health").status_code == 200, "it is back", seconds=300)
        for name in ("base", "ads", "low"):
            assert text(server.chat(model=name))


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            ("--max-num-batched-tokens", "64", "--max-num-seqs", "32", *SMALL_CACHE), id="chunks and preemption"
        ),
        pytest.param(("--tensor-parallel-size", "2"), id="tensor parallel"),
        pytest.param(
            ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'),
            id="speculation",
        ),
    ],
)
def test_other_ways_to_compute(folders, prefix_folders, expected, flags):
    with vllm(folders, *flags) as made, front([made], folders / "store", prefix_folders) as server:
        assert same(server, expected) == "80 of 80"
        figures = httpx.get(f"{made.url}/metrics", timeout=60).text
        preempted = [line for line in figures.splitlines() if line.startswith("vllm:num_preemptions_total")]
        assert "--num-gpu-blocks-override" not in flags or float(preempted[0].split()[-1]) > 0


def test_prompt_logprobs_see_the_prefix(folders, prefix_folders):
    """vLLM leaves a connector's blocks out where log probabilities of the prompt are asked for."""
    with vllm(folders) as made, front([made], folders / "store", prefix_folders) as server:
        stored = server.worker.find("ads").prefix
        ids = server.worker.template.encode_text(["类型#上衣"])[0]
        found = {}
        for prefix in (None, stored.prefix):
            asked = {"token_ids": [0] * stored.length + ids, "sampling_params": {"max_tokens": 1, "prompt_logprobs": 1}}
            if prefix:
                asked |= {"kv_transfer_params": {"prefix": prefix, "length": stored.length}, "cache_salt": prefix}
            reply = httpx.post(f"{made.url}/inference/v1/generate", json=asked, timeout=300).json()
            entries = reply["prompt_logprobs"][stored.length + 1 :]
            found[prefix] = [entry[str(token)]["logprob"] for entry, token in zip(entries, ids[1:], strict=True)]
        assert max(abs(one - two) for one, two in zip(*found.values(), strict=True)) > 0.1


def test_evaluation_gives_the_figures_of_this_packages_engine(folders, prefix_folders, lora_folders, tmp_path):
    """The prompts, the base's own answers and the references lie in vLLM's cache when losses are asked for."""
    rows = ["--test_file", str(REPO / "data" / "advertise" / "dev.json"), "--max_predict_samples", "12"]
    with vllm(folders, "--enable-lora", "--max-lora-rank", "8", *SMALL_CACHE) as made:
        there = ["--engine", "vllm", "--vllm_url", made.url, "--prefix_store", str(folders / "store")]
        for name, folder in {"ads": prefix_folders["ads"], "low": lora_folders["low"]}.items():
            asked = ["evaluate", "--ptuning_checkpoint", str(folder), *rows, "--baseline", "--probe"]
            own, their = tmp_path / name, tmp_path / f"{name}-vllm"
            assert main([*asked, "--output_dir", str(own)]) == 0
            assert main([*asked, "--output_dir", str(their), *there]) == 0
            assert main([*asked, "--output_dir", f"{their}-again", *there]) == 0
            for file in ("predictions.jsonl", "predictions_base.jsonl", "probe.jsonl"):
                ours, theirs, again = (
                    [json.loads(line) for line in (path / file).read_text().splitlines()]
                    for path in (own, their, Path(f"{their}-again"))
                )
                for one in (theirs, again):
                    losses = [key for key in one[0] if "loss" in key and key != "loss_tokens"]
                    for mine, other in zip(ours, one, strict=True):
                        assert {key: mine[key] for key in losses} == pytest.approx(
                            {key: other[key] for key in losses}, abs=2e-3
                        )
                        assert all(mine[key] == other[key] for key in mine.keys() - losses), (name, file)


def test_the_benchmark_and_the_script_that_starts_both(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    shape = "--layers 2 --hidden 128 --heads 2 --groups 1 --ffn 128"
    serve.main(f"{shape} --clients 3 --requests 1 --max_tokens 8 --think 0.01 --vllm_python {PYTHON}".split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["engines"]
    assert list(found) == ["ptuning", "vllm"]
    for engine in found.values():
        assert engine["rss_mb"] > 0 and engine["clients"]["3"]["answers"] == 3
