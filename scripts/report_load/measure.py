"""How long a page of `fbnas report` takes to load in a headless Chromium.

    python scripts/report_load/measure.py PAGE [PAGE ...] [--times 7] [--out DIR]

Of each page, --times fresh profiles: seconds from the start of the navigation to the end of the
load event, and until every figure is drawn, as for a printer. Pages take turns. Writes result.md.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fbnas.files import atomic_write
from fbnas.latency import Device

sys.path.append(str(Path(__file__).parents[1]))
from steps import circumstances

HERE = Path(__file__).parent
PROBE = """<script>
addEventListener("load", () => {
  const loaded = performance.now();
  dispatchEvent(new Event("beforeprint"));  // draws what is not in sight, too
  const text = "<pre id=seen>" + loaded + " " + performance.now() + "</pre>";
  document.body.innerHTML = text;
});
</script></head>"""


def opened(browser: str, page: Path) -> tuple[float, float]:
    """Open the page in a profile of its own; return when it was loaded, all figures drawn, in s."""
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "page.html"
        probed.write_text(page.read_text().replace("</head>", PROBE, 1))
        found = subprocess.run(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-extensions", "--disable-background-networking"),
                *(f"--user-data-dir={folder}/profile", "--window-size=1280,900"),
                *("--timeout=30000", "--dump-dom", probed.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    seen = re.search(r'<pre id="seen">([\d.]+) ([\d.]+)</pre>', found.stdout)
    if seen is None:
        sys.exit(f"{page} did not load: {found.stderr[-500:]}")
    return float(seen.group(1)) / 1e3, float(seen.group(2)) / 1e3


def told(seconds: Sequence[float]) -> str:
    """Write the median and the range."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        parser.error("no chromium here: apt install chromium")
    version = subprocess.run(
        [browser, "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    times: dict[Path, list[tuple[float, float]]] = {page: [] for page in arguments.pages}
    for _ in range(arguments.times):
        for page in arguments.pages:
            times[page].append(opened(browser, page))
    lines = [
        "| page | MB | loaded, s: median (range) | all figures drawn, s |",
        "|---|---|---|---|",
    ]
    for page, found in times.items():
        loaded, drawn = (told(values) for values in zip(*found, strict=True))
        lines.append(f"| {page} | {page.stat().st_size / 1e6:.2f} | {loaded} | {drawn} |")
    about = f"{version}, headless, {arguments.times} fresh profiles each. {circumstances(Device())}"
    text = about + "\n" + "\n".join(lines) + "\n"
    atomic_write(arguments.out / "result.md", text)
    print(text)


if __name__ == "__main__":
    main()
