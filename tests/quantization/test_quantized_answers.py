"""Serving, chat and predict answer on a quantised base, each the same as `generate` on it."""

import json

import pytest
import torch

from ptuning.checkpoint.manifest import describe
from ptuning.cli import main
from ptuning.errors import ModelError
from ptuning.families import Dialogue
from ptuning.generation import Engine, GenerationRequest
from ptuning.loading import load_base, load_model
from ptuning.methods.prefix.attach import attach_prefix
from ptuning.methods.prefix.checkpoint import save_prefix
from ptuning.quantization import precision_in, precisions
from ptuning.serving import chat
from ptuning.serving.models import LoadedModel
from ptuning.serving.options import ServeOptions
from ptuning.serving.server import build
from tests.conftest import REPO

BASE = REPO / "models" / "chatglm2-tiny"
TOKENS = 12


@pytest.fixture(params=[precision.bits for precision in precisions()])
def bits(request) -> int:
    return request.param


@pytest.fixture
def prefix(bits, tmp_path):
    """A prefix with an effect, of a base of this precision."""
    torch.manual_seed(0)
    encoder = attach_prefix(load_base(BASE, device="cpu"), 8)
    with torch.no_grad():
        encoder.embedding.weight.mul_(4)
    settings = {"pre_seq_len": 8, "prefix_projection": False}
    return save_prefix(tmp_path / "prefix", encoder, describe(BASE, "prefix", settings, quantization_bit=bits))


def generated(question, prefix, bits) -> str:
    """What `generate` answers, one row alone."""
    model, tokenizer = load_model(BASE, prefix, device="cpu", quantization_bit=bits)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], return_tensors="pt")
    answer = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(answer[0, ids.shape[1] :].tolist())


def test_the_engine_mixes_prefix_and_base(prefix, bits):
    loaded = LoadedModel.load(BASE, "float32", bits, "exact")
    served = loaded.read_prefix("tuned", prefix)
    template = loaded.template
    ids = template.encode([template.render(Dialogue("你好"))])[0].ids
    requests = [GenerationRequest(0, ids, TOKENS), GenerationRequest(1, ids, TOKENS, prefix=served.prefix)]
    answers: list[list[int]] = [[], []]
    with Engine(loaded.model, template.stop_ids) as engine:
        for token in engine.submit(requests):
            answers[token.id] += [] if token.token is None else [token.token]
    assert list(map(template.decode, answers)) == [generated("你好", None, bits), generated("你好", prefix, bits)]
    assert answers[0] != answers[1]


def test_serve(prefix, bits, caplog):
    worker, _ = build(ServeOptions(model=str(BASE), prefix=(("tuned", str(prefix)),), quantization_bit=bits))
    worker.close()
    assert "was trained on a base in" not in caplog.text
    worker, _ = build(ServeOptions(model=str(BASE), prefix=(("tuned", str(prefix)),)))
    worker.close()
    assert caplog.text.count(f"was trained on a base in int{bits}, and this one is in 16 bit") == 1


def test_chat(prefix, bits, monkeypatch, capsys):
    questions = iter(["你好", "/exit"])
    monkeypatch.setattr(chat, "_input", lambda: next(questions))
    options = ["--ptuning_checkpoint", str(prefix), "--quantization_bit", str(bits), "--max_new_tokens", str(TOKENS)]
    options += ["--cpu_kernels", "exact"]
    assert main(["chat", "--dtype", "float32", *options]) == 0
    assert generated("你好", prefix, bits) in capsys.readouterr().out


def test_predict(prefix, bits, tmp_path, capsys):
    file, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"question": "你好"}) + "\n")
    options = ["--file", str(file), "--output", str(output), "--ptuning_checkpoint", str(prefix), "--dtype", "float32"]
    assert main(["predict", *options, "--max_new_tokens", str(TOKENS), "--quantization_bit", str(bits)]) == 0
    assert json.loads(output.read_text())["predict"] == generated("你好", prefix, bits)
    assert "was trained on a base in" not in capsys.readouterr().out


def test_a_quantized_folder_needs_no_option(golden_dir, bits):
    model = load_base(golden_dir / f"chatglm2-tiny-int{bits}", device="cpu")
    assert precision_in(model.config).bits == bits and model.is_quantized


def test_no_checkpoint_is_merged_into_a_quantized_base(golden_dir, tmp_path, bits, capsys):
    (tmp_path / "checkpoint-1" / "global_step1").mkdir(parents=True)
    (tmp_path / "checkpoint-1" / "latest").write_text("global_step1")
    (tmp_path / "checkpoint-1" / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    base = golden_dir / f"chatglm2-tiny-int{bits}"
    options = [
        "--checkpoint",
        tmp_path / "checkpoint-1",
        "--model_name_or_path",
        base,
        "--output_dir",
        tmp_path / "out",
    ]
    assert main(["export", *map(str, options)]) == 2
    assert f"can't be merged into quantised ones, and this base is quantised to {bits} bit" in capsys.readouterr().err


def test_zero_3_is_refused(golden_dir, bits, monkeypatch):
    monkeypatch.setattr("ptuning.loading.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(
        ModelError, match=f"ZeRO stage 3 can't divide quantised weights, and this base is quantised to {bits} bit"
    ):
        load_base(golden_dir / f"chatglm2-tiny-int{bits}", device="cpu")
