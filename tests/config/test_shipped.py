"""Files that come with the package, found by name."""

import json

import pytest

from ptuning.config import parse, shipped
from ptuning.errors import ConfigError
from ptuning.training.deepspeed_file import read_deepspeed
from tests.conftest import REPO

GIVEN = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]


def test_a_checkout_has_them_under_their_usual_name():
    assert (REPO / "configs").resolve() == shipped.FOLDER


@pytest.mark.parametrize("name", ["ptuning_official.yaml", "configs/ptuning_official.yaml"])
def test_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = parse(["--config", name, *GIVEN])
    assert config.training.learning_rate == 2e-2 and config.training.max_steps == 3000


@pytest.mark.parametrize("name", ["zero3.json", "configs/zero3.json"])
def test_a_deepspeed_file_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed(name)["zero_optimization"]["stage"] == 3


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert read_deepspeed("zero3.json") == {"zero_optimization": {"stage": 1}}
    assert shipped.find("zero3.json") == "zero3.json"


@pytest.mark.parametrize("name", ["other/zero3.json", "/configs/zero3.json", "../configs/zero3.json"])
def test_another_folder_is_not_searched_in_the_package(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find(name) == name
    with pytest.raises(ConfigError, match=r"no such file; did you mean zero3.json"):
        read_deepspeed(name)


def test_what_there_is_stands_in_the_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        parse(["--config", "xyz.yaml"])
    assert str(error.value) == (
        f"xyz.yaml: no such file; looked in {tmp_path}, and these come with the package: baichuan13b_full.yaml, "
        "baichuan13b_lora.yaml, baichuan13b_prefix.yaml, chatglm3_lora.yaml, chatglm3_prefix.yaml, full_demo.yaml, "
        "full_zero3.yaml, glm4_lora.yaml, glm4_prefix.yaml, lora_demo.yaml, ptuning_chat.yaml, ptuning_demo.yaml, "
        "ptuning_official.yaml"
    )
    with pytest.raises(
        ConfigError, match=r"^ptuning_oficial.yaml: no such file; did you mean ptuning_official.yaml\?$"
    ):
        parse(["--config", "ptuning_oficial.yaml"])
    (tmp_path / "mine.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"^\S*/mime.yaml: no such file; did you mean \S*/mine.yaml\?$"):
        parse(["--config", str(tmp_path / "mime.yaml")])
