"""Ways to tune: a file each, known by the name in --method and in manifests."""

from ptuning.methods.companion import Companion
from ptuning.methods.full import FullMethod
from ptuning.methods.lora.method import LoraMethod
from ptuning.methods.lora_prefix import LoraPrefixMethod
from ptuning.methods.method import MemoryTerms, Method, SaveTarget, check_template
from ptuning.methods.prefix.method import PrefixMethod
from ptuning.methods.registry import (
    add_method,
    attach_checkpoint,
    attached,
    bare,
    base_of,
    defaults_of,
    detach,
    method_class,
    method_of,
    method_of_checkpoint,
    methods,
    read_checkpoint,
    store_checkpoint,
)
from ptuning.methods.self_test import self_test
from ptuning.methods.store import Stored

__all__ = [
    "Companion",
    "FullMethod",
    "LoraMethod",
    "LoraPrefixMethod",
    "MemoryTerms",
    "Method",
    "PrefixMethod",
    "SaveTarget",
    "Stored",
    "add_method",
    "attach_checkpoint",
    "attached",
    "bare",
    "base_of",
    "check_template",
    "defaults_of",
    "detach",
    "method_class",
    "method_of",
    "method_of_checkpoint",
    "methods",
    "read_checkpoint",
    "self_test",
    "store_checkpoint",
]
