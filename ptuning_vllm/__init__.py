"""P-Tuning v2 prefixes in vLLM, chosen per request. Stands alone: imports neither ptuning nor, but in connector.py, vLLM.

    vllm serve MODEL --skip-tokenizer-init --enable-scale-out --kv-transfer-config '{"kv_connector": "PrefixConnector",
        "kv_connector_module_path": "ptuning_vllm.connector", "kv_role": "kv_consumer", "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"prefix_store": "DIR", "max_prefixes": 128}}'

A request (/inference/v1/generate) has T placeholders (id 0) in front of its prompt, `"kv_transfer_params": {"prefix": DIGEST,
"length": T}` and `"cache_salt": DIGEST`. DIR/DIGEST.safetensors is what `ptuning export --format vllm` writes.
"""
