"""The chosen architecture drawn as boxes in their stages, and the same as a table."""

import re
from html import escape

from fbnas.report.markup import details, number, table
from fbnas.report.run import Run
from fbnas.report.shapes import Layer, Space
from fbnas.report.words import DASH, THIN, TIMES, digits, ms

KERNEL = re.compile(r"k(\d+)")
EXPANSION = re.compile(r"e(\d+)")
GROUPS = re.compile(r"g(\d+)")
PIXELS_PER_KERNEL, LEAST_WIDTH = 8, 4
PIXELS_PER_EXPANSION, LEAST_HEIGHT = 9, 10
TALLEST = 64


def draw(run: Run, name: str = "layers", *, explained: bool = True) -> str:
    """Draw the architecture of a run: kernel is width, expansion is height, skip is a thin line.

    `name` is that of the table below it, which no other on the page has; where it is `explained`,
    the shapes have their legend below.
    """
    assert run.space is not None and run.choice is not None
    space, last = run.space, run.space.layers[-1].stage
    channels = space.input_channels * (4 if space.wavelet else 1)
    split = "wavelet split, " if space.wavelet else ""
    stem = f"{split}3{TIMES}3 convolution, {channels} → {space.stem_channels} channels"
    head = f"1{TIMES}1 convolution to {space.head} channels, pooling, classifier"
    size = f"{space.resolution}{TIMES}{space.resolution}"
    parts = [_fixed("stem", stem, size)]
    for stage in range(last + 1):
        layers = [layer for layer in space.layers if layer.stage == stage]
        side, channels = layers[0].shape[3] // layers[0].shape[2], layers[-1].shape[1]
        boxes = "".join(_layer(run, layer) for layer in layers)
        heading = f'Stage {stage} <span class="soft">{channels} ch, {side}{TIMES}{side}</span>'
        parts.append(
            f'<section class="stage"><h3>{heading}</h3><ol class="layers">{boxes}</ol></section>'
        )
    parts.append(_fixed("head", head, f"{space.final_size}{TIMES}{space.final_size}"))
    legend = _legend(run) if explained else ""
    return f'<div class="architecture">{"".join(parts)}</div>{legend}{_table(run, space, name)}'


def _fixed(name: str, what: str, size: str) -> str:
    box = '<span class="box fixed" style="width:20px;height:64px"></span>'
    tip = f'<span class="tip" role="tooltip">{escape(what)}, on {size}</span>'
    frame = f'<span class="frame">{box}</span><span>{name}</span>'
    item = f'<li class="layer" tabindex="0">{frame}{tip}</li>'
    return (
        f'<section class="stage"><h3><span class="soft">{size}</span></h3>'
        f'<ol class="layers">{item}</ol></section>'
    )


def _layer(run: Run, layer: Layer) -> str:
    assert run.choice is not None
    block = run.choice.blocks[layer.index]
    cost = run.block_ms(layer.index, block)
    tip = f"Layer {layer.index}: {block}<br>{layer}<br>{ms(cost)}"
    return (
        f'<li class="layer" tabindex="0"><span class="frame">{_box(block)}</span>'
        f'<span class="name">{escape(block)}</span>'
        f'<span class="cost">{DASH if cost is None else digits(cost, 2)}</span>'
        f'<span class="tip" role="tooltip">{tip}</span></li>'
    )


def _box(block: str) -> str:
    if block == "skip":
        return '<span class="box skip"></span>'
    kernel, expansion, groups = (_number(p, block) for p in (KERNEL, EXPANSION, GROUPS))
    width = LEAST_WIDTH + PIXELS_PER_KERNEL * (kernel or 3)
    height = min(LEAST_HEIGHT + PIXELS_PER_EXPANSION * (expansion or 3), TALLEST)
    kind = f"k{kernel}" if kernel in (3, 5, 7) else "other"
    kind += " grouped" if groups else ""
    return f'<span class="box {kind}" style="width:{width}px;height:{height}px"></span>'


def _number(pattern: re.Pattern[str], block: str) -> int | None:
    match = pattern.search(block)
    return int(match.group(1)) if match else None


def _legend(run: Run) -> str:
    entries = (
        ('<span class="box k3" style="width:28px;height:19px"></span>', "kernel 3, expansion 1"),
        ('<span class="box k5" style="width:44px;height:64px"></span>', "kernel 5, expansion 6"),
        ('<span class="box k3 grouped" style="width:28px;height:19px"></span>', "two groups"),
        ('<span class="box skip" style="width:36px"></span>', "skip"),
    )
    items = "".join(f"<span>{box} {text}</span>" for box, text in entries)
    assert run.choice is not None
    words = f"Width is the kernel, height the expansion; the number is the latency in{THIN}ms."
    return (
        f'<p class="legend" aria-hidden="true">{items}</p>'
        f'<p class="soft">{words} {escape(run.choice.origin)}</p>'
    )


def _table(run: Run, space: Space, name: str) -> str:
    assert run.choice is not None
    rows = [
        f"<tr><td>{layer.index}</td><td>{layer.stage}</td><th scope=row>{escape(block)}</th>"
        f"<td>{layer}</td>{number(ms(run.block_ms(layer.index, block)))}</tr>"
        for layer, block in zip(space.layers, run.choice.blocks, strict=True)
    ]
    columns = ("Layer", "Stage", "Block", "Shape of its input", "Latency")
    caption = "The chosen block of every layer and what it costs."
    return details("The layers as a table", table(name, caption, columns, rows))
