"""`ptuning compare`."""

import json
import random
import re

import pytest

from ptuning.errors import ConfigError, DataError
from ptuning.evaluation.compare import FEWEST_ROWS, MORE, NOT_MORE, TOO_FEW, compare, compare_command, comparison_table
from ptuning.evaluation.metrics import METRICS, row_scores, summarise
from ptuning.language import columns, speaking

WORDS = ["白色", "红色", "棉布", "宽松", "修身", "简约", "复古", "外套", "长裙", "衬衫"]


def predictions(quality: float, rows: int = 60, seed: int = 0) -> list[dict]:
    """Answers of which each word is right with this probability; the references are the same for every seed."""
    texts, chance = random.Random(99), random.Random(seed)
    lines = []
    for index in range(rows):
        words = texts.choices(WORDS, k=8)
        answer = "".join(word if chance.random() < quality else "好" for word in words)
        reference = "".join(words)
        lines.append(
            {
                "index": index,
                "prompt": f"第{index}题",
                "history": [],
                "labels": reference,
                "predict": answer,
                "scores": row_scores(answer, reference),
                "tokens": len(answer),
                "finished": True,
                "loss": 16 * (1 - quality) + chance.random(),
                "loss_tokens": 16,
            }
        )
    return lines


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs in the working directory: worse, better (and its base), and one as good as better."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "worse" / "predictions.jsonl", predictions(0.6))
    write(tmp_path / "better" / "predictions.jsonl", predictions(0.9, seed=1))
    write(tmp_path / "better" / "predictions_base.jsonl", predictions(0.2, seed=2))
    write(tmp_path / "equal" / "predictions.jsonl", predictions(0.9, seed=3))
    return tmp_path


