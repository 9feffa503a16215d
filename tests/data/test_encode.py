"""Records become ids and labels; what doesn't fit loses old turns, then the middle of the question, never its end."""

import dataclasses
import random

import pytest

from ptuning.data.encode import IGNORE, Encoder, EncodingReport, Lengths
from ptuning.data.formats import Record
from ptuning.errors import ConfigError
from ptuning.families.chatglm2.template import ChatGLM2Template, build_prompt

LONG = "这件外套简约而不简单，白色的衣身十分百搭，彰显别样时尚。" * 6


def random_text(rng: random.Random, longest: int) -> str:
    alphabet = ["衣服", "你", "好", "，", "。", "：", " ", "  ", "\n", "\t", "abc", "Z", "7", "😀", "🎉", "𠮷", "é"]
    alphabet += ["答：", "问：", "[Round 1]", "[gMASK]", "sop", "</s>", "▁", "龘"]
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(longest + 1)))


def random_records(seed: int, count: int = 60) -> list[Record]:
    rng = random.Random(seed)
    return [
        Record(
            random_text(rng, 40),
            random_text(rng, 40),
            tuple((random_text(rng, 12), random_text(rng, 12)) for _ in range(rng.randrange(4))),
            f"data.json:{i}",
        )
        for i in range(count)
    ]


def labelled_runs(row) -> list[list[int]]:
    runs, previous = [], IGNORE
    for label in row.labels:
        if label != IGNORE:
            if previous == IGNORE:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


def test_prompt_answer_and_end_token(tiny_tokenizer):
    record = Record("你好", "很高兴", (("早", "早！"),), "a.json:1")
    (row,), report = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(200, 50)).training_rows([record])
    prompt = tiny_tokenizer(build_prompt("你好", (("早", "早！"),))).input_ids
    answer = [*tiny_tokenizer.encode_text("很高兴"), tiny_tokenizer.eos_token_id]
    assert row.input_ids == prompt + answer
    assert row.labels == [IGNORE] * len(prompt) + answer
    assert row.source == "a.json:1"
    assert report == EncodingReport(rows=1, tokens=len(row.input_ids), longest=len(row.input_ids))


def test_prompt_rows_have_no_labels_and_need_no_response(tiny_tokenizer):
    (row,), report = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(200, 50)).prompt_rows(
        [Record("你好", None, (), "a.json:1")]
    )
    assert row.input_ids == tiny_tokenizer(build_prompt("你好")).input_ids
    assert row.labels == [] and report.rows == 1


def test_no_rows_at_all(tiny_tokenizer):
    rows, report = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(200, 50)).training_rows([])
    assert rows == [] and str(report).startswith("0 rows, 0 tokens on average, longest 0")


def test_the_oldest_turns_go_first(tiny_tokenizer):
    history = tuple((f"问题 {i}", f"答案 {i}") for i in range(4))
    for kept in range(4, -1, -1):
        fitting = tiny_tokenizer(build_prompt("最后", history[4 - kept :])).input_ids
        record = Record("最后", "好", history, "a.json:1")
        (row,), report = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(len(fitting), 9)).prompt_rows([record])
        assert row.input_ids == fitting
        assert report.dropped_turns == (0 if kept == 4 else 1)
        assert report.cut_questions == 0
        assert report.examples == ([] if kept == 4 else [["a.json:1", "dropped_old_turns", 4 - kept]])


def test_then_the_middle_of_the_question_goes(tiny_tokenizer):
    record = Record(f"开头{LONG}结尾", "好", (("旧", "旧"),), "a.json:1")
    (row,), report = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(60, 9)).training_rows([record])
    prompt_length = row.labels.count(IGNORE)
    text = tiny_tokenizer.decode(row.input_ids[:prompt_length])
    assert text.startswith("[Round 1]\n\n问：开头") and text.endswith("结尾\n\n答：")
    assert 56 <= prompt_length <= 60, "as much of the question as fits"
    assert (report.dropped_turns, report.cut_questions, report.cut_answers) == (1, 1, 0)
    assert report.examples == [["a.json:1", "dropped_old_turns", 1], ["a.json:1", "cut_question", 1]]


