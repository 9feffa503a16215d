"""The command line of `ptuning serve`."""

import pytest

from ptuning.errors import ConfigError
from ptuning.serving.app import default_model
from ptuning.serving.backend import Served
from ptuning.serving.options import parse


def test_defaults():
    options = parse([])
    assert (options.host, options.port, options.web_port) == ("127.0.0.1", 7030, 7020)
    assert options.prefix is None and options.cors_origin == () and options.api_key is None


def test_prefixes_and_aliases():
    line = "--model_name_or_path m --prefix ads=out/a --prefix out/talk --cors_origin http://a --no_page"
    options = parse(line.split())
    assert options.model == "m"
    assert options.prefix == (("ads", "out/a"), ("talk", "out/talk"))
    assert options.cors_origin == ("http://a",)


def test_keys_from_the_environment(monkeypatch):
    monkeypatch.setenv("PTUNING_API_KEY", "a")
    monkeypatch.setenv("PTUNING_ADMIN_KEY", "b")
    options = parse(["--host", "0.0.0.0"])
    assert (options.api_key, options.admin_key) == ("a", "b")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_other_machines_need_a_key(host):
    with pytest.raises(ConfigError, match=r"--api_key.*--allow_remote"):
        parse(["--host", host])
    assert parse(["--host", host, "--api_key", "k"]).host == host
    assert parse(["--host", host, "--allow_remote"]).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_needs_none(host):
    assert parse(["--host", host]).api_key is None


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--port 70000", "--port is 70000"),
        ("--max_concurrent 0", "--max_concurrent is 0; the least is 1"),
        ("--max_queue -1", "--max_queue is -1"),
        ("--request_timeout 0", "--request_timeout is 0"),
        ("--step_timeout 90000", "--step_timeout is 90000.0; use seconds above 0 and up to 86400"),
        ("--api_key é", "ASCII"),
        ("--prefix =x", "expected NAME=DIR"),
        ("--prefix x=", "expected NAME=DIR"),
    ],
)
def test_values_that_cannot_be_used(line, text):
    with pytest.raises(ConfigError, match=text):
        parse(line.split())


def test_the_model_of_requests_that_name_none():
    base, one, two = Served("tiny", "m", 0), Served("a", "x", 0, kind="prefix"), Served("b", "y", 0, kind="prefix")
    assert default_model(parse([]), [base]) == "base"
    assert default_model(parse([]), [base, one]) == "a"
    assert default_model(parse([]), [base, one, two]) == "base"
    assert default_model(parse(["--default_model", "base"]), [base, one]) == "base"
