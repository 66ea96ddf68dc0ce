"""Unstructured pruning: the smallest weights become zero (Han et al. 2015, arXiv 1506.02626).

The network keeps its shape and stays dense to every runtime here: what it saves is storage, in
files that are packed. It is no faster (fbnas measures that); for speed there is ChannelPruning.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from fbnas.compression.layer_scan import LayerScan, scan, write_scan
from fbnas.compression.magnitude import (
    CONVOLUTION,
    LINEAR,
    Layers,
    check_fraction,
    check_layers,
    gradual,
    kind_of,
    prunable,
    sparsity_of,
    zero_smallest_,
)
from fbnas.compression.method import Applied, Method, Tools
from fbnas.errors import InputError, check_known, unknown
from fbnas.files import atomic_write

SCOPES = ("global", "layer", "sensitivity")
TABLE_FILE = "sparsity.csv"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sparsity(Method):
    """Zero the weights of smallest magnitude, in steps, with fine-tuning after each.

    Args:
        sparsity: the fraction of the weights of the pruned layers that ends as zero, 0 <= s < 1;
            zeros that are there before count.
        scope: "global" ranks the weights of all layers against each other; "layer" zeroes the same
            fraction of each; "sensitivity" first scans each layer alone on validation images,
            takes as its threshold the magnitude at which the accuracy leaves the tolerance, and
            multiplies all thresholds by the one factor that meets `sparsity`.
        steps: prune by and by along the cubic schedule of Zhu & Gupta 2017 (arXiv 1710.01878), and
            fine-tune after each step; 1 prunes at once.
        kinds: of layers to prune: convolution, depthwise, linear. Depthwise filters are left whole
            as in Zhu & Gupta's MobileNets and in Elsen et al. 2020 (arXiv 1911.09723): they hold a
            percent of the weights, and each is all that its channel sees.
        min_weights: leave smaller layers alone, such as a first convolution.
        max_sparsity: with "global" and "sensitivity" no layer loses more than this fraction, so
            that none is emptied.
        tolerance: of the scan: what the accuracy may lose to one layer, 0 to 1.
        scan: the sparsities of the scan, each in (0, 1).
        scan_images: at most so many validation images for the scan.
        layers: of single layers by name, the fraction that ends as zero there, as Han et al. 2015
            state them; `sparsity`, `scope` and `max_sparsity` are for the others.
    """

    NAME: ClassVar[str] = "sparsity"
    SECTION: ClassVar[str] = "sparsity"

    sparsity: float = 0.8
    scope: str = "global"
    steps: int = 3
    kinds: Sequence[str] = (CONVOLUTION, LINEAR)
    min_weights: int = 0
    max_sparsity: float = 0.99
    tolerance: float = 0.02
    scan: Sequence[float] = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    scan_images: int = 1000
    layers: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)
        if self.scope not in SCOPES:
            raise unknown("scope of sparsity", self.scope, SCOPES)
        for name, least in (("steps", 1), ("scan_images", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} is {getattr(self, name)}; expected a whole number of at least {least}."
                )
        if not self.sparsity <= self.max_sparsity <= 1:
            raise InputError(
                f"max_sparsity is {self.max_sparsity}; expected from sparsity, {self.sparsity}, to "
                "1: no layer may otherwise lose what all lose together."
            )
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}; expected more than 0, less than 1.")
        if not self.scan or not all(_is_inner(s) for s in self.scan):
            raise InputError(
                f"scan is {self.scan}; expected a list of sparsities, each more than 0 and less "
                "than 1."
            )
        for name, sparsity in (self.layers or {}).items():
            check_fraction(f"sparsity of layer {name}", sparsity)
        object.__setattr__(self, "kinds", check_layers(self.kinds, self.min_weights))
        object.__setattr__(self, "scan", tuple(self.scan))

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Scan where asked to, then zero and fine-tune step by step."""
        layers = prunable(model, kinds=self.kinds, min_weights=self.min_weights)
        own = self.layers or {}
        check_known("layer to prune:", own, layers)
        others = {name: layer for name, layer in layers.items() if name not in own}
        scanned = others and self.scope == "sensitivity"
        scans = self._scan(model, others, tools) if scanned else {}
        scales = {name: found.threshold for name, found in scans.items()} or None
        plans = [({name: layers[name]}, found) for name, found in own.items()]
        if others:
            plans.append((others, self.sparsity))
        schedules = [
            (part, gradual(sparsity_of(part), sparsity, self.steps)) for part, sparsity in plans
        ]
        trained, changes = None, tuple[LayerSparsity, ...]()
        for step in range(self.steps):
            for part, sparsities in schedules:
                named = part is not others
                zero_smallest_(
                    part,
                    sparsities[step],
                    each=self.scope == "layer",
                    scales=None if named else scales,
                    max_sparsity=1.0 if named else self.max_sparsity,
                )
            changes = layer_sparsities(layers, scans)
            logger.info("%.1f %% of the weights are zero", 100 * sparsity_of(layers))
            trained = tools.tune(model)
        if tools.folder is not None:
            write_layers(tools.folder / TABLE_FILE, changes)
        return Applied(changes, trained)

    def _scan(self, model: nn.Module, layers: Layers, tools: Tools) -> dict[str, LayerScan]:
        found = scan(
            model,
            layers,
            tools,
            sparsities=self.scan,
            tolerance=self.tolerance,
            images=self.scan_images,
        )
        if tools.folder is not None:
            write_scan(tools.folder, list(found.values()), tolerance=self.tolerance)
        return found


@dataclass(frozen=True)
class LayerSparsity:
    """A pruned layer: its weights, how many of them are zero, and the smallest magnitude kept.

    `threshold` is of the last pruning, before the fine-tuning that followed; 0 in a layer of zeros.
    `scan`: what the layer's sensitivity is, where it was asked for.
    """

    layer: str
    kind: str
    weights: int
    zeros: int
    threshold: float
    scan: LayerScan | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return self.zeros / self.weights


def layer_sparsities(
    layers: Layers, scans: dict[str, LayerScan] | None = None
) -> tuple[LayerSparsity, ...]:
    """Say of each layer how sparse it is."""
    found = []
    for name, layer in layers.items():
        magnitudes = layer.weight.detach().abs()
        kept = magnitudes[magnitudes > 0]
        found.append(
            LayerSparsity(
                name,
                kind_of(layer),
                magnitudes.numel(),
                magnitudes.numel() - kept.numel(),
                float(kept.min()) if kept.numel() else 0.0,
                (scans or {}).get(name),
            )
        )
    return tuple(found)


def write_layers(path: Path, layers: Sequence[LayerSparsity]) -> None:
    """Write a row per layer."""
    lines = ["layer,kind,weights,zeros,sparsity,threshold"]
    lines += [
        f"{x.layer},{x.kind},{x.weights},{x.zeros},{x.sparsity:.6g},{x.threshold:.6g}"
        for x in layers
    ]
    atomic_write(path, "\n".join(lines) + "\n")


def _is_inner(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
