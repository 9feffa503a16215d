"""`ptuning export --format vllm`: folders that vLLM reads right, computed here by transformers' own classes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from ptuning.checkpoint.base import base_fingerprint
from ptuning.checkpoint.manifest import describe
from ptuning.cli import main
from ptuning.config.options import ModelArguments
from ptuning.errors import CheckpointError
from ptuning.loading import load_base
from ptuning.methods import SaveTarget, attach_checkpoint, method_of, store_checkpoint
from ptuning.methods.store import digest
from tests.conftest import REPO
from tests.methods.test_lora import randomise

SMALL = REPO / "models" / "chatglm2-tiny"


def exported(folder, *flags):
    assert main(["export", "--format", "vllm", *map(str, flags), "--output_dir", str(folder)]) == 0
    return folder


def native(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "GlmForCausalLM"
    return model


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def test_the_official_logits(golden_dir, golden, tmp_path):
    base = golden_dir / "chatglm2-tiny"
    folder = exported(tmp_path / "out", "--model_name_or_path", base, "--dtype", "float32")
    assert (logits(native(folder), golden["full.input_ids"]) - golden["base.full.logits"]).abs().max() == 0
    values = json.loads((folder / "config.json").read_text())
    official = json.loads((base / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert values["max_position_embeddings"] == official["seq_length"] + 512, "a prefix takes none of the context"
    assert values["ptuning_base"] == base_fingerprint(base)
    assert not list(folder.glob("token*")), "vLLM would make a wrong tokenizer of it"


def test_where_vllm_has_the_official_format_wrong(tmp_path):
    """Heads that are wider than hidden / heads (this base has them) and a rope_ratio, in the files' own dtype."""
    base = tmp_path / "base"
    base.mkdir()
    for file in SMALL.iterdir():
        if file.suffix in (".json", ".safetensors", ".model"):
            (base / file.name).symlink_to(file)
    config = json.loads((SMALL / "config.json").read_text())
    assert config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config | {"rope_ratio": 8}))
    folder, ids = exported(tmp_path / "out", "--model_name_or_path", base), torch.arange(3, 43)[None]
    theirs, ours = native(folder), load_base(base, dtype="float16", device="cpu")
    assert theirs.dtype == torch.float16 and theirs.config.rope_parameters["factor"] == 8
    assert torch.equal(logits(theirs.float(), ids), logits(ours.float(), ids))


@pytest.mark.parametrize("kind", ["embedding", "projection"])
def test_a_prefix_of_the_store_is_the_attached_one(golden_dir, golden, kind, tmp_path, capsys):
    base = golden_dir / "chatglm2-tiny"
    flags = ("--ptuning_checkpoint", golden_dir / f"prefix-{kind}", "--model_name_or_path", base)
    exported(tmp_path / "store", *flags)
    exported(tmp_path / "store", *flags)  # the same content: the same file
    (file,) = (tmp_path / "store").iterdir()
    assert str(file) in capsys.readouterr().out
    assert file.stat().st_mode & 0o777 == 0o644, "vLLM may run as another user"
    tensors = load_file(file)
    keys, values = tensors["keys"], tensors["values"]
    assert file.stem == digest((keys, values)) and keys.dtype == torch.float32
    # As vLLM computes it: the prefix in the cache, real tokens at positions from T on.
    model, cache, length = native(exported(tmp_path / "out", "--model_name_or_path", base)), DynamicCache(), 8
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
    ids = golden["full.input_ids"][:1]
    positions = torch.arange(length, length + ids.shape[1])[None]
    found = logits(model, ids, past_key_values=cache, position_ids=positions)
    assert (found - golden[f"prefix_{kind}.full.logits"][:1]).abs().max() < 2e-5


@pytest.fixture
def lora(tmp_path):
    """A random rsLoRA of the small base."""
    model = load_base(SMALL, device="cpu")
    method = method_of(ModelArguments(str(SMALL), method="lora", lora_rank=3, use_rslora=True), trains=True)
    method.start(model)
    randomise(model, 0)
    target = SaveTarget(tmp_path / "lora", True, torch.device("cpu"))
    method.save(model, None, describe(SMALL, method.name, method.settings()), target)
    return tmp_path / "lora"


def test_a_lora_of_the_store_is_the_attached_one(lora, tmp_path):
    stored, manifest, method = store_checkpoint(lora, SMALL, tmp_path / "store")
    assert stored.lora and not stored.prefix and manifest is not None and method.noun == "LoRA"
    folder = tmp_path / "store" / stored.lora
    values = json.loads((folder / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"]) == (3, 3), "vLLM reads no use_rslora of old folders and no patterns"
    theirs, ours, ids = load_base(SMALL, device="cpu"), load_base(SMALL, device="cpu"), torch.arange(3, 43)[None]
    attach_checkpoint(ours, lora, SMALL)
    attach_checkpoint(theirs, folder, SMALL)
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() < 1e-4
    assert (logits(ours, ids) - logits(load_base(SMALL, device="cpu"), ids)).abs().max() > 1e-2


def test_a_dora_is_refused(lora, tmp_path):
    path = lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="is a DoRA, which vLLM can't compute; merge it"):
        store_checkpoint(lora, SMALL, tmp_path / "store")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--format vllm needs --model_name_or_path (a model) or --ptuning_checkpoint"),
        (("--checkpoint", "x"), "write the model without --format first"),
        (("--ptuning_checkpoint", "x", "--dtype", "float16"), "is always float32; leave it out"),
        (("--model_name_or_path", "INT4"), "is quantised to int4; give --format compressed-tensors"),
        (("--model_name_or_path", SMALL, "--quantization_bit", 4), "is for --format compressed-tensors"),
        (("--ptuning_checkpoint", SMALL, "--model_name_or_path", SMALL), "it has no prefix"),
    ],
)
def test_refused(flags, said, golden_dir, tmp_path, capsys):
    flags = [str(golden_dir / "chatglm2-tiny-int4") if flag == "INT4" else str(flag) for flag in flags]
    assert main(["export", "--format", "vllm", *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
