"""`ptuning serve` greets in the language that was asked for, and its page's process gets the same, on the family's port."""

import socket
import subprocess

import pytest

from ptuning.errors import ConfigError
from ptuning.families import Family
from ptuning.families.baichuan.family import Baichuan
from ptuning.serving import server
from ptuning.serving.options import parse
from tests.conftest import REPO
from tests.serving.conftest import BASE


class Page:
    """Stands for the page's process; keeps its command line and environment."""

    command: list[str]
    environment: dict[str, str]
    stderr = None

    def __init__(self, command, env, **kwargs):
        Page.command, Page.environment = command, env

    def send_signal(self, number):
        pass

    def wait(self, timeout=None):
        return 0


@pytest.fixture
def serve(monkeypatch, tmp_path, free_port, capsys):
    """Serves until it has greeted; returns what it said."""
    monkeypatch.chdir(tmp_path)  # where no prefixes are
    monkeypatch.setattr(subprocess, "Popen", Page)
    monkeypatch.setattr(Family, "web_port", free_port)
    monkeypatch.setattr(server, "configure_logs", lambda: None)  # of the whole process
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: [socket.close() for socket in sockets])

    def run(*flags: str) -> list[str]:
        options = parse(["--model", str(BASE), "--port", "0", *flags])
        assert server.serve(options) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize(
    ("variable", "flags", "expected"),
    [("zh", [], "zh"), ("en", [], "en"), ("en", ["--lang", "zh"], "zh"), ("zh", ["--lang", "en"], "en")],
)
def test_greeting_and_page(serve, monkeypatch, variable, flags, expected):
    monkeypatch.setenv("PTUNING_LANG", variable)
    api, page, example = serve(*flags)
    said = {
        "zh": (f"   模型：{BASE.name}；没有指定模型的请求由 {BASE.name} 回答", "网页   http://", "试一试 curl "),
        "en": (f"   models: {BASE.name}; requests that name none get {BASE.name}", "Page   http://", "Try    curl "),
    }[expected]
    assert api.endswith(said[0]) and page.startswith(said[1]) and example.startswith(said[2])
    assert Page.environment["PTUNING_LANG"] == expected


def test_beside_a_server_of_another_family(serve, monkeypatch, free_port):
    """Whose page has the other default port: that one is taken, and nobody said --web_port."""
    monkeypatch.setattr(Baichuan, "web_port", free_port)
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(Family, "web_port", other.getsockname()[1])
        page = serve("--model", str(REPO / "models" / "baichuan-tiny"))[1]
        assert page.endswith(f"http://127.0.0.1:{free_port}") and f"--server.port={free_port}" in Page.command
        with pytest.raises(ConfigError, match=r"Address already in use; choose another with --web_port"):
            serve()
