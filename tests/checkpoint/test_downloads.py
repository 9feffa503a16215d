"""modelscope:OWNER/NAME with a package that stands for ModelScope's."""

import shutil
import sys
from types import SimpleNamespace

import pytest

from ptuning.checkpoint.base import base_fingerprint, resolve_base
from ptuning.checkpoint.downloads import modelscope_folder
from ptuning.checkpoint.manifest import describe
from ptuning.errors import ModelError
from ptuning.loading import load_model

NAME = "modelscope:ZhipuAI/chatglm2-6b"
SETTINGS = {"pre_seq_len": 4, "prefix_projection": False}


@pytest.fixture
def package(monkeypatch):
    """Sets what snapshot_download does."""
    modelscope_folder.cache_clear()

    def use(snapshot_download) -> None:
        monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot_download))

    yield use
    modelscope_folder.cache_clear()


def test_the_copy_is_used_like_a_folder(package, tmp_path, golden_dir, tiny_tokenizer):
    folder, asked = tmp_path / "copy", []
    shutil.copytree(golden_dir / "chatglm2-tiny", folder)
    package(lambda model: asked.append(model) or str(folder))
    assert resolve_base(NAME) == folder
    assert base_fingerprint(NAME) == base_fingerprint(folder)
    manifest = describe(
        NAME,
        "prefix",
        SETTINGS,
        dtype="float32",
        max_source_length=8,
        max_target_length=8,
        source_prefix="",
        loss_on="last",
    )
    assert manifest.base.name_or_path == NAME, "what was given, and not where this machine has it"
    assert asked == ["ZhipuAI/chatglm2-6b"], "once"


def test_a_model_is_loaded(package):
    package(lambda model: "models/chatglm2-tiny")
    model, tokenizer = load_model(NAME)
    assert model.config.num_hidden_layers and len(tokenizer)


def test_without_network_the_earlier_download_serves(package, tmp_path):
    def download(model, local_files_only=False):
        if not local_files_only:
            raise ConnectionError("no route to host")
        return str(tmp_path)

    package(download)
    assert resolve_base(NAME) == tmp_path


def test_what_can_not_be_had(package):
    def download(model, local_files_only=False):
        raise ValueError("Cannot find the cache" if local_files_only else "no route to host\nand more")

    package(download)
    with pytest.raises(ModelError) as caught:
        resolve_base(NAME)
    assert str(caught.value) == (
        f"{NAME}: can't be downloaded (no route to host): correct the name, or download it where there is network (modelscope "
        "download --model ZhipuAI/chatglm2-6b --local_dir DIR) and give DIR"
    )


def test_a_missing_package(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)  # which importing refuses
    with pytest.raises(ModelError) as caught:
        resolve_base(NAME)
    assert str(caught.value) == (
        f"{NAME}: downloading from ModelScope needs its package: .venv/bin/python -m pip install modelscope"
    )
