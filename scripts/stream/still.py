"""What do features save that are reused where a still camera sees nothing move?

    python scripts/stream/still.py WORK IMAGENETTE_FOLDER [--out DIR] [--images 60] [--frames 20]

A video is made of test images of IMAGENETTE_FOLDER (train/CLASS/, val/CLASS/): each is seen for
--frames frames, 224 x 224, by a camera that stands still and whose sensor is noisy (a standard
deviation of 2 levels), while a part of another image, 48 x 48, crosses it at 6 pixels a frame; then
the next image follows. A network of uniform blocks is trained for it, exported by the product as
fp32, and run by `fbnas.export.stream.Stream` with one thread of ONNX Runtime: with threshold 0,
which computes all, with the threshold alone, and with regions at several places of the network.
Interleaved in rounds. WORK keeps the network.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from fbnas.export.regions import Regions
from fbnas.latency import Device
from fbnas.space import SearchSpace
from fbnas.training import load_data

sys.path.append(str(Path(__file__).parents[1]))
from measure import in_rounds, network_file, pixels
from steps import circumstances

HERE = Path(__file__).parent
SIZE, THING, STEP, NOISE = 224, 48, 6, 2.0
THRESHOLD = 4.0
PLACES = (None, 0.2, 0.4, 0.6, 0.8)  # None: no regions
WAYS = [(0.0, None), *((THRESHOLD, place) for place in PLACES)]


def video(images: np.ndarray, frames: int, seed: int) -> list[np.ndarray]:
    """Frames (224, 224, 3) uint8: a thing crosses each image, and noise."""
    rng, made = np.random.default_rng(seed), []
    for number, image in enumerate(images):
        other = Image.fromarray(images[number - 1]).resize((THING, THING))
        row, column = rng.integers(0, SIZE - THING, 2)
        for step in range(frames):
            left = (column + STEP * step) % (SIZE - THING)
            seen = image.astype(np.float64)
            seen[row : row + THING, left : left + THING] = np.asarray(other)
            seen += rng.normal(0, NOISE, seen.shape)
            made.append(np.clip(seen.round(), 0, 255).astype(np.uint8))
    return made


def measured(path: Path, frames: list[np.ndarray], labels: np.ndarray, rounds: int) -> pd.DataFrame:
    ways = [{"threshold": threshold, "regions": place} for threshold, place in WAYS]
    streams, rows = in_rounds(path, frames, labels, ways, rounds)
    parts = [stream.run if isinstance(stream.run, Regions) else None for stream in streams]
    about = {
        "threshold": [threshold for threshold, _ in WAYS],
        "regions": [np.nan if part is None else part.share for part in parts],
        "stride": [np.nan if part is None else part.reach.stride for part in parts],
        "radius": [np.nan if part is None else part.reach.radius for part in parts],
    }
    return pd.concat([pd.DataFrame(about), rows.rename(columns={"computed": "work"})], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("imagenette", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--frames", type=int, default=20, help="that an image stays")
    parser.add_argument("--space", default=str(HERE.parent / "results" / "imagenette.yaml"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    space = SearchSpace.load(arguments.space)
    data = load_data("image_folder", path=str(arguments.imagenette), resize=True, space=space)
    path = network_file(arguments.work, data, space, arguments.epochs, {"flip": True})
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    chosen = order[: arguments.images]
    labels = np.repeat(data.test.labels[chosen].numpy(), arguments.frames)
    frames = video(pixels(data.test, chosen), arguments.frames, 0)
    rows = measured(path, frames, labels, arguments.rounds)
    rows.to_csv(arguments.out / "still.csv", index=False, float_format="%.5g")
    lines = [
        f"{len(frames):,} frames of {len(chosen)} images, seed 0; threshold {THRESHOLD:g} levels.",
        "",
        circumstances(Device()),
        "| reused | stride, radius of the features | multiply-adds | accuracy | "
        "as by computing all | ms per frame (range) |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows.itertuples():
        regions = "" if np.isnan(r.regions) else f"{r.stride:.0f}, {r.radius:.0f}"
        name = "scores" if not regions else f"features, the first {100 * r.regions:.0f} %"
        lines.append(
            f"| {name if r.threshold else 'nothing'} | {regions} | {100 * r.work:.1f} % | "
            f"{100 * r.accuracy:.2f} % | {100 * r.agreement:.2f} % | {r.ms_per_frame:.3f} "
            f"({r.ms_from:.3f} to {r.ms_to:.3f}) |"
        )
    (arguments.out / "still.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
