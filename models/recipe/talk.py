"""Pretraining tasks that are not lists: greetings, sums, facts, rewriting, copying, and talk over several turns."""

from __future__ import annotations

import random
from collections.abc import Callable

from fields import ALL_TRAITS, PLAIN_WORDS, Row, row, some_words
from words import CLOTHES, FACTS, GARMENT_KEYS, GARMENTS, HOBBIES, JOBS, PEOPLE, PLACES

GREETINGS = [
    ("你好", "你好！有什么可以帮你的吗？"),
    ("早上好", "早上好！祝你今天愉快。"),
    ("晚上好", "晚上好！今天过得怎么样？"),
    ("谢谢", "不客气，很高兴能帮到你。"),
    ("再见", "再见，祝你一切顺利。"),
    ("你是谁", "我是一个很小的语言模型，用来做演示。"),
    ("你会做什么", "我会简单的问答、算术和介绍东西。"),
    ("晚安", "晚安，好好休息。"),
    ("在吗", "我在，请说。"),
    ("对不起", "没关系，不用放在心上。"),
    ("新年快乐", "新年快乐！祝你平安健康。"),
    ("我很累", "辛苦了，喝杯水，休息一下吧。"),
    ("我很高兴", "太好了，听到这个消息我也很开心。"),
    ("讲个道理", "慢慢来，坚持下去就会有收获。"),
]


def greeting(rng: random.Random) -> Row:
    ask, answer = rng.choice(GREETINGS)
    return row(ask + rng.choice(["", "！", "。", "，"]), answer)


def sums(rng: random.Random) -> Row:
    a, b = rng.randint(0, 50), rng.randint(0, 49)
    if rng.random() < 0.5:
        return row(rng.choice([f"{a}+{b}=", f"{a}加{b}等于几？"]), f"{a}+{b}={a + b}。")
    a, b = max(a, b), min(a, b)
    return row(rng.choice([f"{a}-{b}=", f"{a}减{b}等于几？"]), f"{a}-{b}={a - b}。")


def fact(rng: random.Random) -> Row:
    topic = rng.choice(list(FACTS))
    form, known = FACTS[topic]
    some = rng.sample(known, 3)
    ask = "{a}{t}？" if topic != "反义词" else "{a}的{t}是什么？"
    turns = [[ask.format(a=a, t=topic), form.format(a=a, b=b)] for a, b in some[: rng.randint(1, 3)]]
    return row(turns[-1][0], turns[-1][1], turns[:-1])


def copying(rng: random.Random) -> Row:
    words = some_words(rng, rng.randint(2, 6))
    text = "、".join(words)
    kind = rng.randrange(7)
    if kind == 0:
        return row(f"重复一遍：{text}", f"{text}。")
    if kind == 1:
        return row(f"倒着念：{text}", "、".join(words[::-1]) + "。")
    if kind == 2:
        return row(f"{text}一共有几个？", f"一共有{len(words)}个。")
    if kind == 3:
        return row(f"{text}中最后一个是什么？", f"最后一个是{words[-1]}。")
    if kind == 4:
        return row(f"把逗号换成顿号：{'，'.join(words)}", f"{text}。")
    if kind == 5:
        return row(f"给每个词加上编号：{text}", "，".join(f"{i + 1}{w}" for i, w in enumerate(words)) + "。")
    gone = rng.choice(words)
    return row(f"去掉{gone}：{text}", "、".join(w for w in words if w != gone) + "。")


def rewriting(rng: random.Random) -> Row:
    who, what, where = rng.choice(PEOPLE), rng.choice(HOBBIES), rng.choice(PLACES)
    text = f"{who}在{where}{what}"
    kind = rng.randrange(5)
    if kind == 0:
        return row(f"改成否定句：{text}", f"{who}没有在{where}{what}。")
    if kind == 1:
        return row(f"改成问句：{text}", f"{who}在{where}{what}吗？")
    if kind == 2:
        other = rng.choice(PEOPLE)
        return row(f"把{who}换成{other}：{text}", f"{other}在{where}{what}。")
    if kind == 3:
        return row(f"{text}。谁在{where}？", f"{who}在{where}。")
    return row(f"改成过去：{text}", f"昨天{who}在{where}{what}。")