def test_a_cut_answer_has_no_end_token(tiny_tokenizer):
    answer = tiny_tokenizer.encode_text("你好，世界，你好")
    n = len(answer)
    for limit, cut in ((n + 1, 0), (n, 0), (n - 1, 1), (1, 1)):
        record = Record("你好", "你好，世界，你好", (), "a.json:1")
        (row,), report = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(99, limit)).training_rows([record])
        labels = [label for label in row.labels if label != IGNORE]
        assert labels == (answer[:limit] if cut else [*answer, 2])
        assert report.cut_answers == cut


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [24, 40, 80])
@pytest.mark.parametrize("source_prefix", ["", "请回答："])
def test_whatever_is_cut_the_prompt_fits_and_ends_in_answer(tiny_tokenizer, seed, limit, source_prefix):
    records = random_records(seed)
    limit += len(tiny_tokenizer.encode_text(source_prefix))
    encoder = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(limit, 20), source_prefix)
    rows, report = encoder.training_rows(records)
    prompts, _ = encoder.prompt_rows(records)
    dropped = cut_questions = cut_answers = 0
    open_round = [*tiny_tokenizer.prefix_ids(), *tiny_tokenizer.encode_text(f"{source_prefix}[Round 1]\n\n问：")][:4]
    for record, row, prompt in zip(records, rows, prompts, strict=True):
        length = row.labels.count(IGNORE)
        assert row.input_ids[:length] == prompt.input_ids and length <= limit
        assert prompt.input_ids[:4] == open_round
        text = tiny_tokenizer.decode(prompt.input_ids)
        assert text.startswith(f"{source_prefix}[Round 1]\n\n问：") and text.endswith("\n\n答：")
        whole = tiny_tokenizer(source_prefix + build_prompt(record.prompt, record.history)).input_ids
        if len(whole) <= limit:
            assert prompt.input_ids == whole
        else:
            bare = tiny_tokenizer(source_prefix + build_prompt(record.prompt)).input_ids
            dropped += bool(record.history)
            cut_questions += len(bare) > limit
        answer = tiny_tokenizer.encode_text(record.response)
        cut_answers += len(answer) > 20
        assert row.input_ids[length:] == row.labels[length:] == (answer[:20] if len(answer) > 20 else [*answer, 2])
    assert (report.dropped_turns, report.cut_questions, report.cut_answers) == (dropped, cut_questions, cut_answers)
    assert dropped and cut_questions and cut_answers, "the random records should meet every case"
    assert report.rows == 60 and report.longest == max(len(row.input_ids) for row in rows)
    assert report.tokens == sum(len(row.input_ids) for row in rows)
    assert len(report.examples) == 3


def test_the_report_reads_well(tiny_tokenizer):
    report = EncodingReport(rows=4, dropped_turns=1, cut_questions=2, cut_answers=3, tokens=40, longest=12)
    report.note("a.json:3", "cut_question")
    assert str(report) == (
        "4 rows, 10 tokens on average, longest 12; 1 rows lost old turns; 2 questions cut in the middle; "
        "3 answers cut (no end token), e.g. a.json:3 (question cut)"
    )


def test_loss_on_all_labels_the_answers_alone(tiny_tokenizer):
    record = Record("你好", "很高兴", (("早 abc", "很好"), ("问：", "百搭😀")), "a.json:1")
    (row,), _ = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(400, 50), loss_on="all").training_rows([record])
    (plain,), _ = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(400, 50)).training_rows([record])
    assert row.input_ids == plain.input_ids
    runs = labelled_runs(row)
    assert [tiny_tokenizer.decode(run) for run in runs] == ["很好", "百搭😀", "很高兴"]
    assert [2 in run for run in runs] == [False, False, True]


def check_loss_on_all(tokenizer, records, limit, source_prefix):
    lengths = Lengths(limit, 4000)
    rows, _ = Encoder(ChatGLM2Template(tokenizer), lengths, source_prefix, loss_on="all").training_rows(records)
    plain, _ = Encoder(ChatGLM2Template(tokenizer), lengths, source_prefix).training_rows(records)
    for record, row, last in zip(records, rows, plain, strict=True):
        assert row.input_ids == last.input_ids
        assert all(label in (IGNORE, token) for label, token in zip(row.labels, row.input_ids, strict=True))
        start = last.labels.count(IGNORE)
        assert row.labels[start:] == last.labels[start:]
        inside = [label for label in row.labels[:start] if label != IGNORE]
        if limit == 4000:
            assert tokenizer.sp_model.decode(inside) == "".join(answer for _, answer in record.history)


def plain_ends(record: Record) -> Record:
    """No "▁", which stands for a space (see the test of the refusal). Answers begin and end with a character that no
    vocabulary joins with its neighbours; a token that does reach over an answer's end has no label."""
    history = tuple((q.replace("▁", ""), f"龘{a.replace('▁', '')}龘") for q, a in record.history)
    return Record(record.prompt.replace("▁", ""), record.response, history, record.source)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [60, 4000])
@pytest.mark.parametrize("source_prefix", ["", " ", "请回答："])
def test_loss_on_all_for_random_texts(tiny_tokenizer, seed, limit, source_prefix):
    records = [plain_ends(record) for record in random_records(seed, 40)]
    check_loss_on_all(tiny_tokenizer, records, limit, source_prefix)


@pytest.mark.parametrize("limit", [60, 4000])
@pytest.mark.parametrize("source_prefix", ["", " ", "请回答："])
def test_loss_on_all_with_the_real_tokenizer(real_tokenizer, limit, source_prefix):
    records = [plain_ends(record) for record in random_records(9, 200)]
    check_loss_on_all(real_tokenizer, records, limit, source_prefix)


