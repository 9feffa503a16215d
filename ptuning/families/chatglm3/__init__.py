"""ChatGLM3-6B and -32k: ChatGLM2's network with roles in its chat template and another rotary base."""
