"""The scores of one answer beside the official four."""

import json

import pytest

from ptuning.evaluation.metrics import row_metrics, row_scores
from ptuning.evaluation.scores import OFFICIAL, is_repeating, official_scores, token_f1
from tests.conftest import REPO, SHARED

LONG = "这款裙子采用了优质面料，"


def test_the_official_four_are_left_as_they_are():
    rows = [json.loads(line) for line in (REPO / "tests/golden/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        scores = row_scores(row["predict"], row["label"])
        assert list(scores) == [metric.name for metric in row_metrics()]
        assert {name: scores[name] for name in OFFICIAL} == official_scores(row["predict"], row["label"])
        assert {name: scores[name] for name in OFFICIAL} == {name: row[name] for name in OFFICIAL}


def test_the_other_scores_of_one_answer():
    scores = row_scores(" 白色的上衣\n", "白色的衣服")
    assert {name: scores[name] for name in scores if name not in OFFICIAL} == {
        "exact_match": 0.0,
        "token_f1": 80.0,  # 4 of 5 characters on both sides
        "length_ratio": 1.0,
        "repeating": 0.0,
    }
    assert row_scores("白色的衣服\n", " 白色的衣服")["exact_match"] == 100.0
    assert row_scores("白", "白色的")["length_ratio"] == 0.3333
    assert row_scores("好看好看好看好看", "好看")["repeating"] == 100.0


def test_an_empty_answer_scores_zero_and_crashes_nothing():
    assert set(row_scores(" ", "白色的衣服").values()) == {0.0}
    assert row_scores("白色", "")["length_ratio"] == 2.0  # no reference has fewer than 1 character to divide by
    assert row_scores("", "")["exact_match"] == 100.0


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("衣服白色的", "白色的衣服", 1.0),  # a bag: order doesn't count
        ("白色，的 衣服。", "白色的衣服", 1.0),  # nor do punctuation and spaces
        ("ＡＢＣ１２", "abc12", 1.0),  # nor full width and case
        ("I like cats", "I like dogs", 2 / 3),  # words of other scripts are whole
        ("12", "13", 0.0),  # and so are numbers
        ("的的的", "的", 0.5),  # each occurrence counts once: precision 1/3, recall 1
        ("穿ABC很好", "穿ABC好", 2 * 3 / 7),
        ("。！", "，", 1.0),
        ("。！", "好", 0.0),
        ("カメラ", "カメ", 2 * 2 / 5),
    ],
)
def test_token_f1(prediction, reference, f1):
    assert token_f1(prediction, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    "text",
    [
        "好看好看好看好看",
        "很好，很好，很好，很好，",
        "这条裙子很好，很好，很好，很好，很",  # the last unit may be cut
        "我们一起来看看吧，" + "非常好看，" * 6 + "非常好看。",  # or end differently
        LONG * 3,
        "版型宽松。\n" + LONG * 4,
        "简约大方。" * 200,
        "好" * 12,
        "the best " * 5,
        "一共6项：类型、口味、画面、画面、画面、画面。",  # of our own small model
    ],
)
def test_loops(text):
    assert is_repeating(text)
    assert is_repeating(f"\n{text} \n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "好",
        "哈哈哈",
        "哈哈哈哈哈哈哈哈",
        "一天一天",
        "一天一天过去，日子好了。",
        "天天开心，天天快乐，天天向上，天天好心情",
        LONG * 2,
        "1、白色\n2、红色\n3、蓝色\n4、黑色",
        "长长长长长长长，" + "白色的衣身十分百搭，彰显别样时尚，打破单调乏味。",
        "好看" * 6 + "，这件外套的衣身十分百搭，穿在身上彰显别样的时尚。",  # in the middle: the model got out of it
        "价格是10000000元",
        "| --- | --- | --- | --- |\n| 颜色 | 白色 | 红色 | 蓝色 |",
    ],
)
def test_natural_texts_are_no_loops(text):
    assert not is_repeating(text)


def test_no_text_written_by_people_or_recipes_is_a_loop():
    files = [REPO / "data/advertise/dev.json", REPO / "data/dialogue/dev.json", SHARED / "adgen/dev.json"]
    texts = [
        value
        for file in files
        if file.is_file()
        for line in file.read_text(encoding="utf-8").splitlines()
        for value in json.loads(line).values()
        if isinstance(value, str)
    ]
    assert len(texts) >= 700
    assert not [text for text in texts if is_repeating(text)]
