"""Puts the parts together into one self-contained HTML page."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from fbnas import __version__
from fbnas.files import atomic_write
from fbnas.report.figures import Figure
from fbnas.report.reading import Run, read_run
from fbnas.report.sections import Section, opening, sections
from fbnas.report.summary import key_figures, sentence, title

# Nothing may be loaded from anywhere: the page is the same on a train, and in ten years.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
)


def write_report(run: Path) -> Path:
    """Write run/report.html from the files in `run` and return its path.

    `run` is the out folder of `fbnas run`, `fbnas search`, `fbnas train`, or of any command that
    left a result.json; unfinished runs are shown as far as they came.

    Raises:
        InputError: no such folder, nothing to show in it, or a damaged file.
    """
    run = Path(run)
    page = build_page(read_run(run))
    atomic_write(run / "report.html", page)
    return run / "report.html"


def build_page(run: Run) -> str:
    """Return the page's HTML."""
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    parts = sections(run)
    links = "".join(f'<a href="#{part.name}">{escape(part.title)}</a>' for part in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title(run))}</title>
<style>{(here / "page.css").read_text()}</style>
</head>
<body>
<a class="jump" href="#main">Skip to the content</a>
<header>
<h1>{escape(title(run))}</h1>
<p class="lead" id="summary">{escape(sentence(run))}</p>
{opening(run)}
{_key_figures(run)}
</header>
<nav aria-label="Sections">{links}</nav>
<main id="main">
<noscript><p>The figures need JavaScript; the tables below do without.</p></noscript>
{"".join(_section(part) for part in parts)}
</main>
<footer class="soft">Written by fbnas {__version__}. All latencies in milliseconds.</footer>
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
        f'<h2 id="{part.name}-title">{escape(part.title)}</h2>{part.html}{wide}{grid}</section>\n'
    )


def _figure(figure: Figure) -> str:
    content = {"data": figure.data, "layout": figure.layout, "frames": figure.frames}
    text = json.dumps(_all_finite(content), allow_nan=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c")  # no </script> from a name of the user's
    return (
        f'<figure><div class="plot" id="{figure.name}" role="img" '
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
