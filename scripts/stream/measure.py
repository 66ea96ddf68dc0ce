"""What does reusing the scores of similar frames save, and what does it cost in accuracy?

    python scripts/stream/measure.py WORK CIFAR_FOLDER [--out DIR] [--images 300] [--frames 20]

A video is made of test images of CIFAR-10: each is seen for --frames frames through a camera that
moves (a window of 28 x 28 pixels on a slow walk, enlarged to 32 x 32), whose brightness drifts and
whose sensor is noisy (a standard deviation of 2 levels); then the next image follows without a
warning. A network is trained alone on CIFAR-10 first, exported by the product, and run by
`fbnas.export.stream.Stream` at several thresholds, one thread of ONNX Runtime.

The threshold that `choose_threshold` finds on a first video (of other images) is marked. Per
threshold: frames computed, accuracy over all frames, agreement with computing every frame, and
milliseconds per frame, interleaved over thresholds in rounds. WORK keeps the network.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from PIL import Image

from fbnas.commands.parts import card_for
from fbnas.export import export_onnx
from fbnas.export.stream import Stream, choose_threshold
from fbnas.latency import Device
from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import Data, TrainingSettings, load_data, train

sys.path.append(str(Path(__file__).parents[1]))
from steps import circumstances

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
THRESHOLDS = (0, 2, 4, 6, 8, 12, 16, 24, 32, 48)
SIZE, WINDOW, NOISE = 32, 28, 2.0


def network_file(
    work: Path, data: Data, space: SearchSpace, epochs: int, augment: dict[str, Any]
) -> Path:
    """Train a middling network of the space, once."""
    path = work / "model.onnx"
    if not path.is_file():
        architecture = Architecture(("k3_e3",) * len(space.layers), space.name)
        torch.manual_seed(0)
        network = build_network(space, architecture, classes=data.classes)
        settings = TrainingSettings(epochs=epochs, augment=augment)
        found = train(network, data, settings=settings, out=work / "train", resume=True)
        print(f"validation accuracy {found.validation_accuracy:.4f}", flush=True)
        export_onnx(network, path, card=card_for(space, architecture, data))
    return path


def video(images: np.ndarray, frames: int, seed: int) -> list[np.ndarray]:
    """Frames (32, 32, 3) uint8: a walk of a window over each image, drift and noise."""
    rng, made = np.random.default_rng(seed), []
    room = SIZE - WINDOW
    for image in images:
        place, light = rng.uniform(0, room, 2), 1.0
        for _ in range(frames):
            place = np.clip(place + rng.normal(0, 0.15, 2), 0, room)
            light = np.clip(light + rng.normal(0, 0.005), 0.9, 1.1)
            x, y = place
            box = (x, y, x + WINDOW, y + WINDOW)
            seen = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)
            noisy = np.asarray(seen, dtype=np.float64) * light + rng.normal(0, NOISE, image.shape)
            made.append(np.clip(noisy.round(), 0, 255).astype(np.uint8))
    return made


def pixels(images: object, order: torch.Tensor) -> np.ndarray:
    """Images (n, h, w, 3) uint8."""
    found: np.ndarray = images.batch(order).permute(0, 2, 3, 1).numpy()  # type: ignore[attr-defined]
    return found


def in_rounds(
    path: Path,
    frames: list[np.ndarray],
    labels: np.ndarray,
    ways: Sequence[dict[str, Any]],
    rounds: int,
) -> tuple[list[Stream], pd.DataFrame]:
    """Run a video by turns through streams of several options, the first of which computes all.

    Returns:
        The last stream of each, and its row: computed, accuracy, agreement, ms_per_frame and range.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    answers: list[np.ndarray] = []
    for _ in range(rounds):
        streams, answers = [Stream.load(path, **options) for options in ways], []
        for stream, times in zip(streams, seconds, strict=True):
            started = time.perf_counter()
            answers.append(np.array([stream(frame).scores.argmax() for frame in frames]))
            times.append(time.perf_counter() - started)
    rows = []
    for stream, found, times in zip(streams, answers, seconds, strict=True):
        ms = [1e3 * x / len(frames) for x in times]
        rows.append(
            {
                "computed": 1 - stream.saving,
                "accuracy": float((found == labels).mean()),
                "agreement": float((found == answers[0]).mean()),
                "ms_per_frame": statistics.median(ms),
                "ms_from": min(ms),
                "ms_to": max(ms),
            }
        )
    return streams, pd.DataFrame(rows)


def draw(rows: pd.DataFrame, chosen: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(100 * rows.computed, 100 * rows.accuracy, "o-", color="tab:blue")
    for r in rows.itertuples():
        axes.annotate(f"{r.threshold:g}", (100 * r.computed, 100 * r.accuracy), (4, 4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    mark = rows[rows.threshold == chosen]
    axes.plot(100 * mark.computed, 100 * mark.accuracy, "o", ms=12, mfc="none", color="tab:red",
              label=f"chosen on another video: {chosen:g} levels")  # fmt: skip
    axes.set_xlabel("frames computed, %")
    axes.set_ylabel("accuracy over all frames, %")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--images", type=int, default=300, help="of each of the two videos")
    parser.add_argument("--frames", type=int, default=20, help="that an image stays")
    parser.add_argument("--training-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    space = SearchSpace.load(HERE.parent / "cross_device" / "space.yaml")
    content = {**space.to_dict(), "name": "stream", "resolution": SIZE}
    space = SearchSpace.from_dict(content)
    data = load_data(
        "huggingface", path=str(arguments.cifar), limit=arguments.training_images, space=space
    )
    augment = {"crop_padding": 4, "flip": True}
    path = network_file(arguments.work, data, space, arguments.epochs, augment)
    whole = data.test
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    first, second = order[: arguments.images], order[arguments.images : 2 * arguments.images]

    def make(threshold: float) -> Stream:
        return Stream.load(path, threshold=threshold)

    candidates = [t for t in THRESHOLDS if t]
    chosen = choose_threshold(
        video(pixels(whole, first), arguments.frames, 0), make, candidates=candidates
    )
    labels = np.repeat(whole.labels[second].numpy(), arguments.frames)
    frames = video(pixels(whole, second), arguments.frames, 1)
    ways = [{"threshold": threshold} for threshold in THRESHOLDS]
    _, rows = in_rounds(path, frames, labels, ways, arguments.rounds)
    rows.insert(0, "threshold", THRESHOLDS)
    rows.to_csv(arguments.out / "result.csv", index=False, float_format="%.5g")
    draw(rows, chosen, arguments.out / "stream.png")
    lines = [
        f"{len(frames):,} frames of {arguments.images} images, seed 0.",
        "",
        circumstances(Device()),
        "| threshold, levels | computed | accuracy | as by computing all | ms per frame (range) |",
        "|---|---|---|---|---|",
    ]
    for r in rows.itertuples():
        name = f"**{r.threshold:g}**" if r.threshold == chosen else f"{r.threshold:g}"
        lines.append(
            f"| {name} | {100 * r.computed:.1f} % | {100 * r.accuracy:.2f} % | "
            f"{100 * r.agreement:.2f} % | {r.ms_per_frame:.4f} ({r.ms_from:.4f} to {r.ms_to:.4f}) |"
        )
    (arguments.out / "result.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
