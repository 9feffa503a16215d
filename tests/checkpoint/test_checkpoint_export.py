"""Exports compute the same in the other program, and read back as the same prefix."""

import json

import pytest
import torch
from peft import PeftModel

from ptuning.errors import CheckpointError
from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.methods import attach_checkpoint
from ptuning.methods.prefix.checkpoint import for_base, materialise, save_prefix
from ptuning.methods.prefix.export import export_official, export_peft
from ptuning.methods.prefix.read import read_prefix

GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def peft_folder(tmp_path, official, base_config):
    return export_peft(official, base_config, tmp_path / "peft", base_name="THUDM/chatglm2-6b")


@pytest.fixture
def peft_model(peft_folder, load_tiny):
    return PeftModel.from_pretrained(load_tiny(), str(peft_folder)).eval()


@torch.no_grad()
def test_peft_logits_on_full_rows(peft_model, golden, variant):
    logits = peft_model(input_ids=golden["full.input_ids"]).logits
    torch.testing.assert_close(logits, golden[f"prefix_{variant}.full.logits"], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [True, False])
def test_peft_logits_on_left_padded_rows(peft_model, golden, variant, with_positions):
    mask = golden["padded.attention_mask"]
    positions = {"position_ids": golden["padded.position_ids"]} if with_positions else {}
    logits = peft_model(input_ids=golden["padded.input_ids"], attention_mask=mask, **positions).logits
    expected = golden[f"prefix_{variant}.padded.logits"]
    torch.testing.assert_close(logits * mask[..., None], expected, atol=1e-5, rtol=0)


def test_peft_generates_the_same(peft_model, golden, variant):
    ids, mask = golden["padded.input_ids"], golden["padded.attention_mask"]
    answers = peft_model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(answers, golden[f"prefix_{variant}.padded.greedy"])


@torch.no_grad()
def test_without_the_rotation_peft_computes_something_else(
    tmp_path, official, base_config, load_tiny, golden, variant, monkeypatch
):
    monkeypatch.setattr("ptuning.methods.prefix.export.rotate_rows", lambda rows, offset, config: rows)
    folder = export_peft(official, base_config, tmp_path / "unrotated")
    logits = PeftModel.from_pretrained(load_tiny(), str(folder)).eval()(input_ids=golden["full.input_ids"]).logits
    assert (logits - golden[f"prefix_{variant}.full.logits"]).abs().max() > 0.1


def test_peft_folder_reads_back(peft_folder, official, base_config, load_tiny, golden, variant):
    back = read_prefix(peft_folder)
    assert (back.kind, back.pre_seq_len, back.prefix_projection) == ("peft", 8, False)
    raw = for_base(back, base_config).tensors["embedding.weight"]
    torch.testing.assert_close(raw, materialise(official), atol=1e-6, rtol=0)
    model = load_tiny()
    attach_checkpoint(model, peft_folder, "not looked at: a peft folder has no fingerprint")
    with torch.no_grad():
        logits = model(input_ids=golden["full.input_ids"]).logits
    torch.testing.assert_close(logits, golden[f"prefix_{variant}.full.logits"], atol=1e-5, rtol=0)
    assert (
        json.loads((peft_folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "THUDM/chatglm2-6b"
    )


def test_rotated_keys_cannot_be_used_by_accident(peft_folder):
    with pytest.raises(CheckpointError, match="peft stores keys rotated to position 8; use for_base"):
        _ = read_prefix(peft_folder).tensors


def test_peft_folder_of_another_base_is_refused(peft_folder):
    other = ChatGLMConfig(num_layers=3, multi_query_group_num=4, kv_channels=8, hidden_size=64, num_attention_heads=8)
    with pytest.raises(CheckpointError, match=r"num_key_value_heads 2 in the checkpoint, 4 in the base"):
        for_base(read_prefix(peft_folder), other)


def test_peft_folder_damaged(peft_folder):
    config = peft_folder / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_layers": None}))
    with pytest.raises(CheckpointError, match=r"num_layers, num_attention_heads and token_dim must be numbers"):
        read_prefix(peft_folder)
    (peft_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        read_prefix(peft_folder)


def test_official_export_is_what_the_official_trainer_writes(
    tmp_path, official, described, base_config, golden_dir, variant
):
    ours = read_prefix(save_prefix(tmp_path / "ours", official.tensors, described))
    folder = export_official(ours, base_config, tmp_path / "official")
    golden_folder = golden_dir / f"prefix-{variant}"
    written, expected = (torch.load(f / "pytorch_model.bin", weights_only=True) for f in (folder, golden_folder))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    config, expected = (json.loads((f / "config.json").read_text()) for f in (folder, golden_folder))
    assert {key: config.get(key) for key in expected if key not in ("transformers_version", "auto_map")} == {
        key: value for key, value in expected.items() if key not in ("transformers_version", "auto_map")
    }
    assert read_prefix(folder).kind == "official"


def test_peft_to_official(tmp_path, peft_folder, official, base_config):
    folder = export_official(read_prefix(peft_folder), base_config, tmp_path / "official")
    raw = read_prefix(folder).tensors["embedding.weight"]
    torch.testing.assert_close(raw, materialise(official), atol=1e-6, rtol=0)


@pytest.mark.parametrize("export", [export_official, export_peft])
def test_export_leaves_other_files_alone(tmp_path, official, base_config, export):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and isn't empty; export into a new folder"):
        export(official, base_config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
