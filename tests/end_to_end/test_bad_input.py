"""Bad input stops before the model loads, with one message and no traceback."""

import json

import pytest


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


GOOD = {"content": "类型#上衣", "summary": "一件上衣。"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([GOOD, {"content": "类型#裙", "summary": 7}], ("bad.json:2: summary:", "--skip_invalid_rows true")),
        ([{"contents": "a", "summary": "b"}], ("bad.json:1: content:", "'contents'", "--prompt_column")),
    ],
)
def test_bad_rows(tmp_path, run_main, train_flags, rows, expected):
    file = write(tmp_path / "bad.json", rows)
    # the model doesn't exist either: the data must be looked at first
    done = run_main(*train_flags(tmp_path / "out", train_file=file, model_name_or_path="/no/such/model"), check=False)
    assert done.returncode == 2
    for text in expected:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_model(tmp_path, run_main, train_flags):
    done = run_main(*train_flags(tmp_path / "out", model_name_or_path=str(tmp_path / "nowhere")), check=False)
    assert done.returncode == 2
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_unknown_flag_names_the_nearest(run_main):
    done = run_main("--do_train", "--pre_seq_length", "8", check=False)
    assert done.returncode == 2
    assert "did you mean --pre_seq_len?" in done.stderr


def test_invalid_rows_can_be_skipped(tmp_path, run_main, train_flags):
    file = write(tmp_path / "some.json", [GOOD] * 8 + [{"content": "", "summary": "x"}])
    done = run_main(*train_flags(tmp_path / "out", train_file=file, max_steps=1), "--skip_invalid_rows", "true")
    assert "8 rows of" in done.stdout and "1 invalid rows skipped" in done.stdout