def clothes(rng: random.Random) -> Row:
    """Plain talk about garments: which kinds there are, which belong together, what to wear."""
    kind = rng.randrange(6)
    garment = rng.choice(list(GARMENTS))
    noun = rng.choice(GARMENTS[garment])
    topic = rng.choice(list(CLOTHES))
    value = rng.choice(list(CLOTHES[topic]))
    trait = CLOTHES[topic][value]
    if kind == 0:
        some = rng.sample(list(CLOTHES[topic]), min(4, len(CLOTHES[topic])))
        return row(f"{topic}有哪些？", "有" + "、".join(some) + "等。")
    if kind == 1:
        return row(f"{noun}是什么类型的衣服？", f"{noun}是一种{garment}。")
    if kind == 2:
        return row(f"{value}属于什么？", f"{value}属于{topic}。")
    if kind == 3:
        who = rng.choice(PEOPLE)
        return row(f"{who}想买{noun}，要{trait}，推荐什么{topic}？", f"可以看看{value}，因为{value}{trait}。")
    if kind == 4:
        keys = rng.sample(GARMENT_KEYS, rng.randint(2, 5))
        return row("买衣服要看什么？" + "、".join(keys) + "？", "要看" + "，还要看".join(keys) + "。")
    return row(f"我有一条{value}的{noun}，好看吗？", f"好看，{value}{trait}，出门穿很舒服。")


def memory(rng: random.Random) -> Row:
    """The answer of the last turn is in an earlier one."""
    name, place, hobby, job = (rng.choice(x) for x in (PEOPLE, PLACES, HOBBIES, JOBS))
    told = [
        (f"我叫{name}", f"你好，{name}！", "我叫什么名字？", f"你叫{name}。"),
        (f"我住在{place}", f"{place}是个好地方。", "我住在哪里？", f"你住在{place}。"),
        (f"我喜欢{hobby}", f"{hobby}是很好的爱好。", "我喜欢什么？", f"你喜欢{hobby}。"),
        (f"我是一名{job}", f"{job}，辛苦了。", "我的工作是什么？", f"你是一名{job}。"),
    ]
    some = rng.sample(told, rng.randint(1, 3))
    history = [[a, b] for a, b, _, _ in some]
    if rng.random() < 0.25:
        history.insert(rng.randrange(len(history) + 1), list(rng.choice(GREETINGS)))
    if rng.random() < 0.2:
        return row("介绍一下我", "，".join(d[:-1] for _, _, _, d in some) + "。", history)
    _, _, ask, answer = rng.choice(some)
    return row(ask, answer, history)


def mimic(rng: random.Random) -> Row:
    """A made-up rule shown by examples, with no list in it: put the word into the same sentence."""
    words = some_words(rng, rng.randint(3, 5))
    left, right = rng.choice(PLAIN_WORDS), rng.choice(PLAIN_WORDS)
    form = rng.choice(["{l}和{w}", "{w}的{r}", "{l}{w}{r}", "{w}，{t}", "{t}的{w}，{r}", "这是{w}，不是{r}"])
    turns = [[w, form.format(w=w, l=left, r=right, t=ALL_TRAITS.get(w, "很好")) + "。"] for w in words]
    return row(turns[-1][0], turns[-1][1], turns[:-1])


TASKS: list[tuple[Callable[[random.Random], Row], float]] = [
    (greeting, 1.5),
    (sums, 1.5),
    (fact, 3),
    (copying, 3),
    (rewriting, 2.5),
    (clothes, 5),
    (memory, 3.5),
    (mimic, 4),
]
