"""Theta's history, layer by layer: how probable each block was at every epoch, as small SVGs."""

from collections.abc import Sequence
from html import escape

from fbnas.report.run import Matrix, Search
from fbnas.report.shapes import Space
from fbnas.report.words import THIN

WIDTH, HEIGHT = 120, 64
KERNEL_COLOURS = {"k3": "var(--series-1)", "k5": "var(--series-2)", "k7": "var(--series-3)"}
# share of a kernel's colour in the mix with the ground: wide expansions are strong
STRENGTHS = {"e6": 100, "e3": 72, "e1": 46, "g2": 26}


def history(search: Search, target: int, kept: Sequence[int], space: Space | None) -> str:
    """Return a small plot per layer, and their legend: the probability of each block, stacked.

    Args:
        kept: positions of the search's epochs that are drawn.
        space: names the layers' stages, where it is known.
    """
    frames = [search.probabilities(i, target) for i in kept]
    layers = range(len(frames[0]))
    blocks = search.blocks
    plots = "".join(
        _layer(layer, blocks, frames, space.layers[layer].stage if space else None)
        for layer in layers
    )
    legend = "".join(
        f'<span><i style="background:{colour(block)}"></i>{escape(block)}</span>'
        for block in blocks
    )
    first, last = (search.epochs[kept[i]]["epoch"] for i in (0, -1))
    words = (
        f"How probable each block was in every layer, from epoch {first} (left) to {last} (right); "
        "the shares of a column sum to 1. The name is the block that leads at the end."
    )
    return (
        f'<p class="soft">{words}</p><p class="legend swatches" aria-hidden="true">{legend}</p>'
        f'<ol class="history">{plots}</ol>'
    )


def colour(block: str) -> str:
    """Return a block's colour: the kernel's hue, stronger the wider the expansion."""
    if block == "skip":
        return "var(--line)"
    kernel, *rest = block.split("_")
    hue = KERNEL_COLOURS.get(kernel, "var(--series-4)")
    strength = min((STRENGTHS[part] for part in rest if part in STRENGTHS), default=100)
    return f"color-mix(in srgb, {hue} {strength}%, var(--ground))"


def _layer(layer: int, blocks: Sequence[str], frames: Sequence[Matrix], stage: int | None) -> str:
    shares = [[p or 0.0 for p in frame[layer]] for frame in frames]
    end = max(range(len(blocks)), key=shares[-1].__getitem__)
    bands = []
    for i in reversed(
        range(len(blocks))
    ):  # each reaches to the ground; those above are drawn first
        tops = [sum(share[: i + 1]) for share in shares]
        if any(share[i] > 0 for share in shares):
            bands.append(f'<path d="{_area(tops)}" style="fill:{colour(blocks[i])}"/>')
    name = f"Layer {layer}" + ("" if stage is None else f", stage {stage}")
    percent = f"{100 * shares[-1][end]:.0f}{THIN}%"
    label = f"{name}: {blocks[end]} ends with {percent}"
    return (
        f'<li><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(bands)}</svg>'
        f"<span>{layer} <b>{escape(blocks[end])}</b> "
        f'<span class="soft">{percent}</span></span></li>'
    )


def _area(tops: Sequence[float]) -> str:
    """An SVG path from the ground up to the tops, whole units only."""
    steps = tops if len(tops) > 1 else [*tops, *tops]
    xs = [round(WIDTH * i / (len(steps) - 1)) for i in range(len(steps))]
    points = "".join(f"L{x} {round(HEIGHT * (1 - top))}" for x, top in zip(xs, steps, strict=True))
    return f"M0 {HEIGHT}{points}V{HEIGHT}Z"
