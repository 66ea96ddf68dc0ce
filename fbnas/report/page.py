"""Puts the parts together into one self-contained HTML page."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fbnas import __version__
from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.report.figures import Figure
from fbnas.report.given import read_given
from fbnas.report.reading import read_run
from fbnas.report.run import Run
from fbnas.report.sections import Section, opening, sections
from fbnas.report.sides import comparison, named_apart, side_by_side
from fbnas.report.summary import key_figures, sentence, title

# Nothing may be loaded from anywhere: the page is the same on a train, and in ten years.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
)


@dataclass(frozen=True)
class Page:
    """What a page shows: `opening` is HTML below the sentence, `parts` follow in their order."""

    title: str
    sentence: str
    opening: str
    parts: Sequence[Section]


def write_report(
    run: Path, *, baselines: Path | None = None, cross_device: Path | None = None
) -> Path:
    """Write run/report.html from the files in `run` and return its path.

    `run` is the out folder of `fbnas run`, `fbnas search`, `fbnas train`, or of any command that
    left a result.json; unfinished runs are shown as far as they came.

    Args:
        baselines: a CSV file of other networks (name, latency_ms, accuracy, architecture).
        cross_device: a CSV file of networks on several devices (network, device, measured_ms).

    Raises:
        InputError: no such folder or file, nothing to show in it, or a damaged file.
    """
    run = Path(run)
    read = read_run(run)
    given = read_given(baselines, cross_device)
    parts = sections(read, given)
    page = Page(title(read), sentence(read), opening(read) + _key_figures(read), parts)
    atomic_write(run / "report.html", build_page(page))
    return run / "report.html"


def build_comparison(
    runs: Sequence[Path],
    out: Path,
    *,
    baselines: Path | None = None,
    cross_device: Path | None = None,
) -> str:
    """Return the HTML of a page that shows several runs side by side.

    Args:
        runs: at least two folders as `write_report` takes them.
        out: the folder that the page will lie in: links to the runs' own pages start there.
        baselines, cross_device: as in `write_report`.

    Raises:
        InputError: as `write_report`; or a folder that is given twice.
    """
    folders = [run.resolve() for run in runs]
    for run in runs:
        if folders.count(run.resolve()) > 1:
            raise InputError(f"run names {run} twice; expected different folders: leave one out.")
    read = named_apart([read_run(run) for run in runs])
    parts = side_by_side(read, read_given(baselines, cross_device), out)
    names = ", ".join(run.name for run in read)
    return build_page(Page(f"{len(read)} runs: {names}", comparison(read), "", parts))


def build_page(page: Page) -> str:
    """Return the page's HTML."""
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    links = "".join(f'<a href="#{part.name}">{escape(part.title)}</a>' for part in page.parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>{(here / "page.css").read_text()}</style>
</head>
<body>
<a class="jump" href="#main">Skip to the content</a>
<header>
<h1>{escape(page.title)}</h1>
<p class="lead" id="summary">{escape(page.sentence)}</p>
{page.opening}
</header>
<nav aria-label="Sections">{links}</nav>
<main id="main" tabindex="-1">
<noscript><p>The figures need JavaScript; the tables below do without.</p></noscript>
{"".join(_section(part) for part in page.parts)}
</main>
<footer class="soft">Written by fbnas {__version__}. All latencies in milliseconds.</footer>
<div id="spoken" class="unseen" aria-live="polite"></div>
<script>{get_plotlyjs()}</script>
<script>{(here / "page.js").read_text()}</script>
</body>
</html>
"""


def _key_figures(run: Run) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong><small>{escape(note)}</small></dd></div>"
        for name, value, note in key_figures(run)
    )
    return f'<dl class="key">{items}</dl>' if items else ""


def _section(part: Section) -> str:
    wide = "".join(_figure(figure) for figure in part.figures)
    pairs = "".join(_figure(figure) for figure in part.pairs)
    grid = f'<div class="pairs">{pairs}</div>' if pairs else ""
    return (
        f'<section id="{part.name}" class="part" aria-labelledby="{part.name}-title">'
        f'<h2 id="{part.name}-title">{escape(part.title)}</h2>{part.html}'
        f"{wide}{grid}{part.below}</section>\n"
    )


def _figure(figure: Figure) -> str:
    content = {"data": figure.data, "layout": figure.layout, "frames": figure.frames}
    text = json.dumps(_all_finite(content), allow_nan=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c")  # no </script> from a name of the user's
    return (
        f'<figure><div class="plot" id="{figure.name}" role="img" tabindex="0" '
        f'aria-label="{escape(figure.label)}" style="height:{figure.layout["height"]}px"></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption>"
        f'<script type="application/json" data-figure="{figure.name}">{safe}</script></figure>'
    )


def _all_finite(value: Any) -> Any:
    """Return JSON content with NaN and infinities as None: browsers read no others."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _all_finite(item) for key, item in value.items()}
    return [_all_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
