"""Model families: all that is particular about a kind of base model, one bundle each.

A family is told apart by what config.json says, never by a folder's name.
"""

from ptuning.families.baichuan.family import Baichuan
from ptuning.families.chatglm2.family import ChatGLM2
from ptuning.families.family import Dimensions, Family, add_family, families, family_of, read_config
from ptuning.families.glm130b.family import GLM130B
from ptuning.families.template import Dialogue, Encoded, Segment, Template, dialogue_of

__all__ = [
    "Dialogue",
    "Dimensions",
    "Encoded",
    "Family",
    "Segment",
    "Template",
    "add_family",
    "dialogue_of",
    "families",
    "family_of",
    "read_config",
]

add_family(ChatGLM2())
add_family(Baichuan())
add_family(GLM130B())
