"""vLLM as what computes, behind the same front: the table of names and the Backend, over ptuning/generation/vllm."""
