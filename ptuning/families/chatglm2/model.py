"""ChatGLM2 as transformers' own GlmForCausalLM: the official class name, and the official weight names in both directions.

Measured against the official implementation: the largest logit difference is 0.0 (see tests/golden). Nothing of the
network is written again here.
"""

from collections.abc import Iterable

from transformers import GlmForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.positions import CountsRealTokens


class ChatGLMForConditionalGeneration(CountsRealTokens, GlmForCausalLM):
    """The official class name, so that `architectures` in config.json means the same on both sides."""

    config_class = ChatGLMConfig
    _keys_to_ignore_on_load_unexpected = (r"rotary_pos_emb\.inv_freq", r"prefix_encoder\.")


# official name -> GlmForCausalLM's name, matched anywhere in a key
_RENAMED = {
    r"transformer\.embedding\.word_embeddings\.": "model.embed_tokens.",
    r"transformer\.encoder\.final_layernorm\.": "model.norm.",
    r"transformer\.output_layer\.": "lm_head.",
    r"transformer\.encoder\.layers\.": "model.layers.",
    r"\.self_attention\.dense\.": ".self_attn.o_proj.",
    r"\.mlp\.dense_h_to_4h\.": ".mlp.gate_up_proj.",
    r"\.mlp\.dense_4h_to_h\.": ".mlp.down_proj.",
}


def register_weight_names(model_type: str) -> None:
    """Declares the mapping for `model_type`. `self_attention.query_key_value` has the rows of q, k and v stacked."""
    mapping = [WeightRenaming(source, target) for source, target in _RENAMED.items()]
    mapping.append(
        WeightConverter(
            "self_attention.query_key_value",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            [Split(0)],
        )
    )
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def official_sources(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Official tensor name → names of the model's tensors whose rows, stacked, are that tensor.

    For code that streams tensors one by one, where transformers' own conversion holds many at once.

    Args:
        names: of the base's parameters, without what a method has added.
    """
    native = {target: source.replace("\\", "") for source, target in _RENAMED.items()}
    sources = {}
    for name in names:
        official = name
        for target, source in native.items():
            official = official.replace(target, source)
        if ".self_attn.q_proj." in name:
            parts = tuple(name.replace(".q_proj.", f".{part}_proj.") for part in "qkv")
            sources[official.replace(".self_attn.q_proj.", ".self_attention.query_key_value.")] = parts
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            sources[official] = (name,)
    return sources
