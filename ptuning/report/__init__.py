"""report.html: what a run did, in one file that opens from disk."""

from ptuning.report.page import report_command, write_comparison, write_report

__all__ = ["report_command", "write_comparison", "write_report"]
