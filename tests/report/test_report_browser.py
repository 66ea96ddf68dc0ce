"""The page in a headless Chromium: nothing loaded, nothing complained of, all of it drawn."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import made_run as made
import pytest

from fbnas.report import build_comparison, write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt install chromium")
DARK = "--blink-settings=preferredColorScheme=0"
# Runs in the page when it is loaded: draws every figure as printing does, and notes what it sees.
PROBE = """<script>
const seen = { errors: [] };
addEventListener("error", (event) => seen.errors.push(event.message));
addEventListener("load", () => {
  dispatchEvent(new Event("beforeprint"));
  dispatchEvent(new Event("afterprint"));
  const press = (at, key) =>
    at.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  seen.loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.empty = [...document.querySelectorAll(".plot")]
    .filter((plot) => !plot.querySelector(".main-svg")).map((plot) => plot.id);
  seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.ground = getComputedStyle(document.body).backgroundColor;
  seen.ink = getComputedStyle(document.querySelector(".plot text")).fill;
  const plot = document.getElementById("front-measured");
  plot.focus();
  seen.focused = document.activeElement.id;
  seen.outline = getComputedStyle(plot).outlineStyle;
  press(plot, "ArrowRight");
  seen.spoken = document.getElementById("spoken").textContent;
  const slider = document.getElementById("epoch");
  if (slider) {
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    seen.theta = document.getElementById("theta-0").data[0].z[0];
  }
  document.body.innerHTML = "<pre id=seen></pre>"; // the whole page need not be written out
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script></head>"""


def looked_at(html: str, folder: Path, *options: str) -> dict[str, Any]:
    """Open a page and return what the probe saw, with what the console said."""
    assert BROWSER is not None
    (folder / "probed.html").write_text(html.replace("</head>", PROBE, 1))
    found = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"),
            *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
            *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *options),
            *("--virtual-time-budget=5000", "--dump-dom", (folder / "probed.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=1200,
        check=True,
    )
    noted = re.search(r'<pre id="seen">(.*?)</pre>', found.stdout, flags=re.DOTALL)
    assert noted, found.stderr[-2000:]
    said = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    return {"console": said, **json.loads(noted.group(1))}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(made.write_run(tmp_path_factory.mktemp("browser") / "run")).read_text()


def check_quiet_and_drawn(seen: dict[str, Any]) -> None:
    assert seen["console"] == seen["errors"] == seen["loaded"] == seen["empty"] == []
    assert seen["focused"] == "front-measured" and seen["outline"] != "none"
    assert "fp32" in seen["spoken"] or "0.41" in seen["spoken"]


def test_a_run_by_day(single: str, tmp_path: Path) -> None:
    seen = looked_at(single, tmp_path, "--window-size=1280,900")
    check_quiet_and_drawn(seen)
    assert seen["ground"] == "rgb(255, 255, 255)" and seen["wide"] == 0
    assert seen["theta"] == pytest.approx(
        [1 / 9, 1 / 8, 1 / 9, 1 / 9, 1 / 8, 1 / 9, 1 / 9], abs=1e-3
    )


def test_a_run_at_night_on_a_phone(single: str, tmp_path: Path) -> None:
    seen = looked_at(single, tmp_path, DARK, "--window-size=500,900")
    check_quiet_and_drawn(seen)
    assert seen["ground"] == "rgb(18, 21, 26)" and seen["wide"] == 0
    assert seen["ink"] == "rgb(169, 176, 188)"  # the figures are dark too, after printing in light


def test_several_runs(tmp_path: Path) -> None:
    runs = [made.write_run(tmp_path / name) for name in "ab"]
    check_quiet_and_drawn(looked_at(build_comparison(runs, tmp_path), tmp_path))
