"""fbnas report: one HTML page of a run, or of several side by side."""

from pathlib import Path
from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.report import build_comparison, write_report


def main(config: dict[str, Any]) -> int:
    asked = config["run"] if isinstance(config["run"], list) else [config["run"]]
    runs = [Path(str(run)) for run in asked]
    given = {key: Path(config[key]) for key in ("baselines", "cross_device") if config[key]}
    if not runs:
        raise InputError("run is an empty list; expected a folder: fbnas report run=FOLDER")
    if len(runs) == 1:
        page = write_report(runs[0], **given)
        out = OutFolder(config)
    else:
        if not config["out"]:
            raise InputError(
                f"run names {len(runs)} folders; expected a folder for their page beside them: "
                "add out=FOLDER."
            )
        html = build_comparison(runs, Path(config["out"]), **given)
        out = OutFolder(config)
        page = out.folder / "report.html"
        atomic_write(page, html)
    print(page)
    out.finish(report=str(page))
    return 0
