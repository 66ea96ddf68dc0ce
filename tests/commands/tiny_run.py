"""A space small enough for whole runs in tests, a table of it by formula, and overrides."""

from pathlib import Path
from typing import Any

import yaml

from fbnas.latency.devices import Device
from fbnas.latency.profiling import plan
from fbnas.latency.table import LatencyTable
from fbnas.latency.table_file import Entry
from fbnas.space import SearchSpace

SPACE = {
    "name": "tiny",
    "resolution": 8,
    "input_channels": 1,
    "stem": {"channels": 8, "stride": 1},
    "stages": [
        {"channels": 8, "layers": 1, "stride": 1},
        {"channels": 16, "layers": 2, "stride": 2},
    ],
    "head": 32,
    "blocks": ["k3_e1", "k3_e3", "k5_e1", "skip"],
}
BLOCK_MS = {"k3_e1": 1.0, "k3_e3": 3.0, "k5_e1": 2.0, "skip": 0.5}
OVERHEAD_MS = 0.1  # that every row includes; a network has it once
BASE_MS = 3.1  # stem, head and classifier, a ms each, and the overhead
FASTEST_MS, SLOWEST_MS = 3.6, 12.1  # identity, skip and identity; k3_e3 three times
SMALL = [
    "data=digits",
    "data.limit=320",
    "search.epochs=3",
    "training.epochs=2",
    "compression.fine_tuning.epochs=1",
    "compression.methods=[channel_pruning,int8]",  # the default measures: it depends on the clock
    "compression.quantization.pays=false",
]


def write_space(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SPACE, **changes}))
    return path


def write_table(path: Path, **header: str) -> Path:
    """A table of this machine with `BLOCK_MS`: a search with it depends on no clock."""
    stated = {**Device().fingerprint(), "batch": "1", "noise_floor": "0.01", "space": "tiny"}
    entries = []
    for item in plan(SearchSpace.from_dict(dict(SPACE)), classes=10, context=False):
        identity = (
            item.block == "skip" and item.stride == 1 and item.in_channels == item.out_channels
        )
        ms = BLOCK_MS.get(item.block, 0.0 if item.block == "overhead" else 1.0) + OVERHEAD_MS
        ms = 0.0 if identity else round(ms, 6)
        entries.append(Entry(item, ms, ms, ms, 0 if identity else 20))
    LatencyTable({**stated, **header}, entries).save(path)
    return path
