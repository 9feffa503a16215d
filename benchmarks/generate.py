"""Tokens/s of the engine against batch 1, on random weights and ADGEN lengths. Prints one JSON line last.

    python benchmarks/generate.py                                     12 layers, hidden 512, prefix 128, on the CPU
    python benchmarks/generate.py --device cuda --dtype bfloat16 …    on a GPU

Batch 1 is what the official evaluation does: transformers' generate, one prompt after the other. Answers have the lengths
of real ones (no end token), so that both generate the same tokens.

On a CPU in fp32 the engine runs once with each library that torch multiplies with (`--kernels plain` is torch's default; `fast` is
oneDNN where `fastest_to_answer` finds it clearly faster), in turns; "same_answers" is the share of rows whose tokens are all equal.
"""

import argparse
import json
import time

import torch
from common import add_model_arguments, model_config, random_rows, sample_lengths, wait
from tqdm import tqdm

from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.generation import Engine, GenerationRequest, Prefix
from ptuning.kernels import TORCH, answer_with, fastest_to_answer, products
from ptuning.methods.prefix.attach import attach_prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--rows", type=int, default=192, help="answered by the engine")
    parser.add_argument("--single_rows", type=int, default=12, help="answered one by one, because that takes long")
    parser.add_argument("--batch_tokens", type=int, default=16384)
    parser.add_argument("--max_rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1, help="of the engine with each library; the best counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = ChatGLMForConditionalGeneration(model_config(args)).to(args.device, dtype).eval()
    encoder = attach_prefix(model, args.pre_seq_len)
    lengths = sample_lengths(args.lengths, args.rows)
    ids = [row.input_ids for row in random_rows([(source, 0) for source, _ in lengths], args.vocab)]
    prompts = list(zip(ids, (target for _, target in lengths), strict=True))

    single = one_by_one(model, prompts[: args.single_rows], args.device)
    prefix = Prefix.of("random", encoder, model.dtype)
    libraries = products() if (args.device, args.dtype) == ("cpu", "float32") else (TORCH,)
    rates, answers = dict.fromkeys(libraries, 0.0), {}
    for _ in range(args.rounds):
        for library in libraries:
            answer_with(model, library)
            rate, answers[library] = with_engine(model, prefix, prompts, args)
            rates[library] = max(rates[library], rate)
    batched = rates[TORCH]
    same = [all(each[row] == answers[TORCH][row] for each in answers.values()) for row in range(args.rows)]
    result = {
        "benchmark": "generate",
        "device": args.device,
        "dtype": args.dtype,
        "layers": args.layers,
        "hidden": args.hidden,
        "pre_seq_len": args.pre_seq_len,
        "rows": args.rows,
        "tokens": sum(target for _, target in prompts),
        "threads": torch.get_num_threads(),
        "max_rows": args.max_rows,
        "batch_1_tokens_per_s": round(single, 1),
        "engine_tokens_per_s": round(batched, 1),
        "speedup": round(batched / single, 2),
        "engine_tokens_per_s_by": {name: round(rate, 1) for name, rate in rates.items()},
        "chosen": fastest_to_answer() if len(libraries) > 1 else TORCH,
        "same_answers": round(sum(same) / len(same), 4),
    }
    print(json.dumps(result))


def one_by_one(model, prompts: list[tuple[list[int], int]], device: str) -> float:
    """Generated tokens a second of `generate`, batch 1."""
    model.generate(torch.tensor([prompts[0][0]], device=device), max_new_tokens=4, do_sample=False, eos_token_id=None)
    wait(device)
    started = time.perf_counter()
    for ids, target in tqdm(prompts, desc="batch 1", unit="row"):
        model.generate(torch.tensor([ids], device=device), max_new_tokens=target, do_sample=False, eos_token_id=None)
    wait(device)
    return sum(target for _, target in prompts) / (time.perf_counter() - started)


def with_engine(
    model, prefix: Prefix, prompts: list[tuple[list[int], int]], args: argparse.Namespace
) -> tuple[float, list[list[int]]]:
    """Generated tokens a second of the engine, longest prompt first as evaluation does it; and the answers."""
    answers: list[list[int]] = [[] for _ in prompts]
    with Engine(model, [], batch_tokens=args.batch_tokens, max_rows=args.max_rows) as engine:
        wait(args.device)
        started = time.perf_counter()
        ordered = sorted(prompts, key=lambda prompt: -len(prompt[0]))
        requests = [GenerationRequest(n, ids, target, prefix=prefix) for n, (ids, target) in enumerate(ordered)]
        with tqdm(total=len(prompts), desc="engine", unit="row") as bar:
            for event in engine.submit(requests):
                answers[event.id].append(event.token)
                bar.update(event.finish is not None)
        wait(args.device)
        return sum(map(len, answers)) / (time.perf_counter() - started), answers


if __name__ == "__main__":
    main()