def as_json(capsys, *argv):
    assert compare_command([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_better_run(runs, capsys):
    result = as_json(capsys, "worse", "better")
    assert (result["a"], result["b"]) == ("worse/predictions.jsonl", "better/predictions.jsonl")
    assert result["rows"] == 60
    assert list(result["metrics"]) == list(METRICS)
    for name in ("bleu-4", "rouge-l", "corpus_bleu", "chrf", "token_f1", "answer_loss", "answer_perplexity"):
        one = result["metrics"][name]
        assert (one["verdict"], one["better"]) == (MORE, "b"), name
        low, high = one["interval"]
        assert low < one["difference"] < high and low * high > 0
        assert one["difference"] == pytest.approx(one["b"] - one["a"], abs=2e-4)  # each is rounded
    assert result["metrics"]["answer_loss"]["difference"] < 0  # less is better
    assert result["metrics"]["length_ratio"]["better"] is None
    assert result["metrics"]["empty"] == {
        "a": 0.0,
        "b": 0.0,
        "difference": 0.0,
        "interval": [0.0, 0.0],
        "verdict": NOT_MORE,
        "better": None,
    }
    summary = summarise(predictions(0.6))
    assert all(one["a"] == pytest.approx(summary[name], abs=1e-4) for name, one in result["metrics"].items())


def test_swapped_runs_swap_the_signs(runs, capsys):
    there, back = as_json(capsys, "worse", "better"), as_json(capsys, "better", "worse")
    for name, one in there["metrics"].items():
        other = back["metrics"][name]
        assert other["difference"] == pytest.approx(-one["difference"])
        assert other["interval"] == pytest.approx([-one["interval"][1], -one["interval"][0]], abs=1e-4)
        assert {one["better"], other["better"]} in ({"a", "b"}, {None})


def test_equal_models_differ_by_noise(runs, capsys):
    result = as_json(capsys, "better", "equal")
    assert all(one["verdict"] == NOT_MORE and one["better"] is None for one in result["metrics"].values())
    assert any(one["difference"] != 0 for one in result["metrics"].values())
    same = as_json(capsys, "better", "better")
    assert all(one["interval"] == [0.0, 0.0] for one in same["metrics"].values())


def test_pairs_tell_more_than_two_separate_intervals():
    """Rows of very different difficulty, each answered a little better by b."""
    a = predictions(0.5, rows=200)
    for index, line in enumerate(a):
        line["scores"]["rouge-1"] = float(index % 100)
    b = [
        line | {"scores": line["scores"] | {"rouge-1": line["scores"]["rouge-1"] + index % 2}}
        for index, line in enumerate(a)
    ]
    spread = summarise(a)["intervals"]["rouge-1"]
    one = compare(a, b)["rouge-1"]
    assert spread[1] - spread[0] > 5
    assert one["difference"] == 0.5 and one["verdict"] == MORE
    assert one["interval"][1] - one["interval"][0] < 0.2


def test_one_run_against_its_own_base(runs, capsys):
    result = as_json(capsys, "better")
    assert (result["a"], result["b"]) == ("better/predictions_base.jsonl", "better/predictions.jsonl")
    assert result["metrics"]["bleu-4"]["better"] == "b"


def test_the_table(runs, capsys):
    assert compare_command(["worse", "better"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A: worse/predictions.jsonl\nB: better/predictions.jsonl\n60 rows\n")
    rows = {line[:14].strip(): line for line in out.splitlines() if line.endswith(("noise", "better"))}
    assert set(rows) == {metric.label for metric in METRICS.values()}
    assert rows["BLEU-4"].endswith("more than noise: B is better")
    assert rows["empty %"].endswith("  not more than noise")
    assert rows["length ratio"].split("]")[1].strip() in (MORE, NOT_MORE)
    assert "Paired bootstrap, 1,000 resamples of the rows. With 14 metrics one may stand out by chance" in out
    assert "another training seed" in out
    assert all(len(line) <= 120 for line in out.splitlines())


@pytest.mark.parametrize("rows", [1, FEWEST_ROWS - 1])
def test_too_few_rows_to_tell(tmp_path, capsys, rows):
    write(tmp_path / "run" / "predictions.jsonl", predictions(0.9, rows))
    write(tmp_path / "run" / "predictions_base.jsonl", predictions(0.1, rows))
    result = as_json(capsys, str(tmp_path / "run"))
    assert {one["verdict"] for one in result["metrics"].values()} == {TOO_FEW}
    assert compare_command([str(tmp_path / "run")]) == 0
    shown = "1 row" if rows == 1 else f"{rows} rows"
    out = capsys.readouterr().out
    assert f"\n{shown}\n" in out
    assert f"Nothing can be said about noise with {shown}: evaluate at least {FEWEST_ROWS}, better some" in out


def test_files_folders_and_names(runs, capsys):
    file = write(runs / "mine.jsonl", predictions(0.6))
    result = as_json(capsys, str(file), "better", "--predictions", "predictions_base.jsonl")
    assert (result["a"], result["b"]) == (str(file), "better/predictions_base.jsonl")
    (runs / "better" / "predictions.jsonl").unlink()
    assert as_json(capsys, "worse", "better")["b"] == "better/predictions_base.jsonl"


def test_files_of_older_versions(runs, capsys):
    """Only the official four, no history and no loss."""
    old = predictions(0.6)
    for line in old:
        line["scores"] = {name: line["scores"][name] for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l")}
        for field in ("history", "loss", "loss_tokens"):
            del line[field]
    new = as_json(capsys, "worse", "better")["metrics"]
    write(runs / "worse" / "predictions.jsonl", old)
    found = as_json(capsys, "worse", "better")["metrics"]
    assert found == {name: one for name, one in new.items() if not name.startswith("answer_")}


def refused(error, *argv):
    with pytest.raises(error) as caught:
        compare_command([str(argument) for argument in argv])
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("prompt", "别的题", "prompt of row 7 is '第7题' and '别的题'"),
        ("labels", "别的答案", "labels of row 7 is "),
        ("history", [["有吗？", "有。"]], "history of row 7 is '[]' and \"[['有吗？', '有。']]\""),
    ],
)
def test_other_rows_are_refused(runs, field, value, shown):
    lines = predictions(0.9)
    lines[7] |= {field: value}
    write(runs / "equal" / "predictions.jsonl", lines)
    message = refused(DataError, "better", "equal")
    assert message.startswith("better/predictions.jsonl and equal/predictions.jsonl answer different rows: " + shown)
    assert message.endswith(
        "evaluate both with the same --test_file, --max_predict_samples, --max_target_length and --generation_mode "
        "(the official mode cuts references)"
    )


def test_another_number_of_rows_is_refused(runs):
    write(runs / "equal" / "predictions.jsonl", predictions(0.9, rows=59))
    message = refused(DataError, "better", "equal")
    assert message.startswith("better/predictions.jsonl has 60 rows and equal/predictions.jsonl has 59: evaluate both")


def test_runs_without_predictions(runs):
    (runs / "none").mkdir()
    assert refused(ConfigError, "none", "better") == (
        "none: has no predictions.jsonl or predictions_base.jsonl: run `ptuning evaluate` into it first"
    )
    assert refused(ConfigError, "gone", "better") == (
        f"gone: no such folder or file in {runs}: give a run folder or a file of predictions"
    )
    assert refused(ConfigError, "better", "worse", "--predictions", "x.jsonl") == (
        "better: has no x.jsonl: name one of its files with --predictions: "
        "'predictions.jsonl', 'predictions_base.jsonl'"
    )
    assert refused(ConfigError, "worse") == (
        "worse: has no predictions_base.jsonl to compare predictions.jsonl with: evaluate with --baseline, "
        "or give a second run"
    )
    assert refused(ConfigError, "worse/predictions.jsonl") == (
        "worse/predictions.jsonl is one file: give a second one to compare it with, or a run folder"
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"predict": None}, "predict: is null, text is needed"),
        ({"finished": "yes"}, "finished: is text 'yes', true or false is needed"),
        ({"labels": 3}, "labels: is the number 3, text is needed"),
    ],
)
def test_damaged_lines_are_named(runs, change, problem):
    lines = predictions(0.9)
    lines[2] |= change
    path = write(runs / "equal" / "predictions.jsonl", lines)
    message = refused(DataError, "better", "equal")
    assert message == f"equal/predictions.jsonl:3: {problem}: write the file again with `ptuning evaluate`"
    del lines[2]["prompt"]
    write(path, lines)
    assert "equal/predictions.jsonl:3: prompt: is missing, text is needed" in refused(DataError, "better", "equal")
    path.write_text("", encoding="utf-8")
    assert refused(DataError, "better", "equal").startswith(
        "equal/predictions.jsonl: has no lines: write the file again"
    )
    path.write_text('{"prompt": \n', encoding="utf-8")
    assert "equal/predictions.jsonl:1: JSON: " in refused(DataError, "better", "equal")


