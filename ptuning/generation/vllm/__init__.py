"""vLLM as what computes, over HTTP: its replicas, who of them is asked, a request's stream, a Generator. Serving and evaluation
share it."""
