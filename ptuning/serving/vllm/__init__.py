"""vLLM as what computes, behind the same front: its replicas, a request's stream, the table of names, the Backend."""
