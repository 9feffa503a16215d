"""Official directories load as they are, and save_pretrained writes the official format back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.methods.prefix.attach import attach_prefix, detach_prefix, prefix_of


def official_keys(layers: int) -> set[str]:
    """Section 1 of the facts: what an official checkpoint is made of."""
    keys = {"embedding.word_embeddings.weight", "encoder.final_layernorm.weight", "output_layer.weight"}
    for index in range(layers):
        at = f"encoder.layers.{index}."
        keys |= {at + "input_layernorm.weight", at + "post_attention_layernorm.weight"}
        keys |= {at + "self_attention.query_key_value.weight", at + "self_attention.query_key_value.bias"}
        keys |= {at + "self_attention.dense.weight", at + "mlp.dense_h_to_4h.weight", at + "mlp.dense_4h_to_h.weight"}
    return {"transformer." + key for key in keys}


@pytest.fixture(scope="module")
def original(golden_dir) -> dict[str, torch.Tensor]:
    shards = (golden_dir / "chatglm2-tiny").glob("pytorch_model-*.bin")
    tensors = {key: t for shard in shards for key, t in torch.load(shard, weights_only=True).items()}
    return {key: t for key, t in tensors.items() if not key.endswith("rotary_pos_emb.inv_freq")}


def written_tensors(folder) -> dict[str, torch.Tensor]:
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def assert_same(written: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> None:
    assert set(written) == set(original)
    assert all(torch.equal(written[key], tensor) for key, tensor in original.items())


def test_the_golden_checkpoint_has_the_official_keys(original):
    assert set(original) == official_keys(3)


@pytest.mark.parametrize("form", ["bin", "safetensors", "sharded safetensors"])
def test_an_unmodified_official_directory_loads(tmp_path, golden_dir, golden, original, tiny_tokenizer, form):
    folder = tmp_path / "official"
    if form == "bin":
        shutil.copytree(golden_dir / "chatglm2-tiny", folder)
    else:
        folder.mkdir()
        shutil.copy(golden_dir / "chatglm2-tiny" / "config.json", folder)
        # The official repository also holds a buffer that is computed, not loaded.
        tensors = {**original, "transformer.rotary_pos_emb.inv_freq": torch.ones(4)}
        keys = sorted(tensors)
        parts = [keys] if form == "safetensors" else [keys[:9], keys[9:]]
        names = ["model.safetensors"] if len(parts) == 1 else [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for name, part in zip(names, parts, strict=True):
            save_file({key: tensors[key].contiguous() for key in part}, folder / name, metadata={"format": "pt"})
        if len(parts) == 2:
            index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            text = json.dumps({"metadata": {}, "weight_map": index})
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    shutil.copy(tiny_tokenizer.vocab_file, folder / "tokenizer.model")
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    config = {"name_or_path": "THUDM/chatglm2-6b", "remove_space": False, "do_lower_case": False}
    config |= {"tokenizer_class": "ChatGLMTokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    assert type(AutoConfig.from_pretrained(folder)) is ChatGLMConfig
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is ChatGLMTokenizer
    assert tokenizer("你好").input_ids == tiny_tokenizer("你好").input_ids
    for auto in (AutoModelForCausalLM, AutoModel):
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert type(model) is ChatGLMForConditionalGeneration
        assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            logits = model.eval()(golden["full.input_ids"]).logits
        assert (logits - golden["base.full.logits"]).abs().max() <= 1e-6


@pytest.mark.parametrize("prefix", [None, "embedding", "projection"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_save_pretrained_writes_the_official_format(tmp_path, golden, load_tiny, original, prefix, max_shard_size):
    model = load_tiny(prefix)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "50KB")
    assert_same(written_tensors(tmp_path), original)
    assert "prefix" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    if max_shard_size == "50KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert set(index["weight_map"]) == set(original)
    detach_prefix(model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = [one(golden["full.input_ids"]).logits for one in (model, again)]
    assert torch.equal(*logits)


def test_a_given_state_dict_is_written_without_its_prefix(tmp_path, load_tiny, original):
    model = load_tiny("embedding")
    state_dict = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    assert_same(written_tensors(tmp_path), {key: tensor + 1 for key, tensor in original.items()})


def test_prefix_tensors_in_an_official_checkpoint_are_left_out(tmp_path, golden_dir, original):
    shutil.copy(golden_dir / "prefix-embedding" / "config.json", tmp_path)
    saved = torch.load(golden_dir / "prefix-embedding" / "pytorch_model.bin", weights_only=True)
    torch.save(original | saved, tmp_path / "pytorch_model.bin")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert prefix_of(model) is None
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_missing_tensor_is_not_silent(tmp_path, golden_dir, original):
    shutil.copy(golden_dir / "chatglm2-tiny" / "config.json", tmp_path)
    lost = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    torch.save({key: tensor for key, tensor in original.items() if key != lost}, tmp_path / "pytorch_model.bin")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.1.mlp.down_proj.weight"}


def test_the_6b_shape(tmp_path):
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig())
        attach_prefix(model, 128)
    count = {name: parameter.numel() for name, parameter in model.named_parameters()}
    prefix = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert prefix == {"prefix_encoder.embedding.weight": 1_835_008}
    assert sum(count.values()) - sum(prefix.values()) == 6_243_584_000
    # q, k and v are one official tensor, so 28 layers hold 28 x (2 x 2) tensors more than the official key set.
    assert len(count) - 1 - 28 * 4 == len(official_keys(28))


def test_the_official_keys_of_a_6b_shaped_model_with_two_layers(tmp_path):
    small = {
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "kv_channels": 8,
        "num_attention_heads": 4,
        "padded_vocab_size": 40,
    }
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(num_layers=2, **small))
    model.save_pretrained(tmp_path)
    written = written_tensors(tmp_path)
    assert set(written) == official_keys(2)
    fused = "transformer.encoder.layers.1.self_attention.query_key_value."
    assert written[fused + "weight"].shape == ((4 + 2 * 2) * 8, 32)
    assert written[fused + "bias"].shape == ((4 + 2 * 2) * 8,)
    attention = model.model.layers[1].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(written[fused + "weight"], torch.cat(parts))
