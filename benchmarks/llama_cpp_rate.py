"""llama.cpp's rates on random Q4_0 weights, for cpu_serving.py. Runs in an environment of its own: llama-cpp-python, gguf.

    python benchmarks/llama_cpp_rate.py OPTIONS_AS_JSON FILE.gguf      writes the file if it isn't there; else follows orders, a
                                                                       JSON line each, and answers each by one

As `llama-quantize … q4_0` has it: layers and embedding Q4_0, output layer Q6_K, norms and biases fp32. Attention as in the official
ChatGLM2 (llama.cpp's `chatglm`), without a vocabulary.
"""

import json
import resource
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

Q4, Q6 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q6_K


def blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random numbers of one matrix (rows, bytes of a row), with a scale that keeps a layer's output of ordinary size."""
    wide, size = gguf.GGML_QUANT_SIZES[kind]
    found = np.random.default_rng(0).integers(0, 256, (rows, columns // wide, size), dtype=np.uint8)
    place = slice(0, 2) if kind == Q4 else slice(size - 2, size)
    found[..., place] = np.array([0.004 if kind == Q4 else 2e-5], dtype=np.float16).view(np.uint8)
    return found.reshape(rows, -1)


def write(path: Path, shape: dict) -> None:
    """Every layer has the same numbers: what is in memory meanwhile is one of them."""
    hidden, heads, groups, ffn = shape["hidden"], shape["heads"], shape["groups"], shape["ffn"]
    head = hidden // heads
    attention = (heads + 2 * groups) * head
    writer = gguf.GGUFWriter(path, "chatglm")
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(shape["layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape["vocab"])
    writer.add_tokenizer_model("no_vocab")
    norm = np.ones(hidden, dtype=np.float32)
    of_layer = {
        "attn_norm": (norm, None),
        "attn_qkv": (blocks(Q4, attention, hidden), Q4),
        "attn_output": (blocks(Q4, hidden, hidden), Q4),
        "ffn_norm": (norm, None),
        "ffn_up": (blocks(Q4, 2 * ffn, hidden), Q4),
        "ffn_down": (blocks(Q4, hidden, ffn), Q4),
    }
    writer.add_tensor("token_embd.weight", blocks(Q4, shape["vocab"], hidden), raw_dtype=Q4)
    for layer in range(shape["layers"]):
        for name, (numbers, kind) in of_layer.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", numbers, raw_dtype=kind)
        writer.add_tensor(f"blk.{layer}.attn_qkv.bias", np.zeros(attention, dtype=np.float32))
    writer.add_tensor("output_norm.weight", norm)
    writer.add_tensor("output.weight", blocks(Q6, shape["vocab"], hidden), raw_dtype=Q6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A loaded file; `decode` computes tokens of rows side by side.

    Args:
        rows: at most.
        columns: of a row's cache.
        clock: wall or cpu.
    """

    def __init__(self, path: Path, rows: int, columns: int, threads: int, clock: str):
        self.clock = time.process_time if clock == "cpu" else time.perf_counter
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = rows * columns, 512, rows
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise SystemExit(f"llama.cpp can't load {path}")

    def decode(self, tokens: list[tuple[int, int, int]]) -> float:
        """Seconds for these (row, position, token), with logits of each row's last."""
        last = {row: index for index, (row, _, _) in enumerate(tokens)}
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, (row, position, token) in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = last[row] == index
        started = self.clock()
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp can't compute the batch")
        llama_cpp.llama_synchronize(self.context)
        seconds = self.clock() - started
        llama_cpp.llama_batch_free(batch)
        return seconds

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)


def main() -> None:
    options, path = json.loads(sys.argv[1]), Path(sys.argv[2])
    if not path.exists():
        write(path, options["shape"])
        return
    vocab, rows, position = options.pop("shape")["vocab"], 0, 0
    model = Model(path, **options)
    print("[]", flush=True)  # loaded
    for line in sys.stdin:
        order = json.loads(line)
        if "prompt" in order:
            model.forget()
            tokens = [(0, place, 3 + place % (vocab - 3)) for place in range(order["prompt"])]
            answer = [len(tokens) / model.decode(tokens)]
        elif "rows" in order:
            model.forget()
            rows, position = order["rows"], order["length"]
            for row in range(rows):
                model.decode([(row, place, 3 + (row + place) % (vocab - 3)) for place in range(position)])
            answer = []
        elif "steps" in order:
            answer = []
            for _ in range(order["steps"]):
                answer.append(rows / model.decode([(row, position, 5 + position) for row in range(rows)]))
                position += 1
        else:
            answer = {"peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
