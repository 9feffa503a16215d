"""Saving and reading our own prefix folders, and what a kill in the middle leaves."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptuning.errors import CheckpointError
from ptuning.methods.prefix import checkpoint
from ptuning.methods.prefix.attach import prefix_of
from ptuning.methods.prefix.checkpoint import save_prefix
from ptuning.methods.prefix.read import read_prefix


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(folder: Path, **changes) -> None:
    path = folder / "ptuning_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_round_trip(tmp_path, official, described):
    save_prefix(tmp_path / "a" / "b", official.tensors, described)
    back = read_prefix(tmp_path / "a" / "b")
    assert back.kind == "ptuning"
    assert (back.pre_seq_len, back.prefix_projection) == (8, official.prefix_projection)
    assert back.tensors.keys() == official.tensors.keys()
    assert all(torch.equal(back.tensors[name], official.tensors[name]) for name in official.tensors)
    for name in ("base", "template", "max_source_length", "max_target_length", "source_prefix", "loss_on", "versions"):
        assert getattr(back.manifest, name) == getattr(described, name)
    assert back.manifest.source_prefix == "写广告："
    assert set(back.manifest.versions) >= {"ptuning", "torch", "transformers", "python"}


def test_file_has_official_names_in_fp32(tmp_path, official, described):
    save_prefix(tmp_path, {name: tensor.bfloat16() for name, tensor in official.tensors.items()}, described)
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    assert set(stored) == {f"transformer.prefix_encoder.{name}" for name in official.tensors}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_saves_an_encoder(tmp_path, load_tiny, manifest):
    encoder = prefix_of(load_tiny("embedding"))
    save_prefix(tmp_path, encoder, manifest)
    assert torch.equal(read_prefix(tmp_path).tensors["embedding.weight"], encoder.embedding.weight)


def test_replaces_only_its_own_files(tmp_path, official, described, other_tensors):
    (tmp_path / "trainer_state.json").write_text("{}")
    save_prefix(tmp_path, official.tensors, described)
    save_prefix(tmp_path, other_tensors, described)
    assert torch.equal(read_prefix(tmp_path).tensors["embedding.weight"], other_tensors["embedding.weight"])
    assert (tmp_path / "trainer_state.json").read_text() == "{}"
    assert len(files_of(tmp_path)) == 3
    save_prefix(tmp_path, other_tensors, described)  # the same again: its own file must not be deleted as an older one
    assert torch.equal(read_prefix(tmp_path).tensors["embedding.weight"], other_tensors["embedding.weight"])


class Killed(BaseException):
    """Not an Exception, so that no handler in the code can tidy up: a killed process doesn't either."""


