"""fbnas report: one HTML page of a run."""

from pathlib import Path
from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.report import write_report


def main(config: dict[str, Any]) -> int:
    page = write_report(Path(config["run"]))
    out = OutFolder(config)
    print(page)
    out.finish(report=str(page))
    return 0
