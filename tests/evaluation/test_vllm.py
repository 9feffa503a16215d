"""`ptuning evaluate|predict --engine vllm`: the figures of this package's engine, from an endpoint that computes as vLLM does."""

import json

import pytest

from ptuning.cli import main
from ptuning.config import parse
from ptuning.errors import ConfigError
from ptuning.evaluation.answer_file import PredictOptions
from ptuning.evaluation.probe import read_probe
from ptuning.loading import load_base, load_template
from tests.end_to_end.conftest import MODEL, ROOT
from tests.evaluation.computing_vllm import ComputingVllm
from tests.serving.conftest import prefix_folders

__all__ = ["prefix_folders"]  # a fixture

FILE = str(ROOT / "data" / "advertise" / "dev.json")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    with ComputingVllm(load_base(MODEL, device="cpu"), load_template(MODEL), store) as made:
        yield made


def engine(vllm):
    return ["--engine", "vllm", "--vllm_url", vllm.url, "--prefix_store", str(vllm.store)]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_evaluate_gives_the_same_figures(vllm, prefix_folders, tmp_path, monkeypatch, capsys):
    few = read_probe()[:3]
    monkeypatch.setattr("ptuning.evaluation.run.read_probe", lambda: few)
    asked = [
        "evaluate",
        "--ptuning_checkpoint",
        str(prefix_folders["ads"]),
        "--test_file",
        FILE,
        "--baseline",
        "--probe",
    ]
    asked += ["--max_predict_samples", "4", "--max_target_length", "12"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main([*asked, "--output_dir", str(ours)]) == 0
    assert main([*asked, "--output_dir", str(theirs), *engine(vllm)]) == 0
    for name in ("predictions.jsonl", "predictions_base.jsonl", "probe.jsonl"):
        for one, two in zip(lines_of(ours / name), lines_of(theirs / name), strict=True):
            losses = [key for key in one if "loss" in key and key != "loss_tokens"]
            assert {key: one[key] for key in losses} == pytest.approx({key: two[key] for key in losses}, abs=2e-4)
            assert {key: one[key] for key in one.keys() - losses} == {key: two[key] for key in two.keys() - losses}
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in (ours, theirs)]
    assert {name: values["rouge-l"] for name, values in scores[0].items() if "rouge-l" in values} == {
        name: values["rouge-l"] for name, values in scores[1].items() if "rouge-l" in values
    }
    lengths = {(body.get("kv_transfer_params") or {}).get("length", 0) for body in vllm.bodies}
    assert lengths == {0, 8}, "both the base and the prefix were asked"
    monkeypatch.setattr(vllm, "numbers_from", 100)
    assert main([*asked, "--output_dir", str(tmp_path / "never"), *engine(vllm)]) == 2
    assert "no vLLM can answer: " in (said := capsys.readouterr().err) and "not JSON compliant" in said


def test_predict_goes_on_where_vllm_failed(vllm, prefix_folders, tmp_path, capsys):
    asked = ["predict", "--ptuning_checkpoint", str(prefix_folders["ads"]), "--model_name_or_path", str(MODEL)]
    asked += ["--file", FILE, "--max_predict_samples", "3", "--max_new_tokens", "6"]
    own, output = tmp_path / "own.jsonl", tmp_path / "out.jsonl"
    assert main([*asked, "--output", str(own)]) == 0
    vllm.fail = {"status": 500}
    assert main([*asked, "--output", str(output), *engine(vllm)]) == 2
    assert "no vLLM can answer: http://127.0.0.1" in (said := capsys.readouterr().err) and "goes on where" in said
    vllm.fail = {"status": 400}
    assert main([*asked, "--output", str(output), *engine(vllm)]) == 2
    assert "vLLM refuses a request: HTTP 400" in capsys.readouterr().err
    vllm.fail = None
    assert main([*asked, "--output", str(output), *engine(vllm)]) == 0
    assert lines_of(output) == lines_of(own)
    vllm.max_model_len = 20
    try:
        assert main([*asked, "--output", str(output), *engine(vllm), "--overwrite"]) == 2
    finally:
        vllm.max_model_len = 2560
    assert "(prefix of 8, " in (said := capsys.readouterr().err) and "started with --max-model-len 20; start" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "--engine vllm needs --vllm_url"),
        (["--vllm_url", "127.0.0.1:8"], "--vllm_url 127.0.0.1:8: expected an address such as"),
        (["--vllm_url", "http://x", "--num_beams", "2"], "--num_beams is for this package's own engine"),
        (["--vllm_url", "http://x", "--dtype", "float32"], "--dtype is for this package's own engine"),
    ],
)
def test_refused(more, said):
    base = ["--model_name_or_path", "m", "--engine", "vllm", *more]
    with pytest.raises(ConfigError, match=said):
        parse([*base, "--do_predict", "--test_file", "t", "--output_dir", "o"])
    given = dict(zip((name.removeprefix("--") for name in more[::2]), more[1::2], strict=True))
    given |= {"vllm_url": (given["vllm_url"],)} if "vllm_url" in given else {}
    given |= {"num_beams": int(given["num_beams"])} if "num_beams" in given else {}
    with pytest.raises(ConfigError, match=said):
        PredictOptions(file="f", output="o", engine="vllm", **given)


def test_refused_with_what_computes_here():
    run = ["--model_name_or_path", "m", "--output_dir", "o", "--test_file", "t", "--do_predict"]
    vllm = ["--engine", "vllm", "--vllm_url", "http://x"]
    with pytest.raises(ConfigError, match="--do_train computes in this process: leave one of the two out"):
        parse([*run, *vllm, "--do_train", "--train_file", "t"])
    with pytest.raises(ConfigError, match="--vllm_url is for --engine vllm; give that too"):
        parse([*run, *vllm[2:]])
    with pytest.raises(ConfigError, match="--engine vllm needs --prefix_store"):
        parse([*run, *vllm, "--ptuning_checkpoint", "c"])
