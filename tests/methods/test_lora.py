"""A LoRA on the golden model: peft's own adapter, the base untouched, and adapters of other programs."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptuning.checkpoint.manifest import describe
from ptuning.checkpoint.model_folder import file_tensors
from ptuning.config.options import ModelArguments
from ptuning.errors import CheckpointError, ConfigError
from ptuning.export import export
from ptuning.loading import load_base
from ptuning.methods import LoraMethod, SaveTarget, attach_checkpoint, attached, bare, detach, method_of, self_test
from ptuning.methods.lora.attach import lora_layers, lora_parameters
from ptuning.methods.lora.targets import linears_of

IDS = torch.arange(3, 23).view(2, 10)
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
SCALE = 3  # of random factors, so that each LoRA changes the logits well


@pytest.fixture(scope="module")
def base(golden_dir):
    return golden_dir / "chatglm2-tiny"


def options_of(base, **given) -> ModelArguments:
    return ModelArguments(str(base), method="lora", **given)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def randomise(model, seed: int) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.1 * noise if "magnitude" in name else SCALE * noise / parameter.shape[-1])


def started(load_tiny, base, seed=0, **given):
    """A model with a LoRA, as if trained, and the method."""
    model, method = load_tiny(), method_of(options_of(base, **given), trains=True)
    method.start(model)
    randomise(model, seed)
    return model, method


def tensors_in(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save(model, method, base, folder):
    target = SaveTarget(folder, True, torch.device("cpu"))
    method.save(model, None, describe(base, method.name, method.settings()), target)
    return folder


@pytest.fixture
def folder(load_tiny, base, tmp_path):
    return save(*started(load_tiny, base), base, tmp_path / "lora")


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_pefts_own(load_tiny, base, tmp_path, kind):
    model, method = started(load_tiny, base, **KINDS[kind])
    folder = save(model, method, base, tmp_path / "lora")
    expected = logits(model)
    assert (expected - logits(load_tiny())).abs().max() > 0.1
    ours = load_tiny()
    manifest = attach_checkpoint(ours, folder, base)
    assert manifest.settings["lora_rank"] == 8 and manifest.settings["lora_target"] == ["all"]
    assert torch.equal(logits(ours), expected)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert torch.equal(logits(theirs.eval()), expected)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (
        trained
        == method.memory(None).trained
        == sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_plain_peft_loads_without_a_manifest(load_tiny, base, tmp_path, kind):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, **KINDS[kind])
    config.alpha_pattern = {"q_proj": 24}
    theirs = get_peft_model(load_tiny(), config).eval()
    randomise(theirs, 1)
    theirs.save_pretrained(tmp_path / "peft")
    model = load_tiny()
    assert attach_checkpoint(model, tmp_path / "peft", base) is None
    assert attached(model) is LoraMethod and torch.equal(logits(model), logits(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_without_it_the_model_is_the_base(load_tiny, base, kind):
    model, _ = started(load_tiny, base, **KINDS[kind])
    plain, tuned = logits(load_tiny()), logits(model)
    names = {name for name, _ in load_tiny().named_parameters()}
    with bare(model):
        assert attached(model) is None and torch.equal(logits(model), plain)
        assert {name for name, _ in model.named_parameters()} == names
    assert torch.equal(logits(model), tuned) and self_test(model) > 0
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in lora_parameters(model).values()}
    detach(model)
    assert attached(model) is None and torch.equal(logits(model), plain)
    method_of(options_of(base), trains=True).start(model)  # and takes another one
    assert torch.equal(logits(model), plain)  # which starts as nothing


def test_dropout_only_while_training(load_tiny, base):
    model, _ = started(load_tiny, base, lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with bare(model):
        model.eval()
    assert torch.equal(logits(model), logits(model))
    assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(model).values())


def test_on_a_16_bit_base_the_factors_stay_fp32(load_tiny, base):
    model = load_tiny(dtype=torch.bfloat16)
    method_of(options_of(base), trains=True).start(model)
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        (["attention"], ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (["all"], ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["query_key_value", "dense_4h_to_h"], ["down_proj", "k_proj", "q_proj", "v_proj"]),
    ],
)
def test_targets(load_tiny, base, target, layers):
    model, _ = started(load_tiny, base, lora_target=target)
    assert sorted({name.rpartition(".")[2] for name in lora_layers(model)}) == layers
    assert sorted(model.peft_config["default"].target_modules) == layers


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"lora_target": ["lm_head"]},
            "--lora_target lm_head: this base has no such layer; use all, attention, or some of q_proj",
        ),
        ({"lora_rank": 1000}, "--lora_rank is 1000; use at most "),
    ],
)
def test_options_that_a_base_cannot_have(base, given, text):
    with pytest.raises(ConfigError, match=text):
        method_of(options_of(base, **given), trains=True)


# --- going on from one ----------------------------------------------------------------------------------------------------


def test_a_new_run_from_a_checkpoint(load_tiny, base, folder):
    method = method_of(options_of(base, ptuning_checkpoint=str(folder), lora_dropout=0.3), trains=True)
    assert method.describe() == "LoRA of rank 8 on down_proj gate_up_proj k_proj o_proj q_proj v_proj"
    model = load_tiny()
    attach_checkpoint(model, folder, base)
    expected = logits(model)
    method.start(model)
    assert torch.equal(logits(model), expected)
    layers = lora_layers(model).values()
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.3}
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(layers)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lora_rank": 4}, "lora_rank is 8 in the checkpoint and 4 was asked for; leave lora_rank out"),
        ({"use_dora": True}, "use_dora is False in the checkpoint and True was asked for"),
        ({"lora_target": ["attention"]}, "and attention was asked for; leave lora_target out"),
        ({"lora_init": "gaussian"}, "--lora_init is for a new LoRA"),
        ({"pre_seq_len": 8}, "--pre_seq_len is for --method prefix, and --method is lora"),
    ],
)
def test_a_checkpoints_own_settings_stay(base, folder, given, text):
    with pytest.raises((CheckpointError, ConfigError), match=text):
        method_of(options_of(base, ptuning_checkpoint=str(folder), **given), trains=True)


def test_an_evaluation_takes_no_options_of_another_method(base, folder):
    with pytest.raises(ConfigError, match="--pre_seq_len is for --method prefix, and the checkpoint is of lora"):
        method_of(options_of(base, ptuning_checkpoint=str(folder), pre_seq_len=8), trains=False)


# --- adapters of 2023, made on the official code ---------------------------------------------------------------------------


@pytest.fixture
def official(base, load_tiny, tmp_path):
    """`official(suffix)`: factors for the layers as official files have them, and the weights merged as official code does."""

    def make(suffix: str):
        generator, named = (
            torch.Generator().manual_seed(5),
            dict(file_tensors(dict(load_tiny().named_parameters()), load_tiny().config)),
        )
        rank, alpha, factors, merged = 4, 32, {}, {}
        for name, weight in named.items():
            layer = name.removesuffix(".weight")
            if not layer.endswith(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")) or not name.endswith(
                ".weight"
            ):
                continue
            first = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1]
            second = torch.randn(weight.shape[0], rank, generator=generator)
            factors[f"base_model.model.{layer}.lora_A.weight"] = first
            factors[f"base_model.model.{layer}.lora_B.weight"] = second
            merged[name] = weight + (second @ first) * (alpha / rank)
        folder = tmp_path / suffix
        folder.mkdir()
        torch.save(factors, folder / "adapter_model.bin")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.1}
        config |= {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True}
        config |= {"base_model_name_or_path": "THUDM/chatglm2-6b", "enable_lora": None, "merge_weights": False}
        config["target_modules"] = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder, merged

    return make


def test_official_adapters_merge_bit_for_bit(official, load_tiny, base):
    folder, merged = official("all")
    assert len(merged) == 4 * load_tiny().config.num_hidden_layers
    model = load_tiny()
    assert attach_checkpoint(model, folder, base) is None
    tuned = logits(model)
    LoraMethod.merge(model)
    assert attached(model) is None
    found = dict(file_tensors(dict(model.named_parameters()), model.config))
    assert all(torch.equal(found[name], weight) for name, weight in merged.items())
    torch.testing.assert_close(logits(model), tuned, atol=2e-4, rtol=1e-4)


def test_only_query_key_value(official, load_tiny, base):
    folder, _ = official("some")
    factors = torch.load(folder / "adapter_model.bin")
    torch.save(
        {name: factor for name, factor in factors.items() if "query_key_value" in name}, folder / "adapter_model.bin"
    )
    model = load_tiny()
    attach_checkpoint(model, folder, base)
    assert model.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj"}
    detach(model)
    method = method_of(options_of(base, ptuning_checkpoint=str(folder)), trains=True)
    assert method.describe() == "LoRA of rank 4 on k_proj q_proj v_proj"


def back(folder, output, base) -> dict:
    """Exports to the official names; returns adapter_config.json."""
    export(["--ptuning_checkpoint", str(folder), "--format", "official-lora", "--output_dir", str(output), *base])
    return json.loads((output / "adapter_config.json").read_text())


def test_an_official_adapter_goes_back_as_it_was(official, base, tmp_path):
    folder, _ = official("all")
    config = back(folder, tmp_path / "back", ["--model_name_or_path", str(base)])
    assert (config["r"], config["lora_alpha"]) == (4, 32) and "rank_pattern" not in config
    assert set(config["target_modules"]) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    before, after = (torch.load(each / "adapter_model.bin") for each in (folder, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "given",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_target": ["q_proj", "v_proj", "down_proj"]}],
    ids=["lora", "rslora", "dora", "some"],
)
def test_a_lora_of_ours_on_the_official_code(load_tiny, base, tmp_path, given):
    model, method = started(load_tiny, base, **given)
    folder = tmp_path / "ours"
    about = describe(base, "lora", method.settings())
    method.save(model, None, about, SaveTarget(folder, writes=True, device=torch.device("cpu")))
    config = back(folder, tmp_path / "back", [])
    assert config["r"] == 8 * (2 if "lora_target" in given else 3)
    assert set(config["target_modules"]) <= {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    tuned = logits(model)
    again = load_tiny()
    attach_checkpoint(again, tmp_path / "back", base)
    torch.testing.assert_close(logits(again), tuned, atol=2e-4, rtol=1e-4)
    if given.get("use_dora"):
        return
    # On the official code a layer's weight becomes W + B A · alpha / r, with the names of its files.
    LoraMethod.merge(model)
    merged = dict(file_tensors(dict(model.named_parameters()), model.config))
    plain = dict(file_tensors(dict(load_tiny().named_parameters()), model.config))
    factors = torch.load(tmp_path / "back" / "adapter_model.bin")
    for name in [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]:
        layer, scale = f"{name.removeprefix('base_model.model.')}.weight", config["lora_alpha"] / config["r"]
        weight = plain[layer] + factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"] * scale
        torch.testing.assert_close(weight, merged[layer], atol=1e-5, rtol=1e-5)


def test_half_a_dora_has_no_official_form(load_tiny, base, tmp_path, capsys):
    model, method = started(load_tiny, base, use_dora=True, lora_target=["q_proj"])
    about = describe(base, "lora", method.settings())
    method.save(model, None, about, SaveTarget(tmp_path / "ours", writes=True, device=torch.device("cpu")))
    with pytest.raises(CheckpointError, match=r"query_key_value is one layer in official files, .*q_proj.*merge it"):
        back(tmp_path / "ours", tmp_path / "back", [])
    assert not (tmp_path / "back").exists()


# --- folders that can't be used -------------------------------------------------------------------------------------------


def changed_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_refused_folders(official, load_tiny, base, tmp_path, folder):
    good, _ = official("good")
    factors = torch.load(good / "adapter_model.bin")
    name = next(iter(factors))

    def refused(change, text, **values):
        other = shutil.copytree(good, tmp_path / "bad")
        if values:
            changed_config(other, **values)
        torch.save(change, other / "adapter_model.bin")
        with pytest.raises(CheckpointError, match=text) as error:
            attach_checkpoint(load_tiny(), other, base)
        assert "\n" not in str(error.value)
        shutil.rmtree(other)

    refused(factors, "init_lora_weights is 'pissa', which isn't supported", init_lora_weights="pissa")
    refused(factors, "bias is 'all', which isn't supported", bias="all")
    refused(factors, r"modules_to_save is \['lm_head'\], which isn't supported", modules_to_save=["lm_head"])
    refused(factors, "rank_pattern with the layer names of the official code", rank_pattern={"dense": 2})
    refused(factors, "has no usable r, lora_alpha", r=None)
    refused(factors | {name: torch.full_like(factors[name], torch.nan)}, "numbers that are NaN or infinite")
    refused(factors | {"base_model.model.x.lora_embedding_A": torch.ones(2)}, "expected factors named ….lora_A.weight")
    refused({}, "found no tensor")
    refused(
        factors | {name: factors[name][:, :-1]},
        "belongs to another base model: .* numbers where this one needs",
    )
    refused({key: value for key, value in factors.items() if key != name}, "the factors of .* are incomplete")
    refused(
        {key.replace("layers.0", "layers.7"): value for key, value in factors.items()},
        "belongs to another base model, which has a layer",
    )
    refused(factors | {"code": print}, "it holds other objects than tensors")

    changed_config(folder, peft_type="IA3")
    with pytest.raises(CheckpointError, match="peft_type is 'IA3', expected 'LORA'"):
        attach_checkpoint(load_tiny(), folder, base)


def test_a_changed_file_and_another_base_are_refused(load_tiny, base, folder, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    for file in other.glob("*.bin"):
        state = torch.load(file)
        torch.save({name: -tensor for name, tensor in state.items()}, file)
    with pytest.raises(CheckpointError, match=r"and the base given is .* with other weights"):
        attach_checkpoint(load_tiny(), folder, other)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged, its sha256 is"):
        attach_checkpoint(load_tiny(), folder, base)


def test_layers_are_known_without_weights(base, load_tiny):
    from ptuning.families import read_config

    layers = linears_of(read_config(base))
    assert (
        all(layer.weight.is_meta for layer in layers.values())
        and len(layers) == 6 * load_tiny().config.num_hidden_layers
    )


# --- merging --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_tokenizer(base, tiny_tokenizer, tmp_path):
    """The golden base as a whole folder."""
    folder = shutil.copytree(base, tmp_path / "base")
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_a_whole_official_model(load_tiny, with_tokenizer, tmp_path, kind):
    model, method = started(load_tiny, with_tokenizer, **KINDS[kind])
    folder = save(model, method, with_tokenizer, tmp_path / "lora")
    export(
        ["--ptuning_checkpoint", str(folder), "--merge", "--dtype", "float32", "--output_dir", str(tmp_path / "out")]
    )
    files, before = tensors_in(tmp_path / "out"), dict(load_tiny().named_parameters())
    assert set(files) == {*dict(file_tensors(before, model.config)), "transformer.rotary_pos_emb.inv_freq"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["original_rope"] is True and config["torch_dtype"] == "float32"
    merged = load_base(tmp_path / "out", device="cpu")
    assert attached(merged) is None
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match="holds a complete model; give it as model_name_or_path"):
        attach_checkpoint(load_tiny(), tmp_path / "out", with_tokenizer)


def test_the_base_keeps_its_own_dtype(load_tiny, with_tokenizer, tmp_path):
    model, method = started(load_tiny, with_tokenizer)
    folder = save(model, method, with_tokenizer, tmp_path / "lora")
    base = AutoModelForCausalLM.from_pretrained(with_tokenizer, dtype=torch.float16)
    base.save_pretrained(tmp_path / "half")
    for file in with_tokenizer.glob("token*"):
        shutil.copy(file, tmp_path / "half")
    where = ["--ptuning_checkpoint", str(folder), "--model_name_or_path", str(tmp_path / "half")]
    export([*where, "--merge", "--output_dir", str(tmp_path / "out")])
    files = tensors_in(tmp_path / "out")
    weight = files["transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"]
    layer = lora_layers(model)["model.layers.0.mlp.down_proj"]
    expected = layer.get_base_layer().weight.half().float() + layer.get_delta_weight("default")
    assert weight.dtype == torch.float16 and torch.equal(weight, expected.half())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--merge", "--format", "peft"], "--merge is for a LoRA .* leave --format out"),
        (["--format", "peft"], "which is not a LoRA|so it is not a prefix"),
        ([], "a LoRA needs --merge"),
    ],
)
def test_what_export_refuses(folder, tmp_path, flags, text):
    with pytest.raises((ConfigError, CheckpointError), match=text):
        export(["--ptuning_checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_prefix_cannot_be_merged(golden_dir, tmp_path):
    with pytest.raises(
        ConfigError, match="--merge: a prefix can't be put into the base's weights; give --format instead"
    ):
        export(
            [
                "--ptuning_checkpoint",
                str(golden_dir / "prefix-embedding"),
                "--merge",
                "--output_dir",
                str(tmp_path / "x"),
            ]
        )


def test_a_quantised_layer_is_not_merged_into(load_tiny, base):
    model, _ = started(load_tiny, base)
    layer = lora_layers(model)["model.layers.0.mlp.down_proj"].get_base_layer()
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ConfigError, match=r"layers\.0\..*down_proj is quantised, and rounded weights can't take a LoRA"
    ):
        LoraMethod.merge(model)
