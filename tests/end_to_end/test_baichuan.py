"""Every command on the small Baichuan in the repo, as for ChatGLM2."""

import json
import subprocess
import sys

import pytest
import torch
from fastapi.testclient import TestClient
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptuning import load_model
from ptuning.checkpoint.base import base_fingerprint, read_base_config
from ptuning.checkpoint.manifest import describe, read_manifest
from ptuning.checkpoint.partitioned import require_tensors
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.cli import main
from ptuning.config import parse
from ptuning.errors import CheckpointError, ModelError
from ptuning.families import family_of
from ptuning.families.baichuan.config import BaichuanConfig
from ptuning.families.baichuan.model import BaichuanForCausalLM
from ptuning.loading import load_base
from ptuning.methods import attached
from ptuning.methods.prefix.attach import attach_prefix
from ptuning.methods.prefix.checkpoint import save_prefix
from ptuning.quantization import choose_kernels, precision_of
from ptuning.report import write_report
from ptuning.serving.app import create_app
from ptuning.serving.options import ServeOptions
from ptuning.serving.options import parse as parse_serving
from ptuning.serving.server import build
from tests.end_to_end.conftest import ROOT, full_flags, losses

BASE = ROOT / "models" / "baichuan-tiny"
DEV = ROOT / "data" / "advertise" / "dev.json"
IDS = torch.tensor([[195, 640, 679, 196, 700, 701]])
METHODS = {
    "prefix": {"pre_seq_len": 8, "learning_rate": 5e-2},
    "lora": {"learning_rate": 1e-2},
    "lora+prefix": {"pre_seq_len": 4, "learning_rate": 1e-2},
    "full": {"learning_rate": 1e-3},
}


def run(*flags) -> int:
    return main([str(flag) for flag in flags])


def train(folder, method, **more):
    options = {
        "model_name_or_path": BASE,
        "method": method,
        "max_steps": 16,
        "save_steps": 16,
        "per_device_train_batch_size": 4,
    }
    assert run("train", *full_flags(folder, **options | METHODS[method] | more)) == 0
    return folder


