"""fbnas compress: channel pruning of a network, or int8 of its file."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import check_class_names, data_for, data_of_file, network_folder
from fbnas.commands.train import report_epoch
from fbnas.compression import (
    ChannelPruning,
    CompressionReport,
    StaticQuantization,
    compress_,
    quantize_file,
)
from fbnas.errors import check_known, unknown
from fbnas.export import accuracy_of_file, export_onnx
from fbnas.space import NetworkCard, count, load_network, save_network
from fbnas.training.data import Data
from fbnas.training.evaluation import evaluate
from fbnas.training.loop import train
from fbnas.training.settings import TrainingSettings

METHODS = ("channel_pruning", "int8")


def main(config: dict[str, Any]) -> int:
    if config["method"] not in METHODS:
        raise unknown("method", config["method"], METHODS)
    check_compression(config)
    return _prune(config) if config["method"] == "channel_pruning" else _quantize(config)


def _prune(config: dict[str, Any]) -> int:
    network, card = load_network(network_folder(config["model"]))
    data = data_for(config, card.space)
    check_class_names(data, card.class_names)
    _, before = evaluate(network, data.validation, mean=card.mean, std=card.std)
    out = OutFolder(config)
    report = prune_and_tune(network, card, data, config, out.folder, resume=out.resume)
    _, accuracy = evaluate(network, data.test, mean=card.mean, std=card.std)
    print(f"parameters   {report.before.params:>12,} -> {report.after.params:,}")
    print(f"multiply-adds {report.before.macs:>11,} -> {report.after.macs:,}")
    print(f"validation accuracy {before:.4f} -> {report.trained.validation_accuracy:.4f}")
    print(f"test accuracy {accuracy:.4f}")
    out.finish(
        method="channel_pruning",
        params=report.after.params,
        macs=report.after.macs,
        params_before=report.before.params,
        macs_before=report.before.macs,
        accuracy_top1=accuracy,
        validation_accuracy=report.trained.validation_accuracy,
        validation_accuracy_before=before,
        architecture=list(card.architecture.blocks),
    )
    return 0


def prune_and_tune(
    network: Any,
    card: NetworkCard,
    data: Data,
    config: dict[str, Any],
    folder: Path,
    *,
    resume: bool,
) -> CompressionReport:
    """Prune in place, fine-tune, and save the network into `folder`.

    Raises:
        InputError: an unknown option of compression.pruning or compression.fine_tuning.
    """
    settings = tuning(config)
    report = compress_(
        network,
        pruning_of(config),
        input_shape=card.input_shape,
        train=lambda pruned: train(
            pruned,
            data,
            settings=settings,
            seed=config["seed"],
            out=folder,
            resume=resume,
            on_epoch=report_epoch(settings.epochs, every=5),
        ),
    )
    save_network(folder, network, card)
    return report


def _quantize(config: dict[str, Any]) -> int:
    model = Path(config["model"])
    card = None
    if not (model.is_file() and model.suffix == ".onnx"):
        network, card = load_network(network_folder(model))
        mean, std = card.mean, card.std
        data = data_for(config, card.space)
        check_class_names(data, card.class_names)
    else:
        data, mean, std = data_of_file(config, model)
    out = OutFolder(config)
    source = model
    if card is not None:
        source = out.folder / "fp32.onnx"
        export_onnx(network, source, card=card)
    target = out.folder / "model.onnx"
    report = quantize_file(source, target, data, quantization_of(config), seed=config["seed"])
    before, after = (accuracy_of_file(f, data.test, mean=mean, std=std) for f in (source, target))
    print(f"{target}: {report.bytes_before:,} -> {report.bytes_after:,} bytes")
    print(f"test accuracy {before:.4f} -> {after:.4f}")
    counted = count(network, card.input_shape) if card is not None else None
    out.finish(
        method="int8",
        model_bytes=report.bytes_after,
        model_bytes_before=report.bytes_before,
        accuracy_top1=after,
        accuracy_top1_before=before,
        calibration_images=report.calibration_images,
        params=counted and counted.params,
        macs=counted and counted.macs,
    )
    return 0


def check_compression(config: dict[str, Any]) -> None:
    """Refuse wrong options of compression before anything is spent on what they come after.

    Raises:
        InputError: an unknown option, or a value out of its range.
    """
    options = config["compression"]
    check_known("part of compression", options, ("pruning", "fine_tuning", "quantization"))
    pruning_of(config)
    quantization_of(config)
    tuning(config)


def tuning(config: dict[str, Any]) -> TrainingSettings:
    """Return the settings of fine-tuning: the training's, but for compression.fine_tuning."""
    training = TrainingSettings.from_dict(config["training"])
    options = config["compression"]["fine_tuning"]
    check_known("option of compression.fine_tuning:", options, config["training"])
    return replace(training, **options)


def pruning_of(config: dict[str, Any]) -> ChannelPruning:
    """Build the method of `compression.pruning`."""
    options = config["compression"]["pruning"]
    known = [field.name for field in fields(ChannelPruning)]
    check_known("option of compression.pruning:", options, known)
    return ChannelPruning(**options)


def quantization_of(config: dict[str, Any]) -> StaticQuantization:
    """Build the method of `compression.quantization`."""
    options = config["compression"]["quantization"]
    known = [field.name for field in fields(StaticQuantization)]
    check_known("option of compression.quantization:", options, known)
    return StaticQuantization(**options)
