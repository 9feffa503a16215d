"""Pretraining tasks on key#value lists: render them in a given style, or answer a question about them.

The point of these tasks is to make the base steerable. Each row states in its context how to write (a named style, a
template, or worked examples), and the right answer follows that context. A prefix can then stand in for such a context.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from words import AFTER, BEFORE, CLOTHES, DOMAINS, ENDINGS, GARMENTS, OPENINGS, Traits

Row = dict[str, object]
Pairs = list[tuple[str, str]]

TABLES = [*(traits for d in DOMAINS.values() for traits in d[2].values()), *CLOTHES.values()]
ALL_TRAITS: Traits = {value: trait for traits in TABLES for value, trait in traits.items()}
PLAIN_WORDS = sorted({v for d in DOMAINS.values() for v in (*d[1], *(v for traits in d[2].values() for v in traits))})
CLOTHES_WORDS = sorted(
    {*(v for traits in CLOTHES.values() for v in traits), *(n for ns in GARMENTS.values() for n in ns)}
)
PLAIN_KEYS = sorted({k for d in DOMAINS.values() for k in (d[0], *d[2])})


def row(prompt: str, response: str, history: list[list[str]] | None = None) -> Row:
    """One pretraining row in the shape that the toolkit itself reads."""
    return {"prompt": prompt, "response": response, "history": history or []}


def shown(pairs: Pairs) -> str:
    """A list as it is written in prompts."""
    return "*".join(f"{k}#{v}" for k, v in pairs)


@dataclass
class Style:
    """A way of writing: for every key a clause around the value, how the text opens, joins and ends."""

    rng: random.Random
    opening: str = ""
    ending: str = ""
    traits: float = 0.6
    clauses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.opening = self.rng.choice(["", *OPENINGS, *OPENINGS])
        self.ending = self.rng.choice(["", *ENDINGS, *ENDINGS, *ENDINGS])

    def clause(self, key: str) -> str:
        """The template of `key`'s clause, decided once per style."""
        if key not in self.clauses:
            rng = self.rng
            before = rng.choice(BEFORE) if rng.random() < 0.6 else rng.choice(["", key, f"{key}是", f"{key}处的"])
            after = rng.choice(AFTER) if rng.random() < 0.65 else rng.choice(["", "的" + key, key])
            clause = before + "{v}" + after
            if rng.random() < self.traits:
                clause += rng.choice(["{t}", "，{t}", "，{t}"])
            self.clauses[key] = clause
        return self.clauses[key]

    def write(self, pairs: Pairs) -> str:
        """Render a list; the first pair is the name of the thing."""
        parts = [self.clause(k).format(v=v, t=ALL_TRAITS.get(v, "很好")) for k, v in pairs[1:]]
        if self.ending:
            parts.append(self.ending)
        return self.opening + pairs[0][1] + "，".join(parts) + "。"


NAMED_STYLES = ["热情", "平静", "古风", "口语", "新闻", "童话", "诗意", "推销"]


def named_style(name: str, domain: str) -> Style:
    """The fixed meaning of a style's name: the same for every row, so the base has to remember it."""
    return Style(random.Random(f"style:{name}:{domain}"), traits=0.9)


def pairs_of(rng: random.Random, domain: str, low: int = 2, high: int = 5) -> Pairs:
    """A random list of one domain, its name first, the other keys in their usual order."""
    name_key, names, keys = DOMAINS[domain]
    chosen = set(rng.sample(list(keys), rng.randint(low, min(high, len(keys)))))
    return [(name_key, rng.choice(names))] + [(k, rng.choice(list(keys[k]))) for k in keys if k in chosen]


def some_words(rng: random.Random, count: int) -> list[str]:
    """Words to copy around: half of the time words about clothes, so that the base can handle them like any other."""
    return rng.sample(CLOTHES_WORDS if rng.random() < 0.5 else PLAIN_WORDS, count)


def mixed_pairs(rng: random.Random, keys: list[str]) -> Pairs:
    """A list whose values have nothing to do with its keys: only copying can render it."""
    return list(zip(keys, some_words(rng, len(keys)), strict=True))


def by_named_style(rng: random.Random) -> Row:
    domain, name = rng.choice(list(DOMAINS)), rng.choice(NAMED_STYLES)
    pairs = pairs_of(rng, domain)
    ask = rng.choice(["用{s}的语气介绍：{x}", "{x}\n请写得{s}一些", "以{s}风格写一段话：{x}", "{s}风格：{x}"])
    return row(ask.format(s=name, x=shown(pairs)), named_style(name, domain).write(pairs))


