"""Write the demo's dialogue rows: data/dialogue/{train,dev}.json.

Conversations with the assistant of a clothes shop, one row per final turn: prompt, response, and the earlier turns as
history. What the customer said before (name, height, budget, order number, chosen garment) is needed for most answers,
so a model that ignores the history scores visibly worse. All text is ours.

    python data/recipe/dialogue.py            # rewrites both files, the same bytes every time
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import splits

SEED = 20230626
TRAIN_ROWS, DEV_ROWS = 600, 60

Turn = list[str]
Row = dict[str, str | list[Turn]]

NAMES = ["小明", "小红", "小丽", "小刚", "阿强", "小芳", "小张", "小陈", "小雨", "小林"]
GARMENTS = ["衬衫", "卫衣", "外套", "毛衣", "风衣", "长裙", "短裙", "连衣裙", "牛仔裤", "阔腿裤"]
COLOURS = ["白色", "黑色", "红色", "蓝色", "粉色", "绿色", "灰色"]
CITIES = {"北京": 3, "上海": 2, "广州": 2, "成都": 4, "杭州": 1, "西安": 4, "南京": 2, "昆明": 5}
SIZES = [(160, "小号"), (170, "中号"), (180, "大号"), (200, "加大号")]
HELLO = [("你好", "你好，欢迎光临，请问想看点什么？"), ("在吗", "在的，请问有什么可以帮你？")]


def size_of(height: int) -> str:
    """The shop's only rule about sizes."""
    return next(size for limit, size in SIZES if height < limit)


def sizes(rng: random.Random) -> tuple[list[Turn], Turn]:
    """The size follows from a height told earlier."""
    height, garment = rng.randint(150, 189), rng.choice(GARMENTS)
    history = [[f"我身高{height}", f"好的，记下了，身高{height}。"]]
    if rng.random() < 0.5:
        history.append([f"我想买{garment}", f"好的，这款{garment}很受欢迎。"])
    return history, [f"{garment}选几号？", f"你身高{height}，{garment}推荐选{size_of(height)}。"]


def delivery(rng: random.Random) -> tuple[list[Turn], Turn]:
    """The days follow from a city told earlier."""
    city, garment = rng.choice(list(CITIES)), rng.choice(GARMENTS)
    history = [[f"我要买{garment}，送到{city}", f"好的，{garment}可以送到{city}。"]]
    if rng.random() < 0.3:
        new = rng.choice(list(CITIES))
        history.append([f"改一下，送到{new}", f"好的，改成{new}。"])
        city = new
    return history, ["几天能到？", f"送到{city}大约{CITIES[city]}天。"]


def order(rng: random.Random) -> tuple[list[Turn], Turn]:
    """The order number or the colour has to be copied from an earlier turn."""
    number, garment, colour = rng.randint(1000, 9999), rng.choice(GARMENTS), rng.choice(COLOURS)
    history = [[f"我的单号是{number}", f"看到了，是一件{colour}的{garment}。"]]
    if rng.random() < 0.5:
        return history, ["我买的是什么颜色？", f"你买的{garment}是{colour}的。"]
    history.append(["可以换吗？", "可以，七天内都能换。"])
    return history, ["那帮我换一件吧", f"好的，{number}号单的{garment}给你换一件。"]


def name(rng: random.Random) -> tuple[list[Turn], Turn]:
    """The name told first is needed at the end."""
    who, garment, colour = rng.choice(NAMES), rng.choice(GARMENTS), rng.choice(COLOURS)
    history = [[f"我是{who}", f"{who}你好，今天想看什么？"], [f"有没有{garment}？", f"有的，{garment}有{colour}。"]]
    return history, ["帮我留一件", f"好的，{who}，{colour}的{garment}为你留好了。"]


def price(rng: random.Random) -> tuple[list[Turn], Turn]:
    """A budget told earlier against a price asked for now."""
    budget, cost, garment = 50 * rng.randint(2, 10), 10 * rng.randint(6, 55), rng.choice(GARMENTS)
    history = [[f"我最多花{budget}元", f"好的，{budget}元以内有很多。"]]
    verdict = f"没有超出{budget}元，可以买。" if cost <= budget else f"超出{budget}元了，看看别的吧。"
    return history, [f"{garment}{cost}元，可以买吗？", f"{garment}{cost}元，{verdict}"]


SCENES: list[Callable[[random.Random], tuple[list[Turn], Turn]]] = [sizes, delivery, order, name, price]


def row(rng: random.Random) -> Row:
    """One conversation; one in four begins with a greeting."""
    history, (prompt, response) = rng.choice(SCENES)(rng)
    if rng.random() < 0.25:
        history.insert(0, list(rng.choice(HELLO)))
    return {"prompt": prompt, "response": response, "history": history}


def rows(count: int, seed: int = SEED) -> list[Row]:
    """`count` different rows."""
    rng = random.Random(seed)
    found: dict[str, Row] = {}
    while len(found) < count:
        one = row(rng)
        found.setdefault(json.dumps([one["history"], one["prompt"]]), one)
    return list(found.values())


if __name__ == "__main__":
    splits.main(__doc__, "dialogue", rows(TRAIN_ROWS + DEV_ROWS), TRAIN_ROWS)
