"""Loading: what fits together works in one call, and everything else is refused with a reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptuning.checkpoint.manifest import describe
from ptuning.config.options import ModelArguments
from ptuning.errors import CheckpointError, ConfigError, ModelError
from ptuning.loading import load_base, load_model, load_tokenizer, resolve_dtype
from ptuning.methods import attach_checkpoint, method_of, self_test
from ptuning.methods.prefix.attach import prefix_of
from ptuning.methods.prefix.checkpoint import save_prefix
from ptuning.methods.prefix.read import read_prefix
from ptuning.quantization import precision_of

CPU = {"device": "cpu"}
VOCABULARY = 512  # the golden model's 320 are too few for the tests' tokenizer
NAMES = ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight")


@pytest.fixture(scope="module")
def golden_base(golden_dir) -> Path:
    return golden_dir / "chatglm2-tiny"


@pytest.fixture(scope="module")
def complete_base(tmp_path_factory, golden_base, tiny_tokenizer) -> Path:
    """The golden weights with a larger vocabulary, and a tokenizer: all that a downloaded folder has. Read only."""
    folder = tmp_path_factory.mktemp("base")
    state = {}
    for shard in golden_base.glob("*.bin"):
        state |= torch.load(shard, weights_only=True)
    torch.manual_seed(1)
    for name in NAMES:
        state[name] = torch.cat((state[name], torch.randn(VOCABULARY - len(state[name]), 64) / 8))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((golden_base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"padded_vocab_size": VOCABULARY}))
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path, complete_base) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(complete_base, tmp_path / "base"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, complete_base, golden_dir) -> Path:
    """The golden prefix in our format, on that base. Read only."""
    model = load_base(complete_base, **CPU)
    attach_checkpoint(model, golden_dir / "prefix-embedding", complete_base)
    settings = {"pre_seq_len": 8, "prefix_projection": False}
    manifest = describe(complete_base, "prefix", settings, max_source_length=64, max_target_length=32)
    return save_prefix(tmp_path_factory.mktemp("prefix"), prefix_of(model), manifest)


def edit_config(folder: Path, name: str = "config.json", **changes) -> None:
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(values | changes), encoding="utf-8")


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# --- what works ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["embedding", "projection"])
def test_official_prefix_on_official_base_gives_the_golden_logits(golden_base, golden_dir, golden, variant):
    model = load_base(golden_base, **CPU)
    attach_checkpoint(model, golden_dir / f"prefix-{variant}", golden_base)
    with torch.no_grad():
        logits = model(input_ids=golden["full.input_ids"]).logits
    torch.testing.assert_close(logits, golden[f"prefix_{variant}.full.logits"], atol=1e-5, rtol=0)


def test_one_call_gives_model_and_tokenizer(complete_base, checkpoint):
    model, tokenizer = load_model(complete_base, checkpoint, **CPU)
    assert not model.training
    assert not prefix_of(model).training
    assert model.dtype == torch.float32
    assert prefix_of(model).pre_seq_len == 8
    assert torch.equal(prefix_of(model).embedding.weight, read_prefix(checkpoint).tensors["embedding.weight"])
    encoded = tokenizer("你好", return_tensors="pt")
    tuned = model.generate(**encoded, max_new_tokens=8, do_sample=False)
    bare_model, _ = load_model(str(complete_base), **CPU)
    assert prefix_of(bare_model) is None
    assert not torch.equal(tuned, bare_model.generate(**encoded, max_new_tokens=8, do_sample=False))


def test_the_prefix_stays_fp32_on_a_16_bit_base(complete_base, checkpoint):
    model, _ = load_model(complete_base, checkpoint, dtype="bf16", **CPU)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in prefix_of(model).parameters()} == {torch.float32}


def test_only_the_prefix_can_be_trained(complete_base, checkpoint):
    model = load_base(complete_base, **CPU)
    attach_checkpoint(model, checkpoint, complete_base)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["prefix_encoder.embedding.weight"]


def test_attach_returns_how_it_was_trained(complete_base, checkpoint):
    manifest = attach_checkpoint(load_base(complete_base, **CPU), checkpoint, complete_base)
    assert manifest.max_source_length == 64
    assert manifest.base.name_or_path == str(complete_base)


def test_remote_code_named_in_the_config_is_not_run(base, tmp_path):
    marker = tmp_path / "was-run"
    for name in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
        (base / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    load_model(base, **CPU)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("bf16", "cpu", torch.bfloat16),
        ("float16", "cpu", torch.float16),
        ("torch.float32", "cpu", torch.float32),
        (torch.bfloat16, "cuda", torch.bfloat16),
        ("auto", "mps", torch.float16),
    ],
)
def test_dtypes(dtype, device, expected):
    assert resolve_dtype(dtype, torch.device(device)) == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_dtype_on_cuda(monkeypatch, supported, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation
    )
    assert resolve_dtype("auto", torch.device("cuda")) == expected


def test_a_torch_for_gpus_on_a_machine_without_one(golden_base, monkeypatch):
    """What pip installs on Linux by default: it names CUDA as its accelerator, driver or not."""

    def of_a_cuda_build(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", of_a_cuda_build)
    assert load_base(golden_base).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu(complete_base, checkpoint):
    model, _ = load_model(complete_base, checkpoint)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert model.dtype in (torch.bfloat16, torch.float16)


# --- a base that isn't one ----------------------------------------------------------------------------------------------


def test_wrong_option_values(golden_base):
    with pytest.raises(ConfigError, match="dtype is 'int3'; use auto, float32, bfloat16 or float16"):
        load_base(golden_base, dtype="int3", **CPU)
    with pytest.raises(ConfigError, match=r"dtype is torch.int8"):
        load_base(golden_base, dtype=torch.int8, **CPU)
    with pytest.raises(ConfigError, match="attn_implementation is 'flash'; use one of sdpa, eager"):
        load_base(golden_base, attn_implementation="flash", **CPU)


def test_missing_folder_and_unreachable_hub_id(tmp_path):
    with pytest.raises(ModelError, match=r"no such folder \(looked for .*/nowhere\)"):
        load_base(tmp_path / "nowhere", **CPU)
    with pytest.raises(ModelError, match=r"no folder .*models/chatglm2-6b-absent, and as a hub id .* needs network"):
        load_model("models/chatglm2-6b-absent", **CPU)


def test_folder_without_config(tmp_path, checkpoint):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"config\.json is missing \(found: notes\.txt\)"):
        load_base(tmp_path, **CPU)
    with pytest.raises(ModelError, match=r"holds a tuned prefix: give it as ptuning_checkpoint"):
        load_base(checkpoint, **CPU)


def test_official_prefix_given_as_base(golden_dir):
    with pytest.raises(ModelError, match=r"holds only a tuned prefix, not a base model; give it as ptuning_checkpoint"):
        load_base(golden_dir / "prefix-embedding", **CPU)


def test_quantised_weights_under_an_ordinary_config(golden_dir, tmp_path):
    shutil.copy(golden_dir / "chatglm2-tiny-int8" / "pytorch_model.bin", tmp_path)
    shutil.copy(golden_dir / "chatglm2-tiny" / "config.json", tmp_path)
    with pytest.raises(
        ModelError, match=r"has quantised weights \(….weight_scale\), and config.json doesn't say of how many"
    ):
        load_base(tmp_path, **CPU)


def test_ordinary_weights_under_a_quantised_config(base):
    edit_config(base, quantization_bit=8)
    with pytest.raises(ModelError, match=r"config.json says quantised to 8 bit, and the weights are not"):
        load_base(base, **CPU)


def test_a_precision_that_there_is_not(base):
    with pytest.raises(ConfigError, match="quantization_bit is 3; use 8 or 4, or leave it out"):
        load_model(base, quantization_bit=3, **CPU)
    edit_config(base, quantization_bit=3)
    with pytest.raises(ModelError, match=r"config.json: quantization_bit is 3; use 8 or 4"):
        load_base(base, **CPU)


@pytest.mark.parametrize(("bits", "asked"), [(4, 8), (8, 4)])
def test_quantised_files_of_another_precision(golden_dir, bits, asked):
    folder = golden_dir / f"chatglm2-tiny-int{bits}"
    with pytest.raises(
        ModelError, match=f"is quantised to int{bits}, and --quantization_bit {asked} asks for int{asked}; leave it out"
    ):
        load_base(folder, precision=precision_of(asked), **CPU)
    load_base(folder, precision=precision_of(bits), **CPU)


@pytest.mark.parametrize("model_type", ["llama", "glm4", None])
def test_other_model_types(base, model_type):
    edit_config(base, model_type=model_type)
    expected = (
        f"model_type is {model_type!r}, expected 'chatglm' or 'baichuan' or 'glm' or 'glm130b'. "
        "Supported: chatglm2-6b.*; Baichuan-7B"
    )
    with pytest.raises(ModelError, match=expected):
        load_model(base, **CPU)


def test_config_that_is_not_json(base):
    (base / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON"):
        load_base(base, **CPU)


def test_config_with_a_value_of_another_type(base):
    edit_config(base, attention_dropout="much")
    with pytest.raises(ModelError, match=r"can't be loaded: .*attention_dropout") as error:
        load_base(base, **CPU)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(base)) + 600


def test_another_architecture_of_the_same_type(base):
    edit_config(base, rmsnorm=False)
    with pytest.raises(ModelError, match="LayerNorm instead of RMSNorm"):
        load_base(base, **CPU)


def test_missing_tokenizer(base, golden_base):
    (base / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"tokenizer\.model: this is a git-lfs pointer"):
        load_tokenizer(base)
    (base / "tokenizer.model").write_bytes(b"\x00\x01 not a model")
    with pytest.raises(ModelError, match=r"tokenizer\.model can't be read"):
        load_tokenizer(base)
    with pytest.raises(ModelError, match=r"chatglm2-tiny: tokenizer\.model is missing"):
        load_model(golden_base, **CPU)


def test_tokenizer_of_another_model(base, golden_base):
    for file in golden_base.iterdir():
        shutil.copy(file, base)
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.model has 505 tokens and the model 320"):
        load_model(base, **CPU)


def test_missing_shard_is_named(golden_base, tmp_path):
    folder = Path(shutil.copytree(golden_base, tmp_path / "base"))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        load_base(folder, **CPU)
    (folder / "pytorch_model-00002-of-00002.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00002\.bin: this is a git-lfs pointer"):
        load_base(folder, **CPU)


def test_damaged_shard(golden_base, tmp_path):
    folder = Path(shutil.copytree(golden_base, tmp_path / "base"))
    shard = folder / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be loaded"):
        load_base(folder, **CPU)


def test_no_weights(base):
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights; looked for model\.safetensors, .*pytorch_model\.bin"):
        load_base(base, **CPU)


def test_missing_weights(base):
    edit_weights(base, lambda state: [state.pop(name) for name in list(state) if "layers.1." in name])
    with pytest.raises(
        ModelError,
        match=r"11 missing weights: model\.layers\.1\.\S+, \S+, \S+, \S+, \S+, …\. The folder is incomplete",
    ):
        load_base(base, **CPU)


def test_unexpected_weights(base):
    edit_weights(base, lambda state: state.update({"transformer.encoder.layers.0.adapter.weight": torch.ones(2)}))
    with pytest.raises(ModelError, match=r"1 unexpected weights: \S*layers\.0\.adapter\.weight"):
        load_base(base, **CPU)


def test_leftover_prefix_in_a_full_checkpoint_is_ignored(base):
    edit_weights(base, lambda state: state.update({"transformer.prefix_encoder.embedding.weight": torch.ones(2, 192)}))
    assert prefix_of(load_base(base, **CPU)) is None


def test_weights_of_another_shape(base):
    edit_config(base, ffn_hidden_size=128)
    with pytest.raises(
        ModelError,
        match=r"6 mismatched weights: model\.layers\.0\.mlp\.down_proj\.weight \(64, 96\) in the file and \(64, 128\) by",
    ):
        load_base(base, **CPU)


# --- a checkpoint that doesn't belong -----------------------------------------------------------------------------------


def test_other_weights_under_the_same_shape(base, complete_base, checkpoint):
    edit_weights(base, lambda state: state[NAMES[1]].mul_(-1))
    with pytest.raises(CheckpointError) as refused:
        load_model(base, checkpoint, **CPU)
    trained_on = read_prefix(checkpoint).manifest.base
    assert f"was trained on {complete_base} (fingerprint {trained_on.fingerprint})" in str(refused.value)
    assert f"the base given is {base} (fingerprint " in str(refused.value)
    assert str(refused.value).count(trained_on.fingerprint) == 1


def test_a_copy_of_the_base_elsewhere_is_accepted(base, checkpoint):
    load_model(base, checkpoint, **CPU)


def test_base_of_another_shape(complete_base, checkpoint, tmp_path):
    prefix = Path(shutil.copytree(checkpoint, tmp_path / "prefix"))
    values = json.loads((prefix / "ptuning_config.json").read_text(encoding="utf-8"))
    edit_config(
        prefix, "ptuning_config.json", base=values["base"] | {"layers": 28, "name_or_path": "THUDM/chatglm2-6b"}
    )
    with pytest.raises(
        CheckpointError, match=r"num_layers 28 in the checkpoint, 3 in the base.*trained on, THUDM/chatglm2-6b"
    ):
        load_model(complete_base, prefix, **CPU)


def test_another_template(base, complete_base, checkpoint, tmp_path):
    said = "prompt template 'chatglm3', and this package builds prompts with 'chatglm2'"
    prefix = Path(shutil.copytree(checkpoint, tmp_path / "prefix"))
    edit_config(prefix, "ptuning_config.json", template="chatglm3")
    with pytest.raises(CheckpointError, match=said):
        load_model(complete_base, prefix, **CPU)
    describe(base, "full", {}).write(base)
    load_base(base, **CPU)
    edit_config(base, "ptuning_config.json", template="chatglm3")
    with pytest.raises(CheckpointError, match=said):
        load_base(base, **CPU)


def test_a_fully_tuned_model_given_as_checkpoint(base, complete_base):
    describe(complete_base, "full", {}).write(base)
    with pytest.raises(
        CheckpointError, match="holds a complete model; give it as model_name_or_path, without ptuning_ch"
    ):
        load_model(complete_base, base, **CPU)


@pytest.mark.parametrize(
    ("expected", "message"),
    [((9, False), "pre_seq_len is 8 .* 9 was"), ((8, True), "prefix_projection is False .* True was")],
)
def test_contradicting_flags(complete_base, checkpoint, expected, message):
    options = ModelArguments(str(complete_base), str(checkpoint), method="prefix", pre_seq_len=8)
    assert method_of(options, trains=False).settings() == {"pre_seq_len": 8, "prefix_projection": False}
    options.pre_seq_len, options.prefix_projection = expected
    for trains in (False, True):
        with pytest.raises(CheckpointError, match=message):
            method_of(options, trains)


def test_a_refused_checkpoint_leaves_the_model_bare(base, complete_base, checkpoint):
    edit_weights(base, lambda state: state[NAMES[1]].mul_(-1))
    model = load_base(base, **CPU)
    with pytest.raises(CheckpointError):
        attach_checkpoint(model, checkpoint, base)
    assert prefix_of(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- the self-test ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_self_test_measures_and_restores(load_tiny, golden, attention):
    model = load_tiny("embedding", attention).train()
    assert self_test(model) > 0.1
    assert model.training
    assert prefix_of(model).training
    with torch.no_grad():
        logits = model.eval()(input_ids=golden["full.input_ids"]).logits
    torch.testing.assert_close(logits, golden["prefix_embedding.full.logits"], atol=1e-5, rtol=0)


def test_self_test_notices_a_prefix_that_is_not_used(load_tiny, monkeypatch):
    model = load_tiny("embedding")
    monkeypatch.setattr(prefix_of(model), "forward", lambda batch, dtype: None)
    with pytest.raises(CheckpointError, match="the prefix has no effect: the logits with and without it are equal"):
        self_test(model)
    assert prefix_of(model) is not None


def test_self_test_without_prefix(load_tiny):
    with pytest.raises(CheckpointError, match="the checkpoint has no effect: nothing is attached to this model"):
        self_test(load_tiny())


def test_self_test_tells_a_broken_prefix_from_a_broken_base(load_tiny):
    model = load_tiny("embedding")
    with torch.no_grad():
        prefix_of(model).embedding.weight[0] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"with the prefix the logits are NaN or infinite in torch.float32, without it"
    ):
        self_test(model)
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    with pytest.raises(ModelError, match=r"the base model gives NaN or infinite logits in torch.float32"):
        self_test(model)


def test_load_model_runs_the_self_test(complete_base, checkpoint, monkeypatch):
    monkeypatch.setattr("ptuning.methods.prefix.encoder.PrefixEncoder.forward", lambda self, batch, dtype: None)
    with pytest.raises(CheckpointError, match="the prefix has no effect"):
        load_model(complete_base, checkpoint, **CPU)
