"""`ptuning serve` and `ptuning chat` as processes: start, stop, signals, what goes wrong at the start."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from ptuning.serving.options import ServeOptions
from tests.end_to_end.conftest import BIN, MODEL, ROOT


def made_of_this_lock() -> bool:
    """Whether scripts/setup.sh has nothing to install: a .venv may be a link to one that others use too."""
    stamp = ROOT / ".venv" / ".installed"
    if not stamp.is_file() or Path(sys.prefix).resolve() != stamp.resolve().parent:
        return False
    with (ROOT / "requirements.lock").open("rb") as lock:
        wanted = subprocess.run(["cksum"], stdin=lock, text=True, capture_output=True, check=True).stdout
    return stamp.read_text().strip() == wanted.strip()


made_by_script = pytest.mark.skipif(
    not made_of_this_lock(), reason="these tests don't run in the .venv that scripts/setup.sh made of this lock"
)


@contextlib.contextmanager
def serving(port, *flags, model=MODEL):
    command = [BIN / "python", "-m", "ptuning.cli", "serve", "--model", str(model), "--port", str(port), *flags]
    if "--web_port" not in flags:
        command.append("--no_page")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: healthy(port), process)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=600)


def until(done, process, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def healthy(port) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    return False


def fails(*flags, **env) -> str:
    command = [BIN / "python", "-m", "ptuning.cli", "serve", "--model", str(MODEL), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def ask(port, tokens=1500, **more):
    body = {"model": "base", "messages": [{"role": "user", "content": "1"}], "max_tokens": tokens} | more
    return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=300)


@pytest.fixture
def endless(tmp_path):
    """A copy of the base that never chooses the end token: its logit is 0, and that of the likeliest is more."""
    folder = shutil.copytree(MODEL, tmp_path / "endless")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.output_layer.weight"][2] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def go_on(port, tokens, n):
    body = {"model": "base", "prompt": "1", "max_tokens": tokens, "temperature": 0, "n": n}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=300)


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(free_port, endless):
    with serving(free_port, model=endless) as process:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(go_on(free_port, 400, n=4)))
        asking.start()
        until(lambda: httpx.get(f"http://127.0.0.1:{free_port}/health").json()["running"] > 0, process)
        process.send_signal(signal.SIGTERM)
        until(lambda: not healthy(free_port), process)
        late = httpx.get(f"http://127.0.0.1:{free_port}/health")
        assert late.status_code == 503 and late.json()["status"] == "stopping"
        refused = ask(free_port)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        asking.join(300)
        assert answers[0].status_code == 200
        assert [choice["finish_reason"] for choice in answers[0].json()["choices"]] == ["length"] * 4
        assert process.wait(timeout=120) == 0


def test_the_grace_time_is_an_end(free_port, endless):
    with serving(free_port, "--grace_seconds", "1", model=endless) as process:
        results = []
        asking = [threading.Thread(target=lambda: results.append(go_on(free_port, 2000, n=16))) for _ in range(2)]
        for thread in asking:
            thread.start()
        until(lambda: httpx.get(f"http://127.0.0.1:{free_port}/health").json()["running"] > 20, process)
        process.send_signal(signal.SIGTERM)
        # Sooner than the default, for which an ignored option would wait.
        assert process.wait(timeout=ServeOptions.grace_seconds) == 0
        for thread in asking:
            thread.join(120)
        assert [result.status_code for result in results] == [503, 503]


def test_idle_and_sigint(free_port):
    with serving(free_port) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) == 0


def test_logs_have_no_prompts_unless_asked(free_port):
    for flags, there in (((), False), (("--log_prompts",), True)):
        with serving(free_port, *flags) as process:
            body = {"prompt": "geheimnis", "max_length": 40, "temperature": 0}
            assert httpx.post(f"http://127.0.0.1:{free_port}/chatglm", json=body, timeout=600).status_code == 200
            process.terminate()
            out, err = process.communicate(timeout=600)
        assert ("geheimnis" in out + err) is there
        # All of it, whoever wrote it; only runpy may warn of the tests' warm start, before anything of ours runs.
        lines = [json.loads(line) for line in err.splitlines() if not line.startswith("<frozen runpy>")]
        (line,) = [line for line in lines if line["message"] == "request"]
        assert line["route"] == "/chatglm" and line["status"] == 200 and line["model"] == MODEL.name
        assert line["prompt_tokens"] > 5 and line["answer_tokens"] > 0 and line["seconds"] > 0
        assert f"API    http://127.0.0.1:{free_port}" in out and "curl" in out


@made_by_script
def test_the_script_serves_the_embedded_model(free_port, tmp_path):
    command = ["bash", str(ROOT / "scripts" / "serve.sh"), "--port", str(free_port), "--no_page"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: healthy(free_port), process)
        assert ask(free_port, 4).status_code == 200
        process.terminate()  # exec: the signal reaches the server itself
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0 and f"API    http://127.0.0.1:{free_port}" in out
    finally:
        process.kill()


def test_a_port_in_use(free_port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        text = fails("--port", str(free_port), "--no_page")
        assert (
            f"can't listen on 127.0.0.1, port {free_port}: Address already in use; choose another with --port" in text
        )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--host", "0.0.0.0"], "--allow_remote"),
        (["--prefix", "a=/no/such"], "/no/such"),
        (["--prefix", "base=/no/such"], "the base's name"),
        (["--default_model", "nobody", "--prefix", f"x={ROOT / 'tests'}"], "tests"),
        (["--model", "/no/model"], "/no/model"),
    ],
)
def test_what_cannot_be_served(flags, text, free_port):
    assert text in fails("--port", str(free_port), "--no_page", *flags)


def test_chat_with_commands(tmp_path):
    command = [
        BIN / "python",
        "-m",
        "ptuning.cli",
        "chat",
        "--model_name_or_path",
        str(MODEL),
        "--max_new_tokens",
        "12",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    text = "你好\n再见\n/clear\n你好\n/prefix\n/prefix /no/such\n/prefix none\n" + "长" * 9000 + "\n你好\n/exit\n不问\n"
    done = subprocess.run(
        command, env=environment, input=text, capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answers = [line.split("答：")[1] for line in done.stdout.splitlines() if "答：" in line]
    assert answers[0] == answers[2] == "你好！有什么可以帮你的吗？" and len(answers) == 4
    assert "error: /no/such" in done.stdout and f"{MODEL.name} answers" in done.stdout
    assert "the model's context is 2048" in done.stdout
