"""What int8 loses where sums are cut off at 16 bits, and what weights of 7 bits give back.

    python scripts/saturation/judge.py WORK DATA [--dataset cifar|imagenette] [--train-epochs N]
        [--out DIR]

WORK, DATA and the options are those of `scripts/results/measure.py`, whose step `train` was done on
this machine: of every network that it trained here two int8 files are written, weights of 8 and of
7 bits, and judged on all test images as this machine computes them, and the former also with whole
sums, imitated in float. Then the files are timed against each other (wants a quiet machine). The
page says whether this machine cuts sums off at all.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "results"))
from measure import PRESETS, Contender, data_of
from steps import circumstances, spread

from fbnas.compression import StaticQuantization, quantize_file
from fbnas.export import accuracy_of_file, export_onnx
from fbnas.latency import Device
from fbnas.latency.saturation import saturates
from fbnas.latency.session import open_session, run
from fbnas.space import SearchSpace
from fbnas.training import Data, TrainingSettings, train
from fbnas.training.data import batches

HERE = Path(__file__).parent
BITS = {8: False, 7: True}


def whole_sums_accuracy(path: Path, data: Data) -> float:
    """Of a file's int8 with no sum cut off, on the test images."""
    session, correct = open_session(path, threads=2, whole_sums=True), 0
    for images, labels in batches(data.test, 100, mean=data.mean, std=data.std):
        correct += int((run(session, images).argmax(1) == labels).sum())
    return correct / len(data.test)


def judged(options: argparse.Namespace, study: argparse.Namespace, row: pd.Series) -> dict | None:
    """A network's accuracies and files, None of one that was not trained on this machine."""
    one, seed = Contender.of_row(row), int(row.seed)
    stem = one.name.replace(" ", "_")
    folder, files = options.work / "train" / str(seed) / stem, options.work / "saturation"
    if not folder.is_dir():
        return None
    torch.manual_seed(seed)
    settings = TrainingSettings(
        epochs=options.train_epochs, batch_size=options.batch, augment={"flip": True}, device="cpu"
    )
    network = one.build(study)
    network = train(network, study.data, settings=settings, seed=seed, out=folder, resume=True)
    fp32 = files / f"{seed}_{stem}.onnx"
    files.mkdir(exist_ok=True)
    export_onnx(network.network, fp32, card=one.card(study))
    data, statistics = study.data, {"mean": study.data.mean, "std": study.data.std}
    found = {
        "seed": seed,
        "name": one.name,
        "fp32": accuracy_of_file(fp32, data.test, **statistics),
    }
    for bits, reduce_range in BITS.items():
        path = fp32.with_suffix(f".{bits}.onnx")
        quantize_file(fp32, path, data, StaticQuantization(reduce_range=reduce_range))
        found[f"int8_{bits}"] = accuracy_of_file(path, data.test, threads=1, **statistics)
        found[f"file_{bits}"] = path
    found["whole_sums"] = whole_sums_accuracy(found["file_8"], data)
    print({k: v for k, v in found.items() if not k.startswith("file")}, flush=True)
    return found


def page(result: pd.DataFrame, about: str, noise: float, test_images: int) -> str:
    losses = {
        "weights of 8 bits": result.int8_8 - result.fp32,
        "weights of 8 bits, sums whole": result.whole_sums - result.fp32,
        "weights of 7 bits": result.int8_7 - result.fp32,
    }
    cuts = "cuts sums of int8 products off" if saturates(Device()) else "cuts no sums off"
    ratio = result.ms_7 / result.ms_8
    lines = [
        "# int8 where sums are cut off at 16 bits",
        "",
        about,
        "",
        f"This machine {cuts} (`fbnas.latency.saturation`). {len(result)} networks, accuracy on "
        f"{test_images} test images; int8 less fp32, points, over networks:",
        "",
        "| int8 | mean ± deviation | worst |",
        "|---|---|---|",
        *(f"| {name} | {spread(loss)} | {100 * loss.min():.2f} |" for name, loss in losses.items()),
        "",
        f"Files with weights of 7 bits take {ratio.median():.3f} of the time of those with 8 "
        f"({ratio.min():.3f} to {ratio.max():.3f}; noise floor {100 * noise:.1f} %).",
        "",
        "| seed | network | fp32, % | 8 bits, % | 8 bits, sums whole, % | 7 bits, % | ms, 8 bits | "
        "ms, 7 bits |",
        "|---" * 8 + "|",
    ]
    for r in result.itertuples():
        accuracies = (r.fp32, r.int8_8, r.whole_sums, r.int8_7)
        shown = " | ".join(f"{100 * x:.2f}" for x in accuracies)
        lines.append(f"| {r.seed} | {r.name} | {shown} | {r.ms_8:.4f} | {r.ms_7:.4f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", type=Path, help="folder of scripts/results, its networks trained here")
    add("data", type=Path, help="folder of the images")
    add("--dataset", default="cifar", choices=PRESETS)
    add("--train-epochs", type=int, help="as there")
    add("--out", type=Path, default=HERE, help="folder for the result (default: beside this)")
    options = parser.parse_args()
    preset = PRESETS[options.dataset]
    options.images, options.batch = preset["images"], preset["batch"]
    options.train_epochs = options.train_epochs or preset["train_epochs"]
    space = SearchSpace.load(preset["space"])
    study = argparse.Namespace(space=space, data=data_of(options, space))
    networks = pd.read_csv(options.work / "networks.csv")
    trained = pd.read_csv(options.work / "trained.csv")[["seed", "name"]]
    rows = [judged(options, study, row) for _, row in networks.merge(trained).iterrows()]
    result = pd.DataFrame([row for row in rows if row is not None])
    files = [*result.file_8, *result.file_7]
    found = Device(precision="int8").measure_quietly(files, f"Timing {len(files)} files")
    times = [timing.latency_ms for timing in found.whole]
    result["ms_8"], result["ms_7"] = times[: len(result)], times[len(result) :]
    result = result.drop(columns=["file_8", "file_7"])
    result.to_csv(options.out / "result.csv", index=False, float_format="%.6g")
    about = circumstances(Device(precision="int8"))
    text = page(result, about, found.noise_floor, len(study.data.test))
    (options.out / "result.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
