"""`ptuning serve`: the options first, and only then what serves, which needs packages that training doesn't."""

from collections.abc import Sequence

from ptuning.packages import require
from ptuning.serving.options import parse


def serve_command(argv: Sequence[str]) -> int:
    """Returns the exit status.

    Raises:
        PTuningError: options, model or prefix can't be used, a port is taken, or a package is missing.
    """
    options = parse(argv)
    for module in ("fastapi", "uvicorn", "httptools", "prometheus_client"):
        require("ptuning serve", module, "ptuning[serve]")
    if options.engine == "vllm":
        require("--engine vllm", "httpx", "ptuning[serve]")
    if not options.no_page:
        for module in ("streamlit", "openai"):
            require("the page", module, "ptuning[page]", instead="leave the page out: --no_page")
    from ptuning.serving.server import serve

    return serve(options)
