"""A checkpoint with all weights tuned: a complete model folder in the official format that also says what it is."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.chatglm2.template import NAME
from ptuning.families.chatglm2.weights import official_sources
from ptuning.checkpoint.base_folder import EMBEDDING
from ptuning.checkpoint.fingerprint import base_fingerprint
from ptuning.checkpoint.partitioned import gathered, whole_shape
from ptuning.runs.files import version_of, versions, write_atomically
from ptuning.checkpoint.shards import Layout
from ptuning.errors import CheckpointError

FILE = "ptuning_full.json"
FORMAT = "ptuning-full"
FORMAT_VERSION = 1

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


@dataclass(frozen=True)
class FullDescription:
    """What a fully tuned model says of itself in `ptuning_full.json`.

    Args:
        base_name_or_path: the model it was trained from.
        base_fingerprint: of that model's weights.
        template: ptuning.families.chatglm2.template.NAME when it was trained.
        max_source_length: tokens of the prompt in training.
        max_target_length: tokens of the answer in training.
        source_prefix: text in front of every prompt.
        loss_on: `last` answer or `all`.
        step: optimizer steps taken, None = unknown.
        versions: of ptuning, torch, transformers and python.
    """

    base_name_or_path: str
    base_fingerprint: str
    template: str = NAME
    max_source_length: int | None = None
    max_target_length: int | None = None
    source_prefix: str = ""
    loss_on: str = "last"
    step: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        values = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self)
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def describe_full(model_name_or_path: str | Path, **training) -> FullDescription:
    """The description of a run that tunes all weights.

    Args:
        model_name_or_path: the base; its fingerprint is read from its files.
        **training: max_source_length, max_target_length, source_prefix, loss_on.

    Raises:
        ModelError: the base's files can't be read.
    """
    local = Path(model_name_or_path).expanduser()
    return FullDescription(
        base_name_or_path=str(local.resolve() if local.is_dir() else model_name_or_path),
        base_fingerprint=base_fingerprint(model_name_or_path),
        versions=versions(("ptuning", "torch", "transformers")),
        **training,
    )


def read_full(folder: str | Path) -> FullDescription | None:
    """The description in a model folder, None where it has none (any other base).

    Raises:
        CheckpointError: damaged, of a newer version, or trained with another prompt template.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        found = values.pop("format")
        if found == FORMAT and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version is {version}, and this ptuning ({version_of('ptuning')}) reads up to {FORMAT_VERSION}; "
                "install a newer one."
            )
        known = {key: value for key, value in values.items() if key in FullDescription.__dataclass_fields__}
        description = FullDescription(**known)
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise CheckpointError(f"{path}: can't be read ({cause!r}); the checkpoint is damaged.") from cause
    if found != FORMAT:
        raise CheckpointError(f"{path}: format is {found!r}, expected {FORMAT!r}.")
    if description.template != NAME:
        raise CheckpointError(
            f"{folder}: was trained with the prompt template {description.template!r}, and this package builds prompts with "
            f"{NAME!r}; answers would be off."
        )
    return description


def official_layout(parameters: Mapping[str, nn.Parameter], config: ChatGLMConfig) -> Layout:
    """Official tensor names with shapes and dtypes of a model, in the order in which `official_tensors` gives them."""
    layout = {}
    for official, names in official_sources(parameters).items():
        shapes = [whole_shape(parameters[name]) for name in names]
        rows = sum(shape[0] for shape in shapes)
        layout[official] = ((rows, *shapes[0][1:]), parameters[names[0]].dtype)
        if official == EMBEDDING:
            layout[INV_FREQ] = (tuple(inverse_frequencies(config).shape), parameters[names[0]].dtype)
    return layout


def official_tensors(
    parameters: Mapping[str, nn.Parameter], config: ChatGLMConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors with their official names, one after the other. Under ZeRO-3 each is gathered for its turn alone;
    all processes must iterate to the end, together."""
    for official, names in official_sources(parameters).items():
        parts = [parameters[name] for name in names]
        with gathered(parts), torch.no_grad():
            yield official, torch.cat([part.detach() for part in parts]) if len(parts) > 1 else parts[0].detach()
        if official == EMBEDDING:
            yield INV_FREQ, inverse_frequencies(config).to(parts[0].dtype)


def inverse_frequencies(config: ChatGLMConfig) -> torch.Tensor:
    """The buffer that official checkpoints hold beside the weights: (D/4,) of a head dimension D, before any rope_ratio."""
    half = config.head_dim // 2
    return 1.0 / (10000 ** (torch.arange(0, half, 2, dtype=torch.float32) / half))


def write_beside(folder: Path, config: ChatGLMConfig, dtype: torch.dtype, description: FullDescription | None) -> None:
    """config.json in official names, and the description; each replaced in one step.

    Args:
        dtype: of the weights written.
    """
    written = copy.deepcopy(config)
    written.dtype = dtype
    text = json.dumps(written.to_diff_dict(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    if description is not None:
        body = description.to_json()
        write_atomically(folder / FILE, lambda path: path.write_text(body, encoding="utf-8"))
