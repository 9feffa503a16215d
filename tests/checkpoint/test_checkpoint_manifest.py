"""What a tuned checkpoint says of itself: one format for every method, and the two of version 1."""

import json
from dataclasses import replace

import pytest

from ptuning.checkpoint.manifest import describe, read_manifest
from ptuning.errors import CheckpointError
from ptuning.methods import attach_checkpoint
from ptuning.methods.prefix.attach import prefix_of
from ptuning.methods.prefix.checkpoint import save_prefix
from ptuning.methods.prefix.read import read_prefix
from ptuning.runs.folder import MANIFEST

FINGERPRINT = "df0c8249201158ea"
VERSIONS = {"ptuning": "0.1.0", "torch": "2.7", "transformers": "5.0", "python": "3.12"}


def edit(folder, **changes) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(("method", "settings"), [("prefix", {"pre_seq_len": 8}), ("full", {}), ("other", {"rank": 4})])
def test_one_format_for_every_method(tmp_path, base_dir, method, settings):
    assert read_manifest(tmp_path) is None
    lengths = {"max_source_length": 64, "max_target_length": 32}
    manifest = describe(
        base_dir, method, settings, dtype="bfloat16", source_prefix="写广告：", loss_on="all", **lengths
    )
    replace(manifest, step=7).write(tmp_path)
    assert read_manifest(tmp_path) == replace(manifest, step=7)
    values = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    assert (values["format"], values["format_version"]) == ("ptuning", 2)
    assert (values["method"], values["settings"], values["template"]) == (method, settings, "chatglm2")
    assert values["base"] == {
        "name_or_path": str(base_dir),
        "fingerprint": FINGERPRINT,
        "family": "chatglm2",
        "layers": 3,
        "groups": 2,
        "head_dim": 16,
        "hidden": 64,
        "dtype": "bfloat16",
        "precision": "",
    }


def test_the_base_is_found_from_any_working_directory(base_dir, monkeypatch):
    monkeypatch.chdir(base_dir.parent)
    assert describe(base_dir.name, "full", {}).base.name_or_path == str(base_dir)


@pytest.mark.parametrize("variant", ["embedding"], indirect=True)
def test_version_1_of_a_prefix_is_still_read(tmp_path, load_tiny, official, described, base_dir):
    """As release 0.1 wrote it."""
    save_prefix(tmp_path, official.tensors, described)
    file = next(tmp_path.glob("prefix-*.safetensors"))
    written = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    base = {"name_or_path": str(base_dir), "fingerprint": FINGERPRINT, "num_layers": 3, "multi_query_group_num": 2}
    values = {
        "format": "ptuning-prefix",
        "format_version": 1,
        "pre_seq_len": 8,
        "prefix_projection": False,
        "base": base | {"kv_channels": 16, "hidden_size": 64},
        "template": "chatglm2",
        "max_source_length": 64,
        "max_target_length": 32,
        "source_prefix": "写广告：",
        "loss_on": "all",
        "dtype": "float32",
        "base_dtype": "float32",
        "versions": VERSIONS,
        "file": file.name,
        "sha256": written["sha256"],
    }
    (tmp_path / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    back = read_prefix(tmp_path)
    assert back.manifest == replace(described, file=file.name, sha256=written["sha256"], versions=VERSIONS)
    model = load_tiny()
    attach_checkpoint(model, tmp_path, base_dir)
    assert prefix_of(model).pre_seq_len == 8
    edit(tmp_path, pre_seq_len=9)
    with pytest.raises(CheckpointError, match=r"\(9, False\) and the tensors say \(8, False\)"):
        read_prefix(tmp_path)
    edit(tmp_path, base={"name_or_path": "x", "fingerprint": "y"})
    with pytest.raises(CheckpointError, match=r"base\.num_layers is missing; the checkpoint is damaged"):
        read_prefix(tmp_path)
    edit(tmp_path, format_version=2)
    with pytest.raises(CheckpointError, match=r"format_version is 2, and this ptuning .* reads up to 1"):
        read_prefix(tmp_path)


def test_version_1_of_a_full_model_is_still_read(tmp_path):
    """As release 0.1 wrote it."""
    values = {
        "format": "ptuning-full",
        "format_version": 1,
        "base_name_or_path": "/models/chatglm2-6b",
        "base_fingerprint": FINGERPRINT,
        "template": "chatglm2",
        "max_source_length": 64,
        "max_target_length": 32,
        "source_prefix": "写广告：",
        "loss_on": "all",
        "step": 100,
        "versions": VERSIONS,
    }
    (tmp_path / "ptuning_full.json").write_text(json.dumps(values), encoding="utf-8")
    found = read_manifest(tmp_path)
    assert (found.method, found.settings, found.step, found.versions) == ("full", {}, 100, VERSIONS)
    assert (found.base.name_or_path, found.base.fingerprint) == ("/models/chatglm2-6b", FINGERPRINT)
    assert (found.template, found.max_source_length, found.max_target_length) == ("chatglm2", 64, 32)
    assert (found.source_prefix, found.loss_on) == ("写广告：", "all")


def test_unknown_keys_are_ignored(tmp_path, manifest):
    manifest.write(tmp_path)
    edit(tmp_path, colour="blue")
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format is 'other', expected 'ptuning'"),
        ({"format_version": "2"}, "format_version is '2', expected a number from 1 to 2"),
        (
            {"format_version": 3, "versions": {"ptuning": "3.1.4"}},
            r"format_version is 3, .* reads up to 2. It was written by ptuning 3\.1\.4",
        ),
        ({"method": None}, "method is None, expected str"),
        ({"settings": [8]}, r"settings is \[8\], expected dict"),
        ({"max_source_length": "64"}, "max_source_length is '64'"),
        ({"base": None}, "base is None, expected an object"),
        ({"base": {"name_or_path": "x"}}, "base.fingerprint is missing"),
        ({"base": {"name_or_path": "x", "fingerprint": "y"}}, "base.family is missing"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path, manifest, changes, message):
    manifest.write(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ['{"format": "ptun', "", "[]"])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"not valid JSON|format is 'list'"):
        read_manifest(tmp_path)
