"""ChatGLM2-6B and its relatives of the same architecture, on transformers' own GLM."""
