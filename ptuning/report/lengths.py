"""The data section: a row a split, and how long prompts and answers are against the limits."""

from ptuning.report.lines import number
from ptuning.report.read import Run
from ptuning.report.svg import Drawing, Key, color, draw

SPLITS = ("train", "validation", "test")
PARTS = {"prompt_tokens": ("Prompt length", "s1", "max_source_length"), "answer_tokens": ("Answer length", "s3", None)}


def data_table(run: Run) -> list[dict]:
    """What is known of each split: from data.json, else file and fingerprint from the configuration."""
    prints = run.record.get("data_sha256")
    prints = prints if isinstance(prints, dict) else {}
    names = [split for split in SPLITS if split in run.data or split in prints]
    names += [split for split in run.data if split not in names]
    return [
        {"split": split, "file": run.config.get(f"{split}_file"), "sha256": prints.get(split)}
        | {key: value for key, value in run.data.get(split, {}).items() if value is not None}
        for split in names
    ]


def length_figures(run: Run) -> list[Drawing]:
    """Histograms of the training rows' lengths; of another split where there was no training."""
    split = next((name for name in (*SPLITS, *run.data) if name in run.data), None)
    if split is None:
        return []
    figures = [_figure(run, split, part) for part in PARTS]
    return [figure for figure in figures if figure is not None]


def _figure(run: Run, split: str, part: str) -> Drawing | None:
    title, name, option = PARTS[part]
    bins = _bins(run.data[split].get(part))
    if not bins:
        return None
    option = option or _answer_limit(run, split)
    limit = number(run.config.get(option))
    end = bins[-1][1]
    near = limit is not None and limit <= 3 * end

    def plot(axes):
        widths = [high - low for low, high, _ in bins]
        axes.bar([low for low, _, _ in bins], [count for *_, count in bins], widths, align="edge", color=color(name))
        if near:
            axes.axvline(limit, color=color("best"), linewidth=1.6, linestyle="--")
        axes.set_xlim(0, max(end, limit if near else 0) * 1.03)
        axes.set_xlabel("tokens")
        axes.set_ylabel("rows")
        axes.grid(axis="x", visible=False)

    keys = [Key(f"{split} rows", name, "bar")]
    if near:
        keys.append(Key(f"{option} {limit:g}", "best", "dashed"))
    note = "" if near or limit is None else f"{option} is {limit:g}, far to the right."
    return Drawing(title, draw(plot), keys, note)


def _answer_limit(run: Run, split: str) -> str:
    own = split != "train" and number(run.config.get("val_max_target_length")) is not None
    return "val_max_target_length" if own else "max_target_length"


def _bins(lengths) -> list[tuple[float, float, float]]:
    histogram = lengths.get("histogram") if isinstance(lengths, dict) else None
    if not isinstance(histogram, list):
        return []
    bins = [tuple(each) for each in histogram if isinstance(each, list | tuple) and len(each) == 3]
    bins = [each for each in bins if None not in map(number, each) and each[1] > each[0]]
    return sorted(bins)[:500]
