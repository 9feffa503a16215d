"""Looks at vLLM and at what is to be served, and puts the two together."""

import logging
from pathlib import Path

from ptuning.checkpoint.base import base_fingerprint, resolve_base
from ptuning.errors import ConfigError
from ptuning.families import read_config
from ptuning.generation.vllm.check import check_folder
from ptuning.generation.vllm.replicas import Replicas, headers
from ptuning.loading import load_template
from ptuning.serving.access import Metrics
from ptuning.serving.backend import Served
from ptuning.serving.models import Registry
from ptuning.serving.options import OUTPUT, ServeOptions
from ptuning.serving.vllm.backend import VllmBackend
from ptuning.serving.vllm.names import NameTable, put

log = logging.getLogger("ptuning.serving")


def build_vllm(options: ServeOptions) -> tuple[VllmBackend, Metrics]:
    """Looks at vLLM and stores the prefixes; what is returned hasn't started.

    Raises:
        PTuningError: vLLM doesn't answer or would answer wrong; a prefix can't be used.
    """
    replicas = Replicas(options.vllm_url or (), headers(options.vllm_key))
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
    names.sweep()
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
