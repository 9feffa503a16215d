"""The files that come with the package: options in YAML and DeepSpeed's JSON. In a checkout they are also `configs/`."""

import difflib
from importlib import resources
from pathlib import Path

FOLDER = Path(str(resources.files("ptuning.config"))) / "files"


def find(name: str) -> str:
    """The file of this name, else the shipped one that is called so or `configs/` and so; as given where there is neither."""
    path = Path(name).expanduser()
    shipped = FOLDER / path.name
    if path.parent in (Path(), Path("configs")) and not path.exists() and shipped.is_file():
        return str(shipped)
    return name


def no_such_file(path: Path) -> str:
    """What an error says of a path where nothing is: the nearest name there and among the shipped, or all that are shipped."""
    shipped = sorted(file.name for file in FOLDER.glob(f"*{path.suffix or '.yaml'}"))
    there = {file.name: str(file) for file in path.parent.glob(f"*{path.suffix}")} if path.parent.is_dir() else {}
    names = dict.fromkeys(shipped, "") | there
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"{path}: no such file; did you mean {names[near[0]] or near[0]}?"
    return f"{path}: no such file; looked in {path.parent.absolute()}, and these come with the package: {', '.join(shipped)}"
