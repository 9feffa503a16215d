"""`ptuning report RUN…`."""

import argparse
from pathlib import Path

from ptuning.errors import ConfigError
from ptuning.report.page import REPORT, write_comparison, write_report


def report_command(argv: list[str]) -> int:
    """Writes the report of one run again, or one page over several runs. Prints the path written.

    Raises:
        ConfigError: a folder has no run in it, or the page can't be written.
    """
    parser = argparse.ArgumentParser(
        prog="ptuning report",
        allow_abbrev=False,
        description="Write report.html of a run again, or compare several runs in one page.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output_dir of a run")
    parser.add_argument(
        "--output", metavar="FILE", help=f"default: RUN/{REPORT}; ./{REPORT} where several runs are compared"
    )
    args = parser.parse_args(argv)
    output = None if args.output is None else Path(args.output)
    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give a file name, e.g. {output / REPORT}")
    try:
        several = len(args.runs) > 1
        path = write_comparison(args.runs, output or REPORT) if several else write_report(args.runs[0], output)
    except OSError as error:
        raise ConfigError(f"can't write the report: {error}") from error
    print(f"Wrote {path}")
    return 0
