"""Serving, chat and predict answer on a quantised base, each the same as `generate` on it."""

import json

import pytest
import torch

from ptuning.checkpoint.manifest import describe
from ptuning.cli import main
from ptuning.config import ModelArguments
from ptuning.errors import CheckpointError, ModelError
from ptuning.families import Dialogue
from ptuning.generation import Engine, GenerationRequest
from ptuning.loading import load_base, load_model
from ptuning.methods import SaveTarget, method_of
from ptuning.quantization import chosen, precision_in, precisions
from ptuning.serving import chat
from ptuning.serving.models import LoadedModel
from ptuning.serving.options import ServeOptions
from ptuning.serving.server import build
from tests.conftest import REPO

BASE = REPO / "models" / "chatglm2-tiny"
TOKENS = 12


@pytest.fixture(params=[(8, None, False), (4, None, False), (None, "nf4", True)], ids=["int8", "int4", "nf4-double"])
def asked(request) -> dict:
    """The options of a precision."""
    return dict(zip(("quantization_bit", "quantization", "double_quantization"), request.param, strict=True))


@pytest.fixture
def precision(asked):
    return chosen(**asked)


def saved(base, folder, precision, **options):
    """What was tuned, with an effect, on a base of this precision."""
    torch.manual_seed(0)
    model, method = (
        load_base(base, device="cpu", precision=precision),
        method_of(ModelArguments(str(base), **options), True),
    )
    method.start(model)
    with torch.no_grad():
        for parameter in method.parameters(model):
            parameter.normal_(std=4 if "pre_seq_len" in options else 0.3)
    manifest = describe(base, method.name, method.settings(), precision=precision)
    method.save(model, None, manifest, SaveTarget(folder, True, torch.device("cpu")))
    return folder


@pytest.fixture(
    params=[{"method": "prefix", "pre_seq_len": 8}, {"method": "lora", "lora_rank": 4}],
    ids=lambda given: given["method"],
)
def tuned(request, precision, tmp_path):
    return saved(BASE, tmp_path / "tuned", precision, **request.param)


def generated(question, tuned, asked) -> str:
    """What `generate` answers, one row alone."""
    model, tokenizer = load_model(BASE, tuned, device="cpu", **asked)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], return_tensors="pt")
    answer = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(answer[0, ids.shape[1] :].tolist())


def test_the_engine_mixes_tuned_and_base(tuned, asked):
    loaded = LoadedModel.load(BASE, "float32", **asked, cpu_kernels="exact")
    served = loaded.read_prefix("tuned", tuned)
    template = loaded.template
    ids = template.encode([template.render(Dialogue("你好"))])[0].ids
    requests = [GenerationRequest(0, ids, TOKENS), GenerationRequest(1, ids, TOKENS, prefix=served.prefix)]
    answers: list[list[int]] = [[], []]
    with Engine(loaded.model, template.stop_ids) as engine:
        for token in engine.submit(requests):
            answers[token.id] += [] if token.token is None else [token.token]
    assert list(map(template.decode, answers)) == [generated("你好", None, asked), generated("你好", tuned, asked)]
    assert answers[0] != answers[1]


def test_serve(tuned, asked, precision, caplog):
    worker, _ = build(ServeOptions(model=str(BASE), prefix=(("tuned", str(tuned)),), **asked))
    worker.close()
    assert "was trained on a base in" not in caplog.text
    worker, _ = build(ServeOptions(model=str(BASE), prefix=(("tuned", str(tuned)),)))
    worker.close()
    assert caplog.text.count(f"was trained on a base in {precision.name}, and this one is in 16 bit") == 1


def test_chat(tuned, asked, precision, monkeypatch, capsys):
    questions = iter(["你好", "/exit"])
    monkeypatch.setattr(chat, "_input", lambda: next(questions))
    options = ["--ptuning_checkpoint", str(tuned), *precision.option.split(), "--max_new_tokens", str(TOKENS)]
    options += ["--cpu_kernels", "exact"]
    assert main(["chat", "--dtype", "float32", *options]) == 0
    assert generated("你好", tuned, asked) in capsys.readouterr().out


def test_predict(tuned, asked, precision, tmp_path, capsys):
    file, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"question": "你好"}) + "\n")
    options = ["--file", str(file), "--output", str(output), "--ptuning_checkpoint", str(tuned), "--dtype", "float32"]
    assert main(["predict", *options, "--max_new_tokens", str(TOKENS), *precision.option.split()]) == 0
    assert json.loads(output.read_text())["predict"] == generated("你好", tuned, asked)
    assert "was trained on a base in" not in capsys.readouterr().out


@pytest.fixture(params=[precision.bits for precision in precisions()])
def bits(request) -> int:
    return request.param


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
    assert f"can't be merged into quantised ones, and this base is quantised to int{bits}" in capsys.readouterr().err


def test_a_lora_is_not_merged_into_quantized_files(golden_dir, tmp_path, bits, capsys):
    base = golden_dir / f"chatglm2-tiny-int{bits}"
    folder = saved(base, tmp_path / "lora", None, method="lora", lora_rank=4)
    options = ["--merge", "--ptuning_checkpoint", folder, "--output_dir", tmp_path / "out"]
    assert main(["export", *map(str, options)]) == 2
    said = f"a LoRA can't be put into quantised weights, and this base is quantised to int{bits}; use the 16-bit base"
    assert said in capsys.readouterr().err


def test_a_dora_is_not_put_on_whole_numbers(tmp_path, bits):
    """It trains on nf4 and in 16 bit, and could be loaded here by mistake."""
    folder = saved(BASE, tmp_path / "dora", chosen(None, "nf4", False), method="lora", lora_rank=4, use_dora=True)
    with pytest.raises(
        CheckpointError, match=f"dora: DoRA needs .* peft can't compute it where they are int{bits}; use LoRA"
    ):
        load_model(BASE, folder, device="cpu", quantization_bit=bits)


def test_zero_3_is_refused(golden_dir, bits, monkeypatch):
    monkeypatch.setattr("ptuning.loading.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(
        ModelError, match=f"ZeRO stage 3 can't divide quantised weights, and this base is quantised to int{bits}"
    ):
        load_base(golden_dir / f"chatglm2-tiny-int{bits}", device="cpu")
