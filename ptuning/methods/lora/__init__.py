"""LoRA: small factors beside frozen linear layers, by peft."""
