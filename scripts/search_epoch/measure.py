"""Seconds per epoch of search=fast and search=fbnet, same space, data and batch, interleaved.

    .venv/bin/python scripts/search_epoch/measure.py --space quickstart --rounds 5

Each round visits, in random order, a warm-up epoch and an epoch with theta awake of both recipes.
Prints the median, the spread, the noise (the same thing twice) and what a whole search costs by
each recipe's schedule.
"""

import argparse
import random
import statistics
from dataclasses import replace

from fbnas.files import read_yaml
from fbnas.search import SearchSettings, Target, latency_range, search
from fbnas.shipped import find
from fbnas.space import SearchSpace, build_block, count
from fbnas.training.data import load_data


class MultiplyAdds:
    """A stand-in for a table: what it says does not change the time."""

    def tensor(self, space: SearchSpace, *, classes: int | None = None):  # type: ignore[no-untyped-def]
        import torch

        rows = torch.full((len(space.layers), len(space.blocks)), torch.nan).double()
        for layer in space.layers:
            for name in layer.blocks:
                block = build_block(name, layer.in_channels, layer.out_channels, layer.stride)
                shape = (layer.in_channels, layer.height, layer.width)
                identity = not list(block.parameters())
                macs = 0 if identity else count(block, shape).macs
                rows[layer.index, space.blocks.index(name)] = macs / 1e6
        return rows, 1.0


def recipe(name: str, batch_size: int) -> SearchSettings:
    content = {k: v for k, v in read_yaml(find("search", name)).items() if k != "defaults"}
    return replace(SearchSettings(**content), batch_size=batch_size)


def epoch_seconds(settings: SearchSettings, *, awake: bool, space, data, target) -> float:  # type: ignore[no-untyped-def]
    """One epoch, asleep or awake, after one that warms the machine up."""
    settings = replace(settings, epochs=3, warmup_epochs=0 if awake else 2)
    rows = []
    search(space, data, [target], settings=settings, on_epoch=rows.append)
    return rows[1]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="quickstart")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    space = SearchSpace.load(options.space)
    data = load_data("digits", resize=True, channels=space.input_channels, space=space)
    table = MultiplyAdds()
    target = Target(table, sum(latency_range(*table.tensor(space))) / 2)
    recipes = {name: recipe(name, options.batch_size) for name in ("fast", "fbnet")}
    visits = [(name, awake, twin) for name in recipes for awake in (False, True) for twin in (0, 1)]
    seconds: dict[tuple[str, bool], list[list[float]]] = {}
    for number in range(options.rounds):
        random.Random(number).shuffle(visits)
        for name, awake, twin in visits:
            took = epoch_seconds(recipes[name], awake=awake, space=space, data=data, target=target)
            seconds.setdefault((name, awake), [[], []])[twin].append(took)
            print(
                f"round {number + 1} {name} {'awake' if awake else 'warm-up'}: {took:.2f} s",
                flush=True,
            )
    print(f"\n{len(data.train)} training images, batch {options.batch_size}, space {space.name}")
    medians = {}
    for (name, awake), (first, second) in sorted(seconds.items()):
        both = first + second
        medians[name, awake] = statistics.median(both)
        noise = abs(statistics.median(first) / statistics.median(second) - 1)
        print(
            f"{name:6} {'theta awake' if awake else 'warm-up':11} "
            f"median {medians[name, awake]:.2f} s ({min(both):.2f} to {max(both):.2f}), "
            f"test against retest {100 * noise:.1f} %"
        )
    means = {}
    for name, settings in recipes.items():
        asleep = settings.warmup / settings.epochs
        means[name] = asleep * medians[name, False] + (1 - asleep) * medians[name, True]
        print(
            f"{name}: {means[name]:.2f} s an epoch over its schedule ({100 * asleep:.0f} % warm-up)"
        )
    print(f"fbnet / fast: {means['fbnet'] / means['fast']:.2f}")


if __name__ == "__main__":
    main()