def kill_at(monkeypatch, k: int) -> list[str]:
    """Lets the k-th file operation, and all after it, do half of its work or none, then die. Returns the operations."""
    done = []

    def dying(name, original, half=None):
        def call(*args, **kwargs):
            done.append(name)
            if len(done) < k:
                return original(*args, **kwargs)
            if half and len(done) == k:
                half(*args)
            raise Killed(name)

        return call

    monkeypatch.setattr(Path, "replace", dying("replace", Path.replace))
    monkeypatch.setattr(Path, "unlink", dying("unlink", Path.unlink))
    monkeypatch.setattr(os, "fsync", dying("fsync", os.fsync))
    write_half = Path.write_bytes
    torn = dying("save_file", checkpoint.save_file, lambda tensors, path, **_: write_half(path, b"\x08half"))
    monkeypatch.setattr(checkpoint, "save_file", torn)
    torn = dying("write", Path.write_text, lambda path, text, **_: write_half(path, text[: len(text) // 2].encode()))
    monkeypatch.setattr(Path, "write_text", torn)
    return done


def test_a_kill_leaves_the_old_prefix_or_the_new_one(tmp_path, official, described, other_tensors):
    outcomes = []
    for k in range(1, 50):
        folder = save_prefix(tmp_path / str(k), official.tensors, described)
        with pytest.MonkeyPatch.context() as patch:
            done = kill_at(patch, k)
            try:
                save_prefix(folder, other_tensors, described)
            except Killed:
                pass
            else:
                break
        left = read_prefix(folder).tensors
        old, new = (all(torch.equal(left[n], t[n]) for n in t) for t in (official.tensors, other_tensors))
        assert old != new, f"neither one nor the other after {done}"
        outcomes.append("new" if new else "old")
        save_prefix(folder, other_tensors, described)
        assert len(files_of(folder)) == 2, "the next save cleans up what the kill left"
    assert done == ["save_file", "fsync", "replace", "fsync", "write", "fsync", "replace", "fsync", "unlink"]
    assert outcomes == ["old"] * 7 + ["new"] * 2


def test_a_kill_of_the_first_save_leaves_nothing_that_loads(tmp_path, official, described):
    for k in range(1, 8):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, k)
            save_prefix(tmp_path / str(k), official.tensors, described)
        with pytest.raises(CheckpointError):
            read_prefix(tmp_path / str(k))


def test_an_interrupted_first_save_is_named(tmp_path, official, described):
    save_prefix(tmp_path, official.tensors, described)
    (tmp_path / "ptuning_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"save that was interrupted before ptuning_config.json was written"):
        read_prefix(tmp_path)


def test_one_changed_byte_is_noticed(tmp_path, official, described):
    save_prefix(tmp_path, official.tensors, described)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged, its sha256 is [0-9a-f]{16}….* says [0-9a-f]{16}…"):
        read_prefix(tmp_path)


def test_missing_tensor_file_is_named(tmp_path, official, described):
    save_prefix(tmp_path, official.tensors, described)
    (file,) = tmp_path.glob("*.safetensors")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        read_prefix(tmp_path)


def test_a_file_outside_the_folder_is_refused(tmp_path, official, described):
    save_prefix(tmp_path, official.tensors, described)
    edit(tmp_path, file="../secret.safetensors")
    with pytest.raises(CheckpointError, match="expected the name of a file in the same folder"):
        read_prefix(tmp_path)


@pytest.mark.parametrize("said", [9, "8", None])
def test_a_manifest_that_contradicts_the_tensors_is_refused(tmp_path, golden_dir, manifest, said):
    save_prefix(tmp_path, read_prefix(golden_dir / "prefix-embedding").tensors, manifest)
    edit(tmp_path, settings={"pre_seq_len": said, "prefix_projection": False})
    with pytest.raises(CheckpointError, match=rf"\({said!r}, False\) and the tensors say \(8, False\)"):
        read_prefix(tmp_path)


def test_another_methods_folder_is_refused(tmp_path, official, described):
    save_prefix(tmp_path, official.tensors, described)
    edit(tmp_path, method="full")
    with pytest.raises(CheckpointError, match=r"method is 'full', so it is not a prefix. Expected a folder with"):
        read_prefix(tmp_path)


def test_saving_refuses_what_could_not_be_read_again(tmp_path, golden_dir, manifest):
    tensors = read_prefix(golden_dir / "prefix-embedding").tensors
    with pytest.raises(CheckpointError, match=r"\(7, 192, False\) in the tensors, \(8, 192, False\) in the manifest"):
        save_prefix(tmp_path, {"embedding.weight": tensors["embedding.weight"][:7]}, manifest)
    diverged = tensors["embedding.weight"].clone()
    diverged[0, :3] = float("nan")
    with pytest.raises(CheckpointError, match="3 of 1536 numbers that are NaN or infinite"):
        save_prefix(tmp_path, {"embedding.weight": diverged}, manifest)
    assert files_of(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path, golden_dir, manifest):
    (tmp_path / "file").write_text("")
    tensors = read_prefix(golden_dir / "prefix-embedding").tensors
    with pytest.raises(CheckpointError, match="the prefix can't be written"):
        save_prefix(tmp_path / "file" / "folder", tensors, manifest)
