"""Model families: all that is particular about a kind of base model, one bundle each.

A family is told apart by what config.json says, never by a folder's name.
"""

from ptuning.families.baichuan.family import Baichuan
from ptuning.families.chatglm2.family import ChatGLM2
from ptuning.families.chatglm3.family import ChatGLM3
from ptuning.families.chatglm4.family import ChatGLM4
from ptuning.families.family import Dimensions, Family, add_family, families, family_of, read_config
from ptuning.families.glm4.family import GLM4
from ptuning.families.glm130b.family import GLM130B
from ptuning.families.template import Dialogue, Encoded, Segment, Template, dialogue_of
from ptuning.families.turns import Offer, Part, Turn, arguments_text

__all__ = [
    "Dialogue",
    "Dimensions",
    "Encoded",
    "Family",
    "Offer",
    "Part",
    "Segment",
    "Template",
    "Turn",
    "add_family",
    "arguments_text",
    "dialogue_of",
    "families",
    "family_of",
    "read_config",
]

add_family(ChatGLM2())
add_family(Baichuan())
add_family(ChatGLM3())
add_family(GLM4())
add_family(ChatGLM4())
add_family(GLM130B())
