"""`report`: writes an HTML page about run folders."""

from pathlib import Path
from typing import Optional

from lm_lightning.console import printable
from lm_lightning.run import find_run
from lm_lightning.security.untrusted import refuse_links


def report(runs: list[str], output: Optional[str] = None) -> None:
    """Writes an HTML page about runs: curves, samples, configs and machines. The page loads nothing from the network.

    Args:
        runs: Run folders. The curves of several runs are drawn in the same plots.
        output: File to write. Default: report.html in the run folder, or in the current folder for several runs.
    """
    from lm_lightning.reports import page

    folders = [find_run(run) for run in runs]
    for folder in folders:
        refuse_links(folder)
    file = Path(output or (folders[0] if len(folders) == 1 else Path()) / "report.html")
    page.write(folders, file)
    print(printable(str(file)))


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli import command

    command.run(report)
