"""What two processes, each with half of every matrix, answer and serve: FOLDER PREFIX MODEL DATA. Also called with one process,
whose answers those are compared with."""

import asyncio
import contextlib
import io
import json
import os
import sys
from pathlib import Path

SCRIPT = Path(__file__)


def answers(folder: Path, prefix: str, model: str, data: str, more: list[str]) -> dict:
    """Logits, and what predict, chat and evaluate say; files lie in the folder."""
    import torch

    from ptuning import distributed, load_model
    from ptuning.cli import main

    count = int(more[1]) if more else None
    loaded, _ = load_model(model, prefix, tensor_parallel=count)
    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(3, 40)[None]).logits
        generated = loaded.generate(torch.arange(3, 20)[None], max_new_tokens=8, do_sample=False)
    keys = loaded.model.layers[0].self_attn.k_proj.weight
    own = keys.to_local() if more else keys
    found = {"logits": logits[0, -1].tolist(), "generated": generated[0].tolist(), "keys": list(own.shape)}
    asked = ["--ptuning_checkpoint", prefix, *more]
    rows = ["--max_predict_samples", "5", "--max_target_length", "10"]
    assert main(["predict", *asked, *rows, "--file", data, "--output", str(folder / "answers.jsonl")]) == 0
    # The chat's own would end the process group, which the evaluation needs.
    session, distributed.session = distributed.session, contextlib.nullcontext
    sys.stdin, said = io.StringIO("你好\n再见\n/exit\n"), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["chat", *asked, "--max_new_tokens", "8"]) == 0
    distributed.session = session
    found["chat"] = said.getvalue()
    found["served"] = served(model, prefix, count)
    asked += ["--test_file", data, *rows, "--baseline", "--output_dir", str(folder / "run")]
    assert main(["evaluate", *asked]) == 0
    return found


def served(model: str, prefix: str, count: int | None) -> list[list[int | None]]:
    """Tokens of the server's worker: base and prefix, greedy and sampled, one of them given up; nothing in the processes that
    follow."""
    from ptuning.generation import GenerationRequest, SamplingParams
    from ptuning.serving.divided import join
    from ptuning.serving.options import ServeOptions
    from ptuning.serving.server import build, follow_first

    options = ServeOptions(model=model, prefix=(("ads", prefix),), tensor_parallel=count)
    if count is not None and not join():
        return [[follow_first(options)]]
    backend, _ = build(options)
    backend.start()

    async def ask() -> list[list[int | None]]:
        greedy, drawn = SamplingParams(), SamplingParams(0.9, seed=7)
        added = await backend.add_prefix("late", prefix)
        streams = [
            backend.submit(name, [GenerationRequest(0, list(range(5, 15 + place)), 6, rule)])
            for place, (name, rule) in enumerate(
                [("base", greedy), ("ads", greedy), ("ads", drawn), (added.name, greedy), ("base", SamplingParams(1.0))]
            )
        ]
        streams.pop().cancel()
        tokens = [[token.token async for _, token in stream] for stream in streams]
        await backend.remove_prefix("late")
        return tokens

    try:
        return asyncio.run(ask())
    finally:
        backend.close()


if __name__ == "__main__":
    folder, count = Path(sys.argv[1]), os.environ["WORLD_SIZE"]
    result = answers(folder, *sys.argv[2:5], ["--tensor_parallel", count])
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(result))
