"""Serves one base and any number of tuned prefixes over HTTP: the REST contract of the official api.py, OpenAI's format, a page.

`backend.py` is the interface to what computes; `worker.py` is the one implementation, a thread around
ptuning.generation.Engine. The HTTP modules know only the interface.
"""