def by_examples(rng: random.Random) -> Row:
    """Earlier turns are worked examples of a style that exists in this row only."""
    style = Style(random.Random(rng.random()))
    count = rng.choice([1, 2, 2, 3])
    if rng.random() < 0.5:
        domain = rng.choice(list(DOMAINS))
        lists = [pairs_of(rng, domain, 2, 4) for _ in range(count + 1)]
    else:
        keys = rng.sample(PLAIN_KEYS, 5)
        lists = []
        for _ in range(count + 1):
            kept = set(rng.sample(keys, rng.randint(3, 4)))
            lists.append(mixed_pairs(rng, [k for k in keys if k in kept]))
    head = rng.choice(["", "", "", "介绍：", "写一写："])
    turns = [[head + shown(p), style.write(p)] for p in lists]
    return row(turns[-1][0], turns[-1][1], turns[:-1])


def by_template(rng: random.Random) -> Row:
    """The style is spelled out in the question itself."""
    domain = rng.choice(list(DOMAINS))
    mixed = mixed_pairs(rng, [DOMAINS[domain][0], *rng.sample(PLAIN_KEYS, rng.randint(2, 4))])
    pairs = mixed if rng.random() < 0.4 else pairs_of(rng, domain, 2, 4)
    style = Style(random.Random(rng.random()), traits=0.5)
    rules = [style.clause(k).replace("{v}", "某").replace("{t}", "如何") for k, _ in pairs[1:]]
    spec = style.opening + "某" + "，".join([*rules, *([style.ending] if style.ending else [])]) + "。"
    ask = rng.choice(["照这个写：{r}\n内容：{x}", "内容：{x}\n写法：{r}", "模板：{r}\n{x}"])
    return row(ask.format(r=spec, x=shown(pairs)), style.write(pairs))


def plain(rng: random.Random) -> Row:
    pairs = pairs_of(rng, rng.choice(list(DOMAINS)))
    kind = rng.random()
    if kind < 0.5:
        text = "，".join(f"{k}是{v}" for k, v in pairs) + "。"
        return row(rng.choice(["写成一句话：", "把下面的信息连成句子：", "念出来："]) + shown(pairs), text)
    text = "；".join(f"{v}{ALL_TRAITS[v]}" for _, v in pairs[1:]) + "。"
    return row(rng.choice(["说说各项的特点：", "逐项评价："]) + shown(pairs), text)


def bare(rng: random.Random) -> Row:
    """A list with no request: the base just says which fields it sees. This is what the untuned model does."""
    domain = rng.choice(list(DOMAINS))
    pairs = pairs_of(rng, domain) if rng.random() < 0.6 else mixed_pairs(rng, rng.sample(PLAIN_KEYS, rng.randint(3, 6)))
    return row(shown(pairs), f"一共{len(pairs)}项：" + "、".join(k for k, _ in pairs) + "。")


def lookup(rng: random.Random) -> Row:
    keys = rng.sample(PLAIN_KEYS, rng.randint(3, 6))
    pairs = mixed_pairs(rng, keys)
    k, v = rng.choice(pairs)
    kind = rng.randrange(4)
    if kind == 0:
        return row(f"{shown(pairs)}\n{k}是什么？", f"{k}是{v}。")
    if kind == 1:
        return row(f"哪一项是{v}？{shown(pairs)}", f"{k}是{v}。")
    if kind == 2:
        return row(f"列出所有的值：{shown(pairs)}", "、".join(v for _, v in pairs) + "。")
    i = rng.randrange(len(pairs))
    return row(f"{shown(pairs)}\n第{i + 1}项是什么？", f"第{i + 1}项，{pairs[i][0]}是{pairs[i][1]}。")


def traits(rng: random.Random) -> Row:
    """Plain questions about one value: what the base knows of the world, clothes included."""
    topics = CLOTHES if rng.random() < 0.75 else rng.choice(list(DOMAINS.values()))[2]
    topic = rng.choice(list(topics))
    some = rng.sample(list(topics[topic].items()), rng.randint(1, min(4, len(topics[topic]))))
    value, trait = some[0]
    kind = rng.randrange(6)
    if kind == 0:
        ask = rng.choice(["{v}怎么样？", "{v}有什么特点？", "请评价{v}", "谈谈{v}"])
        return row(ask.format(v=value), f"{value}{trait}。")
    if kind == 1:
        return row(f"哪种{topic}{trait}？", f"{value}{trait}。")
    if kind == 2:
        return row(f"形容一下{value}", f"{trait}。")
    if kind == 3:
        words = [v for v, _ in some]
        return row("分别说说" + "、".join(words), "，".join(f"{v}{t}" for v, t in some) + "。")
    if kind == 4:
        history = [[v, t + "。"] for v, t in some[1:]]
        return row(value, trait + "。", history)
    return row(f"{value}是不是{trait}？", f"是的，我觉得{value}{trait}。")


TASKS: list[tuple[Callable[[random.Random], Row], float]] = [
    (by_examples, 28),
    (by_template, 12),
    (by_named_style, 10),
    (plain, 5),
    (bare, 5),
    (lookup, 8),
    (traits, 12),
]