@pytest.fixture(scope="module", params=METHODS)
def tuned(request, tmp_path_factory):
    """A run of each method with scores, and its folder."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    scores = {
        "do_predict": True,
        "baseline": True,
        "validation_file": DEV,
        "max_eval_samples": 4,
        "max_predict_samples": 3,
    }
    return request.param, train(folder, request.param, **scores, max_target_length=24)


@pytest.mark.works("baichuan", "prefix", "LoRA")
def test_train_evaluate_and_load(tuned):
    name, folder = tuned
    manifest = read_manifest(folder)
    assert (manifest.method, manifest.base.family, manifest.template) == (name, "baichuan", "baichuan")
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["tuned"]["answer_loss"] < scores["base"]["answer_loss"] and scores["tuned"]["rows"] == 3
    assert write_report(folder).is_file()
    if name != "full":
        model, _ = load_model(BASE, folder, device="cpu")
        assert attached(model).name == name
        return
    model, _ = load_model(folder, device="cpu")
    before, after = load_file(BASE / "model.safetensors"), TensorFiles.find(folder, ModelError)
    assert set(after.files) == set(before)
    config = json.loads((folder / "config.json").read_text())
    assert config["norm_head"] is True and config["model_max_length"] == 1024 and "auto_map" not in config
    assert json.loads((folder / "generation_config.json").read_text())["user_token_id"] == 195


@pytest.mark.parametrize("tuned", ["lora+prefix"], indirect=True)
def test_resume_is_exact(tuned, tmp_path):
    name, folder = tuned
    half = train(tmp_path / "run", name, max_target_length=24, save_steps=8)
    (half / "checkpoint-16").rename(tmp_path / "gone")  # as if killed before it
    train(half, name, max_target_length=24, save_steps=8, resume_from_checkpoint="true")
    assert losses(half) == losses(folder)


@pytest.mark.works("baichuan", "int8", "int4", "NF4")
@pytest.mark.parametrize("method", ["prefix", "lora"])
@pytest.mark.parametrize("precision", [{"quantization_bit": 8}, {"quantization_bit": 4}, {"quantization": "nf4"}])
def test_quantised_bases_train(tmp_path, method, precision):
    folder = train(tmp_path / "run", method, **precision, max_steps=2, save_steps=2)
    assert read_manifest(folder).base.precision
    model, _ = load_model(BASE, folder, device="cpu", **precision)
    assert attached(model).name == method and torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_folders(tmp_path, bits):
    assert run("quantize", "--model", BASE, "--bits", bits, "--output_dir", tmp_path / "q") == 0
    assert base_fingerprint(tmp_path / "q") == base_fingerprint(BASE)
    model = load_base(tmp_path / "q", device="cpu")
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(logits, load_base(BASE, device="cpu", precision=precision_of(bits))(IDS).logits)
        model.save_pretrained(tmp_path / "again")
        written, again = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("q", "again"))
        assert written.keys() == again.keys() and all(torch.equal(written[name], again[name]) for name in written)
        exact = load_base(BASE, device="cpu", dtype="float32")(IDS).logits
        choose_kernels(model, "fast", print)  # the output layer's too: of its rows of length 1
        fast = model(IDS).logits
    assert (fast - logits).abs().max() < 0.5 * (exact - exact.mean()).abs().max()
    assert torch.nn.functional.cosine_similarity(fast, logits, dim=-1).min() > 0.98


def test_the_output_layer_that_answers_fast_has_rows_of_length_1():
    model = load_base(BASE, device="cpu", precision=precision_of(8))
    hidden = torch.randn(3, 96)
    with torch.no_grad():
        exact = model.lm_head(hidden)
        choose_kernels(model, "fast", print)
        assert (model.lm_head(hidden) - exact).norm() < 0.02 * exact.norm()


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    """Two random prefixes in folders."""
    parent, model = tmp_path_factory.mktemp("prefixes"), load_base(BASE, device="cpu", dtype="float32")
    for length in (3, 9):
        torch.manual_seed(length)
        encoder = attach_prefix(model, length)
        settings = {"pre_seq_len": length, "prefix_projection": False}
        save_prefix(parent / f"p{length}", encoder, describe(BASE, "prefix", settings))
    return parent


def test_a_prefix_for_peft(prefixes, tmp_path):
    flags = ["--ptuning_checkpoint", prefixes / "p9", "--model_name_or_path", BASE]
    assert run("export", *flags, "--format", "peft", "--output_dir", tmp_path / "peft") == 0
    ours, _ = load_model(BASE, prefixes / "p9", device="cpu", dtype="float32")
    theirs = PeftModel.from_pretrained(load_base(BASE, device="cpu", dtype="float32"), tmp_path / "peft").eval()
    with torch.no_grad():
        assert (ours(IDS).logits - theirs(IDS).logits).abs().max() < 1e-5


def test_a_lora_is_merged_under_official_names(tmp_path):
    folder = train(tmp_path / "run", "lora", max_steps=2, save_steps=2)
    assert (
        run(
            "export",
            "--ptuning_checkpoint",
            folder,
            "--merge",
            "--dtype",
            "float32",
            "--output_dir",
            tmp_path / "whole",
        )
        == 0
    )
    assert (
        run("export", "--ptuning_checkpoint", folder, "--format", "official-lora", "--output_dir", tmp_path / "lora")
        == 0
    )
    assert "W_pack" in json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]
    ours, _ = load_model(BASE, folder, device="cpu", dtype="float32")
    with torch.no_grad():
        expected = ours(IDS).logits
        for given in ([tmp_path / "whole"], [BASE, tmp_path / "lora"]):
            model, _ = load_model(*given, device="cpu", dtype="float32")
            assert (model(IDS).logits - expected).abs().max() < 1e-4


def test_what_other_programs_can_t_have_is_said(prefixes, tmp_path, capsys):
    flags = ["--ptuning_checkpoint", prefixes / "p9", "--model_name_or_path", BASE]
    assert run("export", *flags, "--format", "official", "--output_dir", tmp_path / "a") == 2
    assert "the official code of baichuan reads no prefix; use --format peft" in capsys.readouterr().err
    compressed = ["--format", "compressed-tensors", "--quantization_bit", 8, "--model_name_or_path"]
    assert run("export", *compressed, BASE, "--output_dir", tmp_path / "b") == 2
    assert "a Baichuan with ALiBi can't be written for vLLM" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.works("baichuan", "vLLM", only="7B")
def test_a_rotary_one_is_written_for_vllm_as_llama(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 1024,
    }
    config = BaichuanConfig(**sizes, position_embedding="rope", norm_head=True)
    BaichuanForCausalLM(config).save_pretrained(tmp_path / "base")
    flags = ["--format", "compressed-tensors", "--quantization_bit", 8, "--model_name_or_path", tmp_path / "base"]
    assert run("export", *flags, "--output_dir", tmp_path / "out") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        ours = load_base(tmp_path / "base", device="cpu", precision=precision_of(8))(IDS).logits
        assert (theirs(IDS).logits - ours).abs().max() < 1e-5


def test_a_checkpoint_of_another_family_s_template(prefixes, tmp_path):
    text = (
        (prefixes / "p3" / "ptuning_config.json")
        .read_text()
        .replace('"template": "baichuan"', '"template": "chatglm2"')
    )
    (tmp_path / "ptuning_config.json").write_text(text)
    tensors = next((prefixes / "p3").glob("*.safetensors"))
    (tmp_path / tensors.name).write_bytes(tensors.read_bytes())
    with pytest.raises(
        CheckpointError,
        match=r"trained with the prompt template 'chatglm2', .* builds prompts with 'baichuan' for this",
    ):
        load_model(BASE, tmp_path, device="cpu")


def test_damage_is_named_in_official_names(tmp_path):
    model = load_base(BASE, device="cpu")
    files = TensorFiles.find(BASE, ModelError)
    del files.files["model.layers.0.self_attn.W_pack.weight"]
    with pytest.raises(
        ModelError, match=r"1 missing weights: model.layers.0.self_attn.W_pack.weight.*not a baichuan checkpoint"
    ):
        require_tensors(BASE, files, dict(model.named_parameters()), family_of(model.config))


@pytest.fixture(scope="module")
def client(prefixes):
    options = ServeOptions(
        model=str(BASE), prefix=tuple((f"p{n}", str(prefixes / f"p{n}")) for n in (3, 9)), default_model="base"
    )
    worker, metrics = build(options)
    worker.start()
    with TestClient(create_app(worker, options, metrics), base_url="http://127.0.0.1") as client:
        yield client
    worker.close()


GREEDY = {"temperature": 0, "max_length": 40}


@pytest.mark.parametrize("path", ["/", "/baichuan"])
def test_the_rest_contract(client, path):
    body = client.post(path, json={"prompt": "你好", "history": [["1", "2"]], **GREEDY}).json()
    assert set(body) == {"response", "history", "status", "time"} and body["status"] == 200
    assert body["history"] == [["1", "2"], ["你好", body["response"]]]
    assert client.post(path, json={"prompt": "你好"}).json()["status"] == 200  # sampled as generation_config.json says
    wrong = client.post(path, json={"prompt": 5}).json()
    assert set(wrong) == {"response", "history", "status", "time", "error"} and wrong["status"] == 400


def test_each_prefix_answers(client, prefixes):
    found = {
        name: client.post("/baichuan", json={"prompt": "你好", "model": name, **GREEDY}).json()["response"]
        for name in ("base", "p3", "p9")
    }
    assert len(set(found.values())) == 3
    chat = {"model": "p9", "messages": [{"role": "user", "content": "你好"}], "temperature": 0, "max_tokens": 8}
    said = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    model, tokenizer = load_model(BASE, prefixes / "p9", device="cpu")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], return_tensors="pt")
    answer = model.generate(ids, max_new_tokens=8, do_sample=False, repetition_penalty=1.0, eos_token_id=[2, 195])
    assert said == tokenizer.decode(answer[0, ids.shape[1] :]).strip()


def test_a_client_of_the_other_model_is_told_the_route(client):
    answer = client.post("/chatglm", json={"prompt": "你好"})
    assert answer.status_code == 404
    assert "this server's model answers POST /baichuan" in answer.json()["error"]["message"]


def test_an_empty_completion_is_refused(client):
    answer = client.post("/v1/completions", json={"model": "base", "prompt": ""})
    assert answer.status_code == 400 and "the prompt is empty" in answer.json()["error"]["message"]


def test_the_ports_are_the_family_s():
    for flags, ports in (
        (["--model", str(BASE)], (7010, 7021)),
        (["--model", str(BASE), "--port", "7030"], (7030, 7021)),
        (["--model", str(BASE), "--web_port", "7020"], (7010, 7020)),
        (["--model", "no/such/folder"], (7030, 7020)),
    ):
        options = parse_serving(flags)
        assert (options.port, options.web_port) == ports


def test_chat(monkeypatch, capsys, prefixes):
    lines = iter(["你好", f"/prefix {prefixes / 'p3'}", "你好"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    assert run("chat", "--model_name_or_path", BASE, "--max_new_tokens", 8) == 0
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("答：")]
    assert len(answers) == 2 and answers[0] != answers[1]


def test_both_servers_are_asked_in_turn():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "request_example.py"), "你好"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    for url in ("http://127.0.0.1:7030/chatglm", "http://127.0.0.1:7010/baichuan"):
        assert url in done.stderr or done.returncode == 0  # nobody serves there, or somebody does


@pytest.mark.parametrize("name", ["prefix", "lora", "full"])
def test_shipped_configurations(name, tmp_path):
    path, rows = ROOT / "configs" / f"baichuan13b_{name}.yaml", ROOT / "data" / "advertise" / "train.json"
    given = {"model_name_or_path": BASE, "train_file": rows, "output_dir": tmp_path / "run"}
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    if name == "full":  # needs DeepSpeed's launcher
        config, _ = parse(["--config", str(path), *flags])
        assert config.training.learning_rate == 2e-5
        return
    small = ["--max_steps", "1", "--max_train_samples", "16", "--report_to", "none", "--use_cpu", "true"]
    assert run("train", path, *flags, *small) == 0
    assert read_manifest(tmp_path / "run").method == name


@pytest.mark.works("baichuan", "full")
@pytest.mark.slow
def test_all_weights_under_zero3(tmp_path, run_main, two_processes):
    """Loaded and saved tensor by tensor, on two processes: the losses and weights of one without DeepSpeed."""
    options = {"model_name_or_path": BASE, "learning_rate": 1e-3, "max_steps": 2}
    flags = full_flags(tmp_path / "zero", deepspeed=ROOT / "configs" / "zero3.json", **options)
    done = run_main(*flags, launcher=two_processes)
    assert "effective batch 4 = 2 rows × 1 accumulation steps × 2 processes" in done.stdout
    assert run("train", *full_flags(tmp_path / "plain", **options, per_device_train_batch_size=4)) == 0
    parts = (tmp_path / "zero" / "checkpoint-2").glob("global_step*/*zero_pp_rank*optim_states.pt")
    assert len(list(parts)) == 2  # as stage 3 saves it
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    zero, plain = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("zero", "plain"))
    assert zero.keys() == plain.keys() and max((zero[name] - plain[name]).abs().max() for name in zero) < 1e-3
    assert read_base_config(tmp_path / "zero")["norm_head"] is True
