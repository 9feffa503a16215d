"""Describes the prefix on a model, for its checkpoint."""

from pathlib import Path

from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.template import NAME
from ptuning.checkpoint.description import BaseDescription, PrefixDescription
from ptuning.checkpoint.fingerprint import base_fingerprint
from ptuning.errors import CheckpointError
from ptuning.runs.files import versions


def describe_prefix(
    model: ChatGLMForConditionalGeneration,
    model_name_or_path: str | Path,
    *,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    source_prefix: str = "",
    loss_on: str = "last",
) -> PrefixDescription:
    """The description of the attached prefix, with the base's fingerprint read from its files.

    Args:
        model: a base with a prefix attached.
        model_name_or_path: where the base was loaded from.

    Raises:
        CheckpointError: no prefix is attached.
        ModelError: the base's files can't be read.
    """
    encoder = model.prefix_encoder
    if encoder is None:
        raise CheckpointError("the model has no prefix to describe; call model.attach_prefix(pre_seq_len) first.")
    shape = encoder.shape
    local = Path(model_name_or_path).expanduser()
    base = BaseDescription(
        # absolute, so that the checkpoint finds its base from any working directory
        name_or_path=str(local.resolve() if local.is_dir() else model_name_or_path),
        fingerprint=base_fingerprint(model_name_or_path),
        num_layers=shape.num_layers,
        multi_query_group_num=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        hidden_size=shape.hidden_size,
    )
    return PrefixDescription(
        pre_seq_len=encoder.pre_seq_len,
        prefix_projection=encoder.prefix_projection,
        base=base,
        template=NAME,
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        source_prefix=source_prefix,
        loss_on=loss_on,
        dtype="float32",
        base_dtype=str(model.dtype).removeprefix("torch."),
        versions=versions(("ptuning", "torch", "transformers")),
    )
