"""GLM-130B's network (Zeng et al. 2022, arXiv:2210.02414) on transformers' base classes, under the official weight names.

What it has of its own: queries, keys and values in one matrix, head by head; rotary positions whose frequencies are rounded to
fp16; scores that are divided by the layer's number and multiplied back in fp32; DeepNorm residuals from behind the norm; GEGLU.
Measured against the official implementation: the largest logit difference is 0.0 in fp32 with eager attention (tests/golden).

Source: SwissArmyTransformer 0.2.12, `model/official/glm130B_model.py`. Shapes: B rows, S tokens, H heads, K key positions,
D head dimension.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import can_return_tuple

from ptuning.families.glm130b.config import GLM130BConfig
from ptuning.families.glm130b.context import blank_positions, context_lengths, open_context, real_positions

_HIDDEN = -10000.0  # what the official code puts in place of a score that isn't seen


@cache
def _frequencies(head_dim: int) -> torch.Tensor:
    """(D/2,) rounded to fp16, as the official constructor does whatever the weights are."""
    return (1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)).half()


def rotary(positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (B, S, D) each, for positions (B, S). In fp16 the angles are fp16 numbers too, as in the official code."""
    exact = torch.float16 if dtype == torch.float16 else torch.float32
    angle = positions[..., None].to(exact) * _frequencies(head_dim).to(positions.device, exact)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def eager_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The official arithmetic: query (B, H, S, D), key and value (B, H, K, D), a mask that is true where a query sees a key."""
    depth = module.layer_idx + 1  # keeps fp16 scores small
    scores = (query / (query.shape[-1] ** 0.5 * depth)) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, _HIDDEN)
    weights = (scores.float() * depth).softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GLM130BAttention(nn.Module):
    """Bidirectional or causal, as the mask says."""

    def __init__(self, config: GLM130BConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups, self.is_causal = 1, False  # what transformers' kernels ask
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        rows, length, _ = hidden_states.shape
        heads = self.query_key_value(hidden_states).view(rows, length, -1, 3 * self.head_dim).transpose(1, 2)
        query, key, value = heads.chunk(3, -1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        kernel: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        found, _ = kernel(self, query, key, value, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5, **kwargs)
        return self.dense(found.reshape(rows, length, -1))


class GLM130BFeedForward(nn.Module):
    """GEGLU: the first half of the rows times gelu of the second."""

    def __init__(self, config: GLM130BConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up, gate = self.dense_h_to_4h(hidden_states).chunk(2, -1)
        return self.dense_4h_to_h(up * nn.functional.gelu(gate))


class GLM130BLayer(GradientCheckpointingLayer):
    """DeepNorm (Wang et al. 2022, arXiv:2203.00555): the residual is the norm's output, √(2L) times."""

    def __init__(self, config: GLM130BConfig, layer_idx: int):
        super().__init__()
        self.residual = (2 * config.num_hidden_layers) ** 0.5
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GLM130BAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GLM130BFeedForward(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = hidden_states * self.residual + self.attention(hidden_states, **kwargs)
        hidden_states = self.post_attention_layernorm(hidden_states)
        return hidden_states * self.residual + self.mlp(hidden_states)


class GLM130BPreTrainedModel(PreTrainedModel):
    config_class = GLM130BConfig
    config: GLM130BConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GLM130BLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = (r"inv_freq", r"prefix_encoder\.")

    def _init_weights(self, module: nn.Module) -> None:
        """transformers', which would draw whole numbers anew where an offloaded quantised model lacks its tied output layer."""
        weight = getattr(module, "weight", None)
        if weight is None or weight.is_floating_point():
            super()._init_weights(module)


class GLM130BModel(GLM130BPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: GLM130BConfig):
        super().__init__(config)
        self.word_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLM130BLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments as of GLM130BForCausalLM."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None,  # equal ones would be taken for rows packed behind each other
            allow_is_causal_skip=False,
        )
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        lengths = torch.zeros(len(inputs_embeds), dtype=torch.long, device=inputs_embeds.device)
        if input_ids is not None and seen == 0:
            lengths = context_lengths(input_ids, self.config.token_ids)
        mask = open_context(mask, lengths)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, seen, inputs_embeds)
        hidden_states, embeddings = inputs_embeds, rotary(position_ids, self.config.head_dim, inputs_embeds.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.final_layernorm(hidden_states), past_key_values)

    def _positions(
        self, input_ids: torch.Tensor | None, mask: torch.Tensor | None, seen: int, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        if input_ids is not None and seen == 0:
            return blank_positions(input_ids, mask, self.config.token_ids)
        rows, length = inputs_embeds.shape[:2]
        whole = torch.zeros(rows, seen + length, dtype=torch.long, device=inputs_embeds.device)
        return real_positions(mask, whole)[:, seen : seen + length]


class GLM130BForCausalLM(GLM130BPreTrainedModel, GenerationMixin):
    """With the output layer, which is the embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: GLM130BConfig):
        super().__init__(config)
        self.transformer = GLM130BModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S, V), and the loss on labels.

        Args:
            input_ids: (B, S): context with a blank, sop, what is written (context.py). Mask and positions are found in them.
            attention_mask: (B, S) or with the cache's length, 1 = real token.
            position_ids: (B, S). A call that goes on with a cache must give them where the blank is a short one, since it can't
                see it; `generate` does.
            labels: (B, S), -100 where there is no loss.
            logits_to_keep: of how many last positions, or of which; 0: of all.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """The base class's, with positions found in the whole rows: a step that goes on with a cache doesn't see the blank."""
        if kwargs.get("inputs_embeds") is None:
            mask = kwargs.get("attention_mask")
            kwargs["position_ids"] = blank_positions(input_ids, mask, self.config.token_ids)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)