def test_a_token_that_reaches_over_an_answers_end_has_no_label(real_tokenizer):
    record = Record("你好", "好", (("早", "[abc"),), "a.json:1")
    assert "：[" in real_tokenizer.sp_model.encode(build_prompt("早") + "[abc", out_type=str)
    (row,), _ = Encoder(ChatGLM2Template(real_tokenizer), Lengths(99, 9), loss_on="all").training_rows([record])
    assert [real_tokenizer.decode(run) for run in labelled_runs(row)] == ["abc", "好"]


def test_loss_on_all_refuses_a_tokenizer_that_rewrites_text(tiny_tokenizer):
    record = Record("你好", "好", (("a▁b", "c"),), "a.json:1")  # "▁" (3 bytes) is how sentencepiece spells a space
    with pytest.raises(ConfigError, match="loss_on=all needs a tokenizer that keeps the text as it is"):
        Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(400, 50), loss_on="all").training_rows([record])


@pytest.mark.parametrize("source_prefix", ["", "请回答："])
def test_a_source_limit_shorter_than_the_template_is_refused(tiny_tokenizer, source_prefix):
    shortest = len(tiny_tokenizer(source_prefix + build_prompt("")).input_ids)
    with pytest.raises(ConfigError) as caught:
        Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(shortest - 1, 8), source_prefix)
    assert str(caught.value) == (
        f"max_source_length {shortest - 1} is shorter than the prompt template itself ({shortest} tokens); "
        f"use at least {shortest + 16}"
    )
    (row,), _ = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(shortest, 8), source_prefix).prompt_rows(
        [Record(LONG, None, (), "a:1")]
    )
    assert row.input_ids == tiny_tokenizer(source_prefix + build_prompt("")).input_ids


def test_a_target_limit_of_0_is_refused(tiny_tokenizer):
    with pytest.raises(ConfigError, match="max_target_length is 0; use at least 1"):
        Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(99, 0))


def with_system(system: str, question: str = "最后") -> Record:
    return Record(question, "好", (("早 abc", "很好"), ("旧", "百搭😀")), "a.json:1", system)


@pytest.mark.parametrize("source_prefix", ["", "请回答："])
def test_a_system_text_stands_between_source_prefix_and_first_round(tiny_tokenizer, source_prefix):
    record = with_system("简约。[Round 1]")
    encoder = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(300, 9), source_prefix, loss_on="all")
    (row,), _ = encoder.training_rows([record])
    text = source_prefix + build_prompt(record.prompt, record.history, record.system)
    assert text.startswith(f"{source_prefix}简约。[Round 1]\n\n[Round 1]\n\n问：早 abc")
    assert row.input_ids == [*tiny_tokenizer(text).input_ids, *tiny_tokenizer.encode_text("好"), 2]
    assert [tiny_tokenizer.decode(run) for run in labelled_runs(row)] == ["很好", "百搭😀", "好"]


def test_a_system_text_stays_while_old_turns_and_the_middle_of_the_question_go(tiny_tokenizer):
    record = with_system("短答", f"开头{LONG * 2}结尾")
    (row,), report = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(80, 9)).prompt_rows([record])
    text = tiny_tokenizer.decode(row.input_ids)
    assert text.startswith("短答\n\n[Round 1]\n\n问：开头") and text.endswith("结尾\n\n答：")
    assert 76 <= len(row.input_ids) <= 80
    assert (report.dropped_systems, report.dropped_turns, report.cut_questions) == (0, 1, 1)


def test_a_system_text_that_leaves_less_than_half_of_the_room_is_dropped(tiny_tokenizer):
    record = with_system(LONG)
    (row,), report = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(80, 9)).prompt_rows([record])
    assert row.input_ids == tiny_tokenizer(build_prompt(record.prompt, record.history)).input_ids
    assert (report.dropped_systems, report.dropped_turns, report.cut_questions) == (1, 0, 0)
    assert "1 rows lost their system text (more than half of max_source_length), e.g. a.json:1 (system" in str(report)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [24, 40, 80])
def test_with_any_system_text_the_prompt_fits_and_ends_in_answer(tiny_tokenizer, seed, limit):
    rng = random.Random(seed)
    records = [dataclasses.replace(r, system=random_text(rng, 20) or None) for r in random_records(seed)]
    rows, _ = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(limit, 20), loss_on="last").training_rows(records)
    for row in rows:
        prompt = row.input_ids[: row.labels.count(IGNORE)]
        assert len(prompt) <= limit and tiny_tokenizer.decode(prompt).endswith("\n\n答：")


def test_measured_lengths_are_those_of_uncut_rows(tiny_tokenizer):
    records = [with_system("短答", LONG), *random_records(5, 20)]
    whole, _ = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(10_000, 10_000)).training_rows(records)
    measured = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(40, 2)).measure(records)
    assert measured == [(n := row.labels.count(IGNORE), len(row.input_ids) - n - 1) for row in whole]
