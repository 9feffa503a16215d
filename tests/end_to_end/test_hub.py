"""A base and rows by their names on the hub: downloaded once, then used without it. A small server stands for the hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from ptuning.runs.folder import MANIFEST
from tests.conftest import REPO

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL, ROWS = "THUDM/chatglm2-tiny", "someone/rows"
TRAINED = "trained\n"
# Two processes that import once: the second knows nothing of what the first has downloaded but what lies on disk.
TWICE = """
import os, sys
import ptuning.main
from ptuning.checkpoint.base import whole_folder
from ptuning.cli import main

if os.fork() == 0:
    status = main(sys.argv[2:])
    sys.stdout.flush()
    os._exit(status)
assert os.wait()[1] == 0
print("trained", flush=True)
sys.stdin.readline()
print(whole_folder(sys.argv[1]))
"""


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub to read public repositories; `root` has models/OWNER/NAME and datasets/OWNER/NAME."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[str]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(path)
        if path.startswith("api/"):
            kind, owner, name, *rest = [*path.split("/")[1:], "", ""]
            return self.describe(self.root / kind / owner / name, f"{owner}/{name}", rest)
        if "/resolve/" not in path:
            return self.answer(404)
        repository, _, file = path.partition("/resolve/")
        folder = self.root / (repository if repository.startswith("datasets/") else f"models/{repository}")
        return self.give(folder, folder / file.partition("/")[2])

    do_HEAD = do_GET

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(404)

    def describe(self, folder: Path, name: str, rest: list[str]):
        if not folder.is_dir() or not folder.name:
            return self.answer(404, X_Error_Code="RepoNotFound")
        files = sorted(file.name for file in folder.iterdir())
        if rest[0] == "tree" and rest[2]:  # a folder in it, and there are none
            return self.answer(404, X_Error_Code="EntryNotFound")
        values = {
            "id": name,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "siblings": [{"rfilename": f} for f in files],
        }
        tree = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": tag(folder / f)} for f in files]
        return self.answer(200, json.dumps(tree if rest[0] == "tree" else values).encode())

    def give(self, folder: Path, file: Path):
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound" if folder.is_dir() else "RepoNotFound")
        return self.answer(200, file.read_bytes(), ETag=f'"{tag(file)}"')

    def answer(self, status: int, body: bytes = b"{}", **headers: str):
        self.send_response(status)
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def hub(root: Path):
    """The server's address, and the paths that it was asked for."""
    handler = type("ThisHub", (Hub,), {"root": root, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
        server.shutdown()


@pytest.mark.slow
def test_a_base_and_rows_of_the_hub(tmp_path):
    root = tmp_path / "root"
    model = root / "models" / MODEL
    shutil.copytree(REPO / "models" / "chatglm2-tiny", model)
    (model / "pytorch_model.bin").write_bytes(b"the same weights again")
    rows = root / "datasets" / ROWS
    rows.mkdir(parents=True)
    shutil.copy(REPO / "data" / "advertise" / "dev.json", rows / "train.json")

    tuned = tmp_path / "tuned"
    train = ["train", "--model_name_or_path", MODEL, "--dataset_name", ROWS, "--output_dir", tuned, "--max_steps", 1]
    train += ["--prompt_column", "content", "--response_column", "summary", "--report_to", "none", "--pre_seq_len", 8]
    train += ["--per_device_train_batch_size", 1]
    with hub(root) as (address, asked):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets")}
        command = [sys.executable, "-c", TWICE, MODEL, *map(str, train)]
        errors = tmp_path / "errors.txt"
        with errors.open("w") as written:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, text=True
            )
        said = "".join(takewhile(TRAINED.__ne__, process.stdout))
        assert "320 rows of dataset:someone/rows:train" in said, errors.read_text()[-3000:]
    assert f"{MODEL}/resolve/{COMMIT}/model.safetensors" in asked
    assert not [path for path in asked if path.endswith(".bin")], "the same weights in the older form"
    manifest = json.loads((tuned / MANIFEST).read_text())
    assert manifest["base"]["name_or_path"] == MODEL

    out, _ = process.communicate("nobody answers any more\n", timeout=600)
    assert process.returncode == 0, errors.read_text()[-3000:]
    folder = Path(out.strip())
    assert (folder / "model.safetensors").is_file() and not (folder / "pytorch_model.bin").exists()
