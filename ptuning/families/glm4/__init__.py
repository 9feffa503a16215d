"""GLM-4-9B in transformers' own format: its network, tokenizer and chat template as they are."""
