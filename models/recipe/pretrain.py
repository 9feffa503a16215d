"""Pretrain the demo's base model from scratch on the CPU and write it in the official ChatGLM2 format.

The network is transformers' own `GlmForCausalLM`, which computes exactly what ChatGLM2 computes; only the weights'
names differ, and `official_weights` writes the official ones.

    python models/recipe/pretrain.py --corpus corpus.jsonl --out models/chatglm2-tiny --log models/recipe/training.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import transformers
from muon import Muon
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from train_tokenizer import CONTROL_IDS
from transformers import GlmConfig, GlmForCausalLM

SEED = 2023
STEPS = 2000
MAX_LENGTH = 384
BATCH_TOKENS = 2048
POOL = 2000  # rows sorted by length together, so that a batch holds rows of one length
MUON_RATE, ADAM_RATE = 5e-3, 4e-3  # hidden matrices; embedding, output layer, norms and biases
WARMUP, WEIGHT_DECAY, CLIP, SAVE_EVERY = 50, 0.05, 1.0, 200
QUESTION_WEIGHT = 0.1  # loss weight of what a user says, which nobody can predict; answers weigh 1

# The official config.json: sizes are the demo's, everything else is as in ChatGLM2-6B.
CONFIG: dict[str, object] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 448,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 192,
    "kv_channels": 64,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 2048,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 2048,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def network() -> GlmForCausalLM:
    """A fresh network of the sizes in CONFIG."""
    size = {name: value for name, value in CONFIG.items() if isinstance(value, int)}
    config = GlmConfig(
        vocab_size=size["padded_vocab_size"],
        hidden_size=size["hidden_size"],
        num_hidden_layers=size["num_layers"],
        intermediate_size=size["ffn_hidden_size"],
        num_attention_heads=size["num_attention_heads"],
        num_key_value_heads=size["multi_query_group_num"],
        head_dim=size["kv_channels"],
        attention_bias=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=size["seq_length"],
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    return GlmForCausalLM(config)


def render(one: dict) -> tuple[str, list[tuple[int, int]]]:
    """The prompt in the official template, and where in it the earlier answers stand."""
    text, answers = "", []
    for i, (ask, answer) in enumerate(one["history"], start=1):
        text += f"[Round {i}]\n\n问：{ask}\n\n答："
        answers.append((len(text), len(text) + len(answer)))
        text += answer + "\n\n"
    return text + f"[Round {len(one['history']) + 1}]\n\n问：{one['prompt']}\n\n答：", answers


def encode(one: dict, sp: sentencepiece.SentencePieceProcessor) -> tuple[list[int], list[int], list[float]]:
    """Token ids of one row, the label and the loss weight of each token as a target.

    The template writes no eos behind an earlier answer, but the model that gave it had to end there. So the label of the
    newline that follows it is eos: no answer teaches to run on into the next round.
    """
    pieces = sp.vocab_size()
    text, answers = render(one)
    prompt = sp.encode(text)
    response = [*sp.encode(one["response"]), sp.eos_id()]
    ids = [pieces + 1, pieces + 3, *prompt, *response]  # [gMASK] sop
    labels, weights = ids[:2], [0.0, 0.0]
    place = -1  # in the text; the dummy prefix stands before it
    for token in prompt:
        ends = any(place == end for _, end in answers)
        learned = ends or any(start <= place < end for start, end in answers)
        labels.append(sp.eos_id() if ends else token)
        weights.append(1.0 if learned else QUESTION_WEIGHT)
        place += 1 if sp.is_byte(token) else len(sp.id_to_piece(token))
    return ids, labels + response, weights + [1.0] * len(response)


def batches(corpus: Path, sp: sentencepiece.SentencePieceProcessor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Padded (ids, labels, weights), one pass over the corpus, rows of similar length together, batches in random order."""
    rng = random.Random(SEED)
    Encoded = tuple[list[int], list[int], list[float]]

    def cut(pool: list[Encoded]) -> list[list[Encoded]]:
        parts: list[list[Encoded]] = [[]]
        for one in sorted(pool, key=lambda x: len(x[0])):
            if parts[-1] and len(one[0]) * (len(parts[-1]) + 1) > BATCH_TOKENS:
                parts.append([])
            parts[-1].append(one)
        rng.shuffle(parts)
        return parts

    def padded(part: list[Encoded]) -> tuple[torch.Tensor, ...]:
        width = max(len(ids) for ids, _, _ in part)
        return tuple(torch.tensor([row + [0] * (width - len(row)) for row in rows]) for rows in zip(*part, strict=True))

    pool: list[Encoded] = []
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            one = encode(json.loads(line), sp)
            if len(one[0]) <= MAX_LENGTH:
                pool.append(one)
            if len(pool) == POOL:
                yield from map(padded, cut(pool))
                pool = []
    yield from map(padded, cut(pool))


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rates: warm up, stay, and fall linearly to zero over the last 60 %."""
    return min(1.0, step / WARMUP, (steps - step) / (0.6 * steps))


def pretrain(corpus: Path, sp: sentencepiece.SentencePieceProcessor, steps: int, out: Path) -> dict:
    """Train on `steps` batches, save the model into `out` and return a report.

    The padding, on the right here, needs no mask: a causal model never looks right.
    """
    torch.manual_seed(SEED)
    model = network().train()
    hidden = {n: p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n}
    others = [p for n, p in model.named_parameters() if n not in hidden]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(hidden.values(), lr=MUON_RATE, weight_decay=WEIGHT_DECAY), MUON_RATE),
        (torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0), ADAM_RATE),
    ]
    history, seen, answer_loss, window, start = [], 0, 0.0, 0, time.perf_counter()
    step = 0
    for step, (ids, labels, weights) in enumerate(batches(corpus, sp), start=1):
        logits = model(input_ids=ids).logits[:, :-1]
        targets, weight = labels[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
        losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * schedule(step, steps)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        seen += int((weights > 0).sum())
        answer_loss += losses.detach()[weight == 1].mean().item()
        window += 1
        if step % 50 == 0 or step == steps:
            history.append({"step": step, "answer_loss": round(answer_loss / window, 4), "tokens": seen})
            print(json.dumps({**history[-1], "seconds": round(time.perf_counter() - start)}), flush=True)
            answer_loss, window = 0.0, 0
        if step == steps:
            break
        if step % SAVE_EVERY == 0:
            save(model, out)
    if step < steps:
        raise SystemExit(f"the corpus ended after {step} steps; write more rows or ask for fewer steps")
    save(model, out)
    return {
        "seed": SEED,
        "steps": steps,
        "tokens": seen,
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "muon_rate": MUON_RATE,
        "adam_rate": ADAM_RATE,
        "batch_tokens": BATCH_TOKENS,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, sentencepiece)},
        "history": history,
    }


def official_weights(model: GlmForCausalLM) -> dict[str, torch.Tensor]:
    """The weights under their official names, in float16; q, k and v become the rows of one matrix."""
    renamed = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "model.layers": "transformer.encoder.layers",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    state = model.state_dict()
    weights = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "self_attention.query_key_value")
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor.to(torch.float16).contiguous()
    return weights


def save(model: GlmForCausalLM, out: Path) -> None:
    """Write model.safetensors and config.json in the official format."""
    save_file(official_weights(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="a directory that already holds tokenizer.model")
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))
    if sp.vocab_size() + CONTROL_IDS > CONFIG["padded_vocab_size"]:
        raise SystemExit("the vocabulary has no room for the tokenizer's pieces and the control ids")
    report = pretrain(args.corpus, sp, args.steps, args.out)
    args.log.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
