"""Baichuan-13B, Baichuan2-13B and their 7B models, on transformers' own Llama."""
