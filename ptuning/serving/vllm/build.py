"""Looks at vLLM and at what is to be served, and puts the two together."""

import json
import logging
from pathlib import Path
from typing import Any

from ptuning.checkpoint.base import base_fingerprint, read_base_config, resolve_base
from ptuning.checkpoint.native import FINGERPRINT
from ptuning.errors import ConfigError
from ptuning.families import family_of, read_config
from ptuning.loading import load_template
from ptuning.serving.access import Metrics
from ptuning.serving.backend import Served
from ptuning.serving.models import Registry
from ptuning.serving.options import OUTPUT, ServeOptions
from ptuning.serving.vllm.backend import VllmBackend
from ptuning.serving.vllm.names import NameTable, put
from ptuning.serving.vllm.replicas import Replicas

log = logging.getLogger("ptuning.serving")


def build_vllm(options: ServeOptions) -> tuple[VllmBackend, Metrics]:
    """Looks at vLLM and stores the prefixes; what is returned hasn't started.

    Raises:
        PTuningError: vLLM doesn't answer or would answer wrong; a prefix can't be used.
    """
    headers = {} if options.vllm_key is None else {"Authorization": f"Bearer {options.vllm_key}"}
    replicas = Replicas(options.vllm_url, headers)
    about, template = replicas.describe(), load_template(options.model)
    fingerprint = base_fingerprint(options.model)
    check_folder(about["root"], fingerprint)
    store = Path(options.prefix_store or "").expanduser()
    names = NameTable(store, fingerprint)
    registry = Registry(options.model, names, options.served_model_name)

    def read(name: str, folder: str | Path) -> Served:
        return put(name, folder, options.model, store)

    if options.prefix is not None:
        registry.add_named(options.prefix, read)
    else:
        registry.add_found(Path(OUTPUT), read)
    registry.check_aliases()
    most, base = about["max_model_len"], read_config(resolve_base(options.model)).max_position_embeddings
    longest = max((served.pre_seq_len for served in registry), default=0)
    context = min(base, most - longest)
    if context < 2:
        raise ConfigError(
            f"--vllm_url: vLLM was started with --max-model-len {most} and the longest prefix has {longest} positions; start it "
            f"with --max-model-len {base + longest}"
        )
    if context < base:
        log.warning("vLLM shortens the context", extra={"fields": {"context": context, "max_model_len": most}})
    metrics = Metrics()
    return VllmBackend(options, template, registry, names, replicas, (context, most), metrics), metrics


def check_folder(root: Any, fingerprint: str) -> None:
    """Refuses what vLLM would answer wrong with, as far as its folder can be seen from here.

    Args:
        root: the folder that vLLM says it has loaded.
        fingerprint: of --model.

    Raises:
        ConfigError: other weights, or a format that vLLM reads wrong without a word.
    """
    path = Path(root or "") / "config.json"
    if not path.is_file():
        log.warning(
            "vLLM's model can't be seen from here, so it isn't compared with --model", extra={"fields": {"root": root}}
        )
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    found = values.get(FINGERPRINT)
    if found is None:
        read_base_config(path.parent)
        config = read_config(path.parent)
        if (why := family_of(config).vllm_refusal(config)) is not None:
            raise ConfigError(
                f"vLLM has loaded {root}, and {why}; give it what ptuning export --format vllm makes of it"
            )
        found = base_fingerprint(path.parent)
    if found != fingerprint:
        raise ConfigError(
            f"vLLM has loaded {root} (fingerprint {found}), and --model has other weights (fingerprint {fingerprint}); give both "
            "the same model"
        )
