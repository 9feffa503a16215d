"""The learned prefix of P-Tuning v2 (Liu et al. 2021, arXiv:2110.07602) exactly as ChatGLM2's official code computes it.

Shapes: T = pre_seq_len, L = layers, G = key/value groups, D = head dimension, B = batch rows.
Source: THUDM/chatglm2-6b `modeling_chatglm.py`, classes PrefixEncoder and ChatGLMModel.get_prompt.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from ptuning.families import family_of
from ptuning.methods.companion import Companion

DROPOUT = 0.1  # on the prefix keys and values while training, fixed in the official code

# One (key, value) pair a layer, each (B or 1, G, T, D). Keys carry no rotary embedding.
PrefixKeyValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class PrefixShape:
    """What a prefix needs to know of its base model.

    Args:
        num_layers: L.
        num_key_value_heads: G, `multi_query_group_num` in config.json.
        head_dim: D, `kv_channels` in config.json.
        hidden_size: width of the hidden layer of the projection.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "PrefixShape":
        """Of a base's configuration."""
        sizes = family_of(config).dimensions(config)
        return cls(sizes.layers, sizes.groups, sizes.head_dim, sizes.hidden)

    @property
    def width(self) -> int:
        """Numbers a prefix position has: L·2·G·D."""
        return self.num_layers * 2 * self.num_key_value_heads * self.head_dim


class PrefixEncoder(nn.Module):
    """Holds the prefix: an embedding (T, L·2·G·D), with `prefix_projection` followed by linear, tanh, linear.

    Parameters keep the official names (`embedding.weight`, `trans.0.*`, `trans.2.*`), the official initialisation
    (torch's own) and are fp32 whatever the base is; 16 bit would lose the small updates.

    Args:
        shape: the base model's shape.
        pre_seq_len: T.
        prefix_projection: the reparametrised variant.
    """

    def __init__(self, shape: PrefixShape, pre_seq_len: int, prefix_projection: bool = False):
        super().__init__()
        self.shape = shape
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        self.embedding = nn.Embedding(pre_seq_len, shape.width, dtype=torch.float32)
        if prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(shape.width, shape.hidden_size, dtype=torch.float32),
                nn.Tanh(),
                nn.Linear(shape.hidden_size, shape.width, dtype=torch.float32),
            )
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, batch_size: int, dtype: torch.dtype) -> PrefixKeyValues:
        """The prefix for a batch.

        Args:
            batch_size: B; each row gets its own dropout mask while training.
            dtype: of the keys and values the base computes.

        Returns:
            L pairs of (B, G, T, D) while training, of (1, G, T, D) otherwise.
        """
        # Through forward, not .weight: DeepSpeed gathers a partitioned parameter when its module is called.
        positions = torch.arange(self.pre_seq_len, device=self.embedding.weight.device)
        rows_TW = self.embedding(positions)
        if self.prefix_projection:
            rows_TW = self.trans(rows_TW)
        s = self.shape
        kv_TLGD = rows_TW.to(dtype).view(self.pre_seq_len, s.num_layers * 2, s.num_key_value_heads, s.head_dim)
        kv_LGTD = kv_TLGD.permute(1, 2, 0, 3).contiguous().unsqueeze(1)
        if self.training:
            kv_LGTD = self.dropout(kv_LGTD.expand(-1, batch_size, -1, -1, -1))
        layers = kv_LGTD.unbind(0)
        return list(zip(layers[0::2], layers[1::2], strict=True))

    def folded(self) -> "PrefixEncoder":
        """A plain prefix that gives what this one gives without dropout; its parameters must be whole."""
        plain = PrefixEncoder(self.shape, self.pre_seq_len)
        with torch.no_grad():
            rows_TW = self.embedding.weight
            plain.embedding.weight.copy_(self.trans(rows_TW) if self.prefix_projection else rows_TW)
        plain.dropout.p = self.dropout.p
        return plain

    def extra_repr(self) -> str:
        return f"pre_seq_len={self.pre_seq_len}, prefix_projection={self.prefix_projection}"


@dataclass(frozen=True, eq=False)
class Prefix(Companion):
    """The keys and values of a tuned prefix, ready to be put in front of a row's own.

    Args:
        name: for the caller; two prefixes are the same only if they are the same object.
        key_values: (L, 2, G, T, D), keys without rotary.
    """

    name: str
    key_values: torch.Tensor

    @classmethod
    def of(cls, name: str, encoder: PrefixEncoder, dtype: torch.dtype) -> "Prefix":
        """From a prefix encoder, without dropout, in the dtype that the base computes in."""
        was_training = encoder.training
        encoder.eval()
        with torch.no_grad():
            layers = encoder(1, dtype)
        encoder.train(was_training)
        return cls(name, torch.stack([torch.stack((key[0], value[0])) for key, value in layers]))

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.key_values.shape[3]
