"""What differs between devices: each block's cost, 3x3 against 5x5, how alike they rank networks.

    python scripts/devices/compare.py space=fbnet out=scripts/devices TABLE.csv TABLE.csv ...

A device is a table. Writes, for the space, blocks_SPACE.png (the cost of each block relative to
k3_e1 at the same shape: median over shapes, a device a column; the brief's figure 4),
ranks_SPACE.png (Spearman between devices over random networks) and SPACE.md with the numbers.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from scipy.stats import spearmanr

from fbnas.latency.table import LatencyTable
from fbnas.space import Architecture, SearchSpace

mpl.use("Agg")
from matplotlib import pyplot as plt

REFERENCE = "k3_e1"
NETWORKS = 2000
PAIRS = (("k3_e1", "k5_e1"), ("k3_e3", "k5_e3"), ("k3_e6", "k5_e6"))


def main(arguments: list[str]) -> None:
    options = dict(argument.split("=") for argument in arguments if "=" in argument)
    space = SearchSpace.load(options["space"])
    out = Path(options["out"])
    files = [Path(argument) for argument in arguments if "=" not in argument]
    tables = {column(table): table for table in map(LatencyTable.load, files)}
    latencies = {name: table.tensor(space) for name, table in tables.items()}
    relative = relative_costs(space, {name: ms for name, (ms, _) in latencies.items()})
    ranks = rank_correlation(space, latencies)
    draw_blocks(relative, space, out / f"blocks_{space.name}.png")
    draw_ranks(ranks, list(tables), out / f"ranks_{space.name}.png")
    page = out / f"{space.name}.md"
    page.write_text(words(space, relative, ranks, list(tables)))
    print(page)


def column(table: LatencyTable) -> str:
    """A device's short name: runtime, provider where it says more, precision."""
    provider = table.header.get("provider", "")
    shown = f" {provider}" if table.runtime == "pytorch" else ""
    return f"{table.runtime}{shown} {table.precision}"


def relative_costs(space: SearchSpace, latency_ms: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Per device and block: the cost relative to k3_e1, (shapes,) for the distinct shapes.

    nan where k3_e1 cannot be told from nothing: its time on top of a 1x1 convolution came out as 0.
    """
    distinct = {
        (layer.in_channels, layer.out_channels, layer.stride, layer.height): layer.index
        for layer in space.layers
    }
    layers = list(distinct.values())
    reference = space.blocks.index(REFERENCE)
    return {
        name: {
            block: (
                ms[layers, i] / ms[layers, reference].where(ms[layers, reference] > 0, torch.nan)
            ).numpy()
            for i, block in enumerate(space.blocks)
            if block != "skip"
        }
        for name, ms in latency_ms.items()
    }


def rank_correlation(
    space: SearchSpace, latencies: dict[str, tuple[torch.Tensor, float]]
) -> np.ndarray:
    """Spearman between devices over the predicted latencies of the same random networks."""
    generator = torch.Generator().manual_seed(0)
    paths = torch.tensor(
        [Architecture.random(space, generator).path(space) for _ in range(NETWORKS)]
    )
    rows = torch.arange(len(space.layers))
    totals = [ms[rows, paths].sum(dim=1) + base_ms for ms, base_ms in latencies.values()]
    found = spearmanr(np.stack([total.numpy() for total in totals], axis=1)).statistic
    return np.atleast_2d(found) if len(totals) > 2 else np.array([[1, found], [found, 1]])


def draw_blocks(relative: dict[str, dict], space: SearchSpace, path: Path) -> None:
    blocks = [block for block in space.blocks if block not in ("skip", REFERENCE)]
    figure, axes = plt.subplots(figsize=(1.1 * len(relative) + 3, 4.5), layout="constrained")
    width = 0.8 / len(blocks)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(blocks)))
    for i, block in enumerate(blocks):
        medians = [np.nanmedian(costs[block]) for costs in relative.values()]
        spread = [np.nanquantile(costs[block], [0.1, 0.9]) for costs in relative.values()]
        errors = np.abs(np.array(spread).T - medians)
        where = np.arange(len(relative)) + (i - (len(blocks) - 1) / 2) * width
        axes.bar(where, medians, width, label=block, color=colours[i])
        axes.errorbar(where, medians, errors, fmt="none", ecolor="black", elinewidth=0.6)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(np.arange(len(relative)), [n.replace(" ", "\n") for n in relative], fontsize=8)
    axes.set_ylabel(f"latency relative to {REFERENCE}, same shape")
    axes.set_title(f"Blocks of {space.name}: median over shapes, bars from 10 % to 90 %")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ranks(ranks: np.ndarray, names: list[str], path: Path) -> None:
    side = 0.75 * len(names) + 2
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(ranks, cmap="viridis", vmin=min(0.5, ranks.min()), vmax=1)
    for (i, j), value in np.ndenumerate(ranks):
        colour = "black" if value > 0.8 else "white"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), [n.replace(" ", "\n") for n in names], fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(f"Spearman between devices, {NETWORKS} random networks")
    figure.colorbar(image, shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def words(
    space: SearchSpace, relative: dict[str, dict], ranks: np.ndarray, names: list[str]
) -> str:
    blocks = [block for block in space.blocks if block != "skip"]
    lines = [
        f"# Devices in space {space.name}",
        "",
        f"Latency relative to {REFERENCE} of the same shape, median over shapes:",
        "",
        f"| device | {' | '.join(blocks)} |",
        "|---" * (len(blocks) + 1) + "|",
    ]
    for name, costs in relative.items():
        cells = [f"{np.nanmedian(costs[block]):.2f}" for block in blocks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "What a 5x5 depthwise costs against a 3x3, median over shapes (10 % to 90 %):",
        "",
    ]
    lines += [f"| device | {' | '.join(f'{b} / {a}' for a, b in PAIRS)} |", "|---|---|---|---|"]
    for name, costs in relative.items():
        cells = []
        for three, five in PAIRS:
            low, median, high = np.nanquantile(costs[five] / costs[three], [0.1, 0.5, 0.9])
            cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Spearman between devices over {NETWORKS} random networks:", ""]
    lines += [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in zip(names, ranks, strict=True):
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
