"""GLM-4-9B in its original format: ChatGLM2's network and keys, a tiktoken vocabulary, GLM-4's chat template."""