def test_the_table_in_chinese():
    result = {"a": "a", "b": "b", "rows": 60, "metrics": compare(predictions(0.6), predictions(0.9, seed=1))}
    with speaking("zh"):
        table = comparison_table(result).splitlines()
    assert table[2] == "60 条" and table[4].split("  ")[-1] == "结论"
    rows = {line.split("  ")[0]: line.split("  ")[-1] for line in table[5:-4]}
    assert (
        rows["BLEU-4"] == "超出偶然：B 更好" and rows["空 %"] == "可能只是偶然" and len(rows) == len(result["metrics"])
    )
    verdicts = {columns(line[: -len(line.split("  ")[-1])]) for line in table[4:-4]}
    assert len(verdicts) == 1, "the last column is straight"
    assert table[-3].startswith("配对自助法，对各条重采样 1,000 次")
    assert result["metrics"]["bleu-4"]["verdict"] == MORE, "--json has it in English"


def test_columns_keep_apart_however_wide_the_figures_are():
    wide = {"a": 123456789.0, "b": 987654321.0, "difference": 864197532.0, "interval": [-123456789.0, 987654321.0]}
    small = {"a": 0.5, "b": 0.25, "difference": -0.25, "interval": [-1.0, 1.0]}
    metrics = {name: one | {"verdict": MORE, "better": None} for name, one in (("bleu-4", wide), ("rouge-1", small))}
    table = comparison_table({"a": "x" * 200, "b": "y", "rows": 100, "metrics": metrics}).splitlines()
    for name, one in (("BLEU-4", wide), ("ROUGE-1", small)):
        line = next(line for line in table if line.startswith(name))
        low, high = one["interval"]
        figures = [f"{one['a']:.2f}", f"{one['b']:.2f}", f"{one['difference']:+.2f}", f"[{low:.2f}, {high:.2f}]"]
        assert re.split(r" {2,}", line) == [name, *figures, MORE]
    widths = {line.index(MORE) for line in table if line.endswith(MORE)}
    assert len(widths) == 1
