"""A run as the page knows it: what a command left in a folder, read back."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fbnas.report.shapes import Space
from fbnas.report.tables import Table

Rows = list[dict[str, Any]]
Matrix = list[list[float | None]]  # (layers, blocks); None where a layer does not offer a block


@dataclass(frozen=True)
class Target:
    """A device's table and a budget, as theta.json names them."""

    table: str
    budget_ms: float | None
    base_ms: float
    latency_ms: Matrix


@dataclass(frozen=True)
class Search:
    """One search: a row per epoch, and its targets where theta.json is there already."""

    epochs: Rows
    blocks: tuple[str, ...]
    targets: tuple[Target, ...]

    def probabilities(self, epoch: int, target: int) -> Matrix:
        """Return softmax(theta), (layers, blocks), at a position of `epochs`."""
        return [softmax(row) for row in self.epochs[epoch]["targets"][target]["logits"]]

    def predicted_ms(self, blocks: Sequence[str], target: int) -> float:
        """Return what a target's table says of a network: base + the sum over layers, in ms."""
        known = self.targets[target]
        costs = [
            row[self.blocks.index(block)]
            for row, block in zip(known.latency_ms, blocks, strict=True)
        ]
        return known.base_ms + sum(cost or 0.0 for cost in costs)

    @property
    def first_of_table(self) -> dict[str, int]:
        """By table, the first of the targets that have it."""
        names = [target.table for target in self.targets]
        return {name: names.index(name) for name in dict.fromkeys(names)}


@dataclass(frozen=True)
class Choice:
    """The architecture the page draws and how it was come by."""

    blocks: tuple[str, ...]
    origin: str
    predicted_ms: float | None


@dataclass(frozen=True)
class Run:
    """All that the page knows of a folder; what a folder does not hold is empty or None."""

    folder: Path
    result: dict[str, Any]
    config: dict[str, Any]
    space: Space | None
    search: Search | None
    training: dict[str, Rows]  # "train", then every stage that was fine-tuned: a row per epoch
    tables: tuple[Table, ...]
    choice: Choice | None = field(default=None)
    front: dict[str, Any] | None = None  # networks judged by the search's shared weights

    label: str = ""  # where the folder's own name is not enough

    @property
    def name(self) -> str:
        """What the page calls it: the folder's own name."""
        return self.label or self.folder.resolve().name

    @property
    def command_line(self) -> str:
        """What was typed, empty where it was not recorded; an unfinished run's is in its config."""
        return str(self.result.get("command_line") or self.config.get("command_line") or "")

    @property
    def noise_floor(self) -> float | None:
        """Relative difference of test against retest, where it was measured."""
        calibration = self.result.get("calibration") or {}
        return self.result.get("noise_floor", calibration.get("noise_floor"))

    @property
    def has_several_targets(self) -> bool:
        """Whether a search served several: its result's own numbers are those of the first."""
        return len(self.result.get("targets") or ()) > 1

    @property
    def target_ms(self) -> float | None:
        """The budget that was asked for, or None where there was none, or several."""
        asked = None if self.has_several_targets else self.result.get("target_ms")
        return float(asked) if isinstance(asked, (int, float)) else None

    def block_ms(self, layer: int, block: str) -> float | None:
        """Return the latency that the search reckoned with for a block of a layer, in ms."""
        assert self.space is not None
        if self.search and self.search.targets and block in self.search.blocks:
            target = self.search.targets[self.target_index]
            return target.latency_ms[layer][self.search.blocks.index(block)]
        for table in self.tables:
            row = table.find(block, self.space.layers[layer].shape)
            if row is not None:
                return row.latency_ms * float(table.header.get("correction_scale", 1))
        return None

    @property
    def target_index(self) -> int:
        """Which of the search's targets the run's own target_ms is."""
        assert self.search is not None
        budgets = [math.inf if t.budget_ms is None else t.budget_ms for t in self.search.targets]
        if self.target_ms is None or not budgets:
            return 0
        asked = self.target_ms
        return min(range(len(budgets)), key=lambda i: abs(budgets[i] - asked))


def softmax(logits: Iterable[float | None]) -> list[float | None]:
    """Return the probabilities of a row of logits; None stays None."""
    row = list(logits)
    top = max(x for x in row if x is not None)
    powers = [None if x is None else math.exp(x - top) for x in row]
    total = sum(p for p in powers if p is not None)
    return [None if p is None else p / total for p in powers]
