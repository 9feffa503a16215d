"""The command that starts the page, for `ptuning serve` and anybody who starts it by hand."""

import sys
from pathlib import Path


def page_command(host: str = "127.0.0.1", port: int = 7020) -> list[str]:
    """The command line of the page's process. It takes PTUNING_API and PTUNING_API_KEY from its environment, for other
    users of the machine can read a command line."""
    options = {
        "server.address": host,  # with an address given, Streamlit does not ask the internet for this machine's own
        "server.port": port,
        "server.headless": "true",  # opens no browser, asks for no e-mail address
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",  # no Deploy button
        "client.showErrorDetails": "none",  # a traceback belongs in the log
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "streamlit", "run", str(Path(__file__).with_name("page.py")), *flags]
