"""Write the demo's advertisement rows: data/advertise/{train,dev}.json.

The rows have the shape of ADGEN (content: ``key#value*key#value``, summary: advertisement copy) and none of its text:
every word below is ours. A summary walks through the attributes in the order of the list, and the wording of a clause
is decided by its attribute, with a less usual second wording now and then. So most of a summary can be predicted from
its content, which is what lets a BLEU score on a small development set say something about what a model has learned.

    python data/recipe/advertise.py            # rewrites both files, the same bytes every time
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import splits

SEED = 20230625
TRAIN_ROWS, DEV_ROWS = 5000, 320
USUAL = 0.8  # share of clauses that take the usual wording of their attribute

# value -> what the copy says about it
MATERIALS = {
    "棉布": "舒服自在",
    "牛仔布": "耐穿有型",
    "蕾丝": "浪漫唯美",
    "针织": "温柔细腻",
    "雪纺": "轻薄凉快",
    "羊毛": "保暖厚重",
    "亚麻": "清凉透气",
    "丝绸": "光彩照人",
}
COLOURS = {
    "白色": "清新自然",
    "黑色": "显得高级",
    "红色": "热烈亮丽",
    "蓝色": "安静清凉",
    "粉色": "甜美动人",
    "绿色": "青春自然",
    "黄色": "温暖明快",
    "灰色": "沉稳耐看",
}
STYLES = {
    "简约": "干练利落",
    "复古": "韵味十足",
    "甜美": "俏皮可爱",
    "休闲": "自在随性",
    "文艺": "安静雅致",
    "清新": "自然舒服",
    "街头": "个性张扬",
    "优雅": "端庄大气",
}
PATTERNS = {
    "条纹": "拉长线条",
    "格子": "经典耐看",
    "碎花": "浪漫清新",
    "波点": "活泼灵动",
    "刺绣": "精致细腻",
    "字母": "年轻时髦",
    "卡通": "童趣满满",
    "印花": "丰富层次",
}
CUTS = {"宽松": "遮住小肉肉", "显瘦": "修饰身材", "修身": "勾勒曲线", "直筒": "舒适不紧绷"}
TOPS = ["衬衫", "卫衣", "外套", "毛衣", "风衣", "西装", "马甲", "夹克"]
COLLARS = {"圆领": "简单舒适", "翻领": "显得精神", "高领": "保暖挡风", "立领": "干净利落", "方领": "露出锁骨"}
SLEEVES = {"泡泡袖": "甜美减龄", "喇叭袖": "飘逸灵动", "灯笼袖": "遮住手臂", "插肩袖": "活动自如"}
TOP_DETAILS = {
    "口袋": "方便实用",
    "拉链": "穿脱方便",
    "纽扣": "精巧别致",
    "抽绳": "调节松紧",
    "连帽": "防风保暖",
    "流苏": "随风摆动",
}
SKIRTS = ["百褶裙", "鱼尾裙", "背带裙", "蓬蓬裙", "连衣裙", "半身裙", "吊带裙", "牛仔裙"]
SKIRT_LENGTHS = {"长裙": "飘逸大气", "短裙": "青春活力", "中长裙": "端庄得体", "超短裙": "秀出长腿"}
WAISTS = {"高腰": "拉长双腿", "松紧腰": "穿着自如", "收腰": "突出腰线", "系带": "调节松紧"}
HEMS = {"荷叶边": "层次丰富", "开叉": "方便走动", "花边": "甜美可人", "弧形": "线条流畅", "不规则": "个性十足"}
TROUSERS = ["阔腿裤", "直筒裤", "小脚裤", "哈伦裤", "工装裤", "运动裤", "喇叭裤", "牛仔裤"]
TROUSER_LENGTHS = {"长裤": "四季都能穿", "短裤": "清凉舒爽", "九分裤": "露出脚踝", "七分裤": "轻便凉快"}
TROUSER_ENDS = {"卷边": "随性时髦", "毛边": "个性十足", "束脚": "利落有型", "开叉": "方便走动"}


@dataclass(frozen=True)
class Attribute:
    """One attribute of a garment: its values with what is said of each, and its usual and its other wording."""

    key: str
    values: dict[str, str]
    usual: str
    other: str

    def clause(self, value: str, rng: random.Random) -> str:
        """The clause that realises `value`; it always names the value and what is said of it."""
        template = self.usual if rng.random() < USUAL else self.other
        return template.format(v=value, t=self.values[value])


@dataclass(frozen=True)
class Garment:
    """A kind of garment: which key names its cut, which attributes it can have, and how its copy opens and ends."""

    kind: str
    noun_key: str
    nouns: list[str]
    attributes: list[Attribute]
    openings: tuple[str, str]
    endings: tuple[str, str]


MATERIAL = Attribute("材质", MATERIALS, "选用优质的{v}面料，{t}", "精选{v}面料，上身{t}")
COLOUR = Attribute("颜色", COLOURS, "{v}的配色{t}", "整体以{v}为主，{t}")
STYLE = Attribute("风格", STYLES, "展现出{v}的气质，{t}", "充满{v}的韵味，{t}")
PATTERN = Attribute("图案", PATTERNS, "点缀着{v}图案，{t}", "饰以{v}元素，{t}")
CUT = Attribute("版型", CUTS, "{v}的版型{t}", "{v}的剪裁，{t}")

GARMENTS = [
    Garment(
        "上衣",
        "衣样式",
        TOPS,
        [
            MATERIAL,
            COLOUR,
            STYLE,
            PATTERN,
            CUT,
            Attribute("衣领型", COLLARS, "{v}的领口设计{t}", "领口是{v}，{t}"),
            Attribute("衣袖型", SLEEVES, "搭配{v}，{t}", "袖子是{v}，{t}"),
            Attribute("衣款式", TOP_DETAILS, "还有{v}的细节，{t}", "加上{v}，{t}"),
        ],
        ("这款{v}", "这件{v}"),
        ("日常出门随手一穿就很好看。", "怎么搭配都好看。"),
    ),
    Garment(
        "裙",
        "裙型",
        SKIRTS,
        [
            MATERIAL,
            COLOUR,
            STYLE,
            PATTERN,
            CUT,
            Attribute("裙长", SKIRT_LENGTHS, "{v}的长度{t}", "做成{v}，{t}"),
            Attribute("裙腰型", WAISTS, "{v}的腰部设计{t}", "腰部是{v}，{t}"),
            Attribute("裙下摆", HEMS, "裙摆处的{v}{t}", "下摆是{v}，{t}"),
        ],
        ("这款{v}", "这条{v}"),
        ("让你成为人群中的焦点。", "走起路来格外迷人。"),
    ),
    Garment(
        "裤",
        "裤型",
        TROUSERS,
        [
            MATERIAL,
            COLOUR,
            STYLE,
            PATTERN,
            CUT,
            Attribute("裤长", TROUSER_LENGTHS, "{v}的长度{t}", "做成{v}，{t}"),
            Attribute("裤腰型", WAISTS, "{v}的腰部设计{t}", "腰部是{v}，{t}"),
            Attribute("裤口", TROUSER_ENDS, "裤脚处的{v}{t}", "裤口是{v}，{t}"),
        ],
        ("这款{v}", "这条{v}"),
        ("上班逛街都能轻松驾驭。", "让你走出自信的步伐。"),
    ),
]


def row(rng: random.Random) -> dict[str, str]:
    """One advertisement: a garment with three to five attributes, and copy that realises each of them in order."""
    garment = rng.choice(GARMENTS)
    noun = rng.choice(garment.nouns)
    chosen = set(rng.sample(range(len(garment.attributes)), rng.choice([3, 4, 4, 5])))
    pairs = [("类型", garment.kind), (garment.noun_key, noun)]
    clauses = []
    for i in sorted(chosen):
        attribute = garment.attributes[i]
        value = rng.choice(list(attribute.values))
        pairs.append((attribute.key, value))
        clauses.append(attribute.clause(value, rng))
    opening = garment.openings[0 if rng.random() < USUAL else 1].format(v=noun)
    ending = garment.endings[0 if rng.random() < USUAL else 1]
    return {
        "content": "*".join(f"{key}#{value}" for key, value in pairs),
        "summary": opening + "，".join(clauses) + "，" + ending,
    }


def rows(count: int, seed: int = SEED) -> list[dict[str, str]]:
    """`count` rows with no content twice, so that a development row is never a training row too."""
    rng = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        one = row(rng)
        found.setdefault(one["content"], one)
    return list(found.values())


if __name__ == "__main__":
    splits.main(__doc__, "advertise", rows(TRAIN_ROWS + DEV_ROWS), TRAIN_ROWS)
