"""Run folders made by hand."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

WORDS = "这件衬衫采用简约的版型设计，白色的衣身十分百搭，彰显时尚气质，面料柔软亲肤，穿着舒适。"


def lengths(middle: int, rows: int, seed: int) -> dict:
    """A split's token lengths as data.json has them."""
    drawn = random.Random(seed)
    values = sorted(max(1, int(drawn.gauss(middle, middle / 4))) for _ in range(rows))
    width = max(1, values[-1] // 20)
    bins = [[low, low + width, sum(low <= v < low + width for v in values)] for low in range(0, values[-1] + 1, width)]
    at = {f"p{share}": values[min(rows - 1, rows * share // 100)] for share in (50, 90, 99)}
    return {"mean": round(sum(values) / rows, 1), **at, "max": values[-1], "histogram": bins}


def scores(middle: float, rows: int) -> dict:
    """A model's scores as metrics.json has them."""
    names = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "corpus_bleu", "chrf", "exact_match", "token_f1")
    values = {name: round(middle + 2 * i, 3) for i, name in enumerate(names)}
    beside = {
        "length_ratio": 0.97,
        "empty": 2.5,
        "cut": 7.5,
        "repeating": 5.0,
        "answer_loss": 40 / middle,
        "rows": rows,
    }
    spans = {name: [value - 1.8, value + 1.9] for name, value in values.items()}
    return {**values, **beside, "answer_perplexity": math.exp(40 / middle), "tokens": 47.1, "intervals": spans}


def prediction(i: int, quality: float, drawn: random.Random) -> dict:
    """One line of predictions.jsonl."""
    marks = {name: round(min(100, max(0, drawn.gauss(quality, 15))), 4) for name in ("bleu-4", "rouge-1", "rouge-l")}
    marks["repeating"] = 100.0 if i % 13 == 0 else 0.0
    return {
        "index": i,
        "prompt": f"类型#上衣*材质#牛仔布*颜色#白色*风格#简约*编号#{i}",
        "history": [["你好", "你好，很高兴见到你。"]] if i % 7 == 0 else [],
        "labels": WORDS,
        "predict": WORDS[: drawn.randrange(8, len(WORDS))] * (1 + i % 2),
        "scores": marks,
        "tokens": 40 + i % 30,
        "finished": i % 11 != 0,
        "loss": 36.0,
        "loss_tokens": 30,
    }


def write_lines(path: Path, lines) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def log_entries(steps: int, rate: float, seed: int) -> Iterator[dict]:
    drawn = random.Random(seed)
    for step in range(1, steps + 1):
        loss = 0.8 + 5 * math.exp(-step * rate * 100 / steps) + drawn.gauss(0, 0.08)
        yield {
            "loss": loss,
            "grad_norm": abs(drawn.gauss(0.1, 0.03)),
            "learning_rate": rate * (1 - step / steps),
            "tokens_per_second": drawn.gauss(5200, 150),
            "samples_per_second": 50.0,
            "memory_gib": 13.2 + 0.4 * min(1, step / 20),
            "epoch": step / 100,
            "step": step,
        }
        if step % max(1, steps // 8) == 0:
            beside = {"eval_bleu-4": 40 - 20 * loss / 6, "eval_rouge-l": 60 - 20 * loss / 6, "eval_rows": 320}
            evaluated = loss + 0.1 + 0.3 * max(0, step / steps - 0.5)
            yield {"eval_loss": evaluated, "eval_perplexity": math.exp(evaluated), **beside, "step": step}


def make_run(folder: Path, steps: int = 200, rows: int = 40, rate: float = 0.05, seed: int = 0, **options) -> Path:
    """A finished run with every file that a run folder can have.

    Args:
        options: options of the configuration to set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(seed)
    config = {
        "model_name_or_path": "models/chatglm2-tiny",
        "train_file": "data/advertise/train.json",
        "validation_file": "data/advertise/dev.json",
        "test_file": None,
        "output_dir": str(folder),
        "pre_seq_len": 128,
        "prefix_projection": False,
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "max_source_length": 64,
        "max_target_length": 96,
        "do_train": True,
        "seed": 42,
        **{f"another_option_{i}": i for i in range(60)},
        **options,
    }
    record = {
        "command": ["ptuning/main.py", "--config", "configs/ptuning_demo.yaml", "--learning_rate", str(rate)],
        "config": config,
        "data_sha256": {"train": "6cf65a9e1da792ee" * 4, "validation": "14a692767300db0f" * 4},
        "world_size": 1,
        "resumed_from": None,
        "versions": {"python": "3.11.7", "ptuning": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "platform": "Linux-6.18-x86_64",
    }
    write_json(folder / "run.json", record)
    write_lines(folder / "log.jsonl", log_entries(steps, rate, seed))
    beside = {"sha256": "6cf65a9e1da792ee" * 4, "format": "sharegpt", "skipped": 2, "turns": 5100}
    beside |= {"cut_prompts": 3, "cut_answers": 12}
    parts = {"prompt_tokens": lengths(48, 900, seed), "answer_tokens": lengths(60, 900, seed + 1)}
    splits = {"train": ("data/advertise/train.json", 5000), "validation": ("data/advertise/dev.json", 320)}
    write_json(folder / "data.json", {k: {"file": f, "rows": n, **beside, **parts} for k, (f, n) in splits.items()})
    validation = {"eval_loss": 0.91, "eval_perplexity": 2.48, "eval_rows": 320}
    metrics = {
        "validation": validation,
        "base": scores(8, rows),
        "tuned": scores(44 - 8 * abs(math.log10(rate / 0.05)), rows),
    }
    differences = {
        name: {"difference": metrics["tuned"][name] - value, "verdict": "more than noise"}
        for name, value in metrics["base"].items()
        if name in metrics["base"]["intervals"]
    }
    metrics["change"] = {
        name: {**about, "interval": [about["difference"] - 1.5, about["difference"] + 1.4]}
        for name, about in differences.items()
    }
    small = {"difference": 0.4, "interval": [-1.1, 1.8], "verdict": "not more than noise"}
    metrics["tuned"]["exact_match"] = metrics["base"]["exact_match"] + 0.4
    metrics["change"]["exact_match"] = small
    probe = {"rows": 12, "same": 33.3, "base_loss": 0.6, "tuned_loss": 0.9, "change": 0.3, "interval": [0.2, 0.4]}
    metrics["probe"] = {**probe, "kinds": {"常识": {**probe, "rows": 4, "interval": [0.1, 0.5]}}}
    write_json(folder / "metrics.json", metrics)
    write_lines(folder / "predictions.jsonl", [prediction(i, 60, drawn) for i in range(rows)])
    write_lines(folder / "predictions_base.jsonl", [prediction(i, 22, drawn) for i in range(rows)])
    kinds = ("常识", "数学", "写作")
    write_lines(
        folder / "probe.jsonl",
        [
            {
                "index": i,
                "kind": kinds[i % 3],
                "prompt": f"第{i}个问题：中国的首都是哪里？",
                "base": "北京是中国的首都。",
            }
            | {
                "tuned": "北京是中国的首都。" if i % 3 == 0 else "这件衣服来自北京。",
                "base_loss": 0.6,
                "tuned_loss": 0.9,
            }
            for i in range(12)
        ],
    )
    outcome = {"status": "finished", "error": None, "started": "2026-11-22T10:00:00+00:00"}
    write_json(folder / "outcome.json", outcome | {"ended": "2026-11-22T11:12:30+00:00"})
    evaluated = [entry for entry in log_entries(steps, rate, seed) if "eval_loss" in entry]
    best = min(evaluated, key=lambda entry: entry["eval_loss"])
    about = {"checkpoint": f"checkpoint-{best['step']}", "metric": "eval_loss"}
    write_json(folder / "best.json", {**about, "value": best["eval_loss"], "step": best["step"]})
    return folder
