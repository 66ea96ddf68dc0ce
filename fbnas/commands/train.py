"""fbnas train: one architecture, best by validation."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbnas.commands.folder import OutFolder
from fbnas.commands.heads import head_on
from fbnas.commands.parts import card_for, data_for, search_folder, space_for
from fbnas.commands.teachers import (
    SUPERNET,
    Sources,
    check_teacher,
    search_beside,
    teacher_of,
)
from fbnas.errors import InputError
from fbnas.files import write_yaml
from fbnas.search import read_result, read_supernet
from fbnas.space import (
    Architecture,
    Network,
    NetworkCard,
    SearchSpace,
    build_network,
    count,
    save_network,
)
from fbnas.space.heads import FrozenBackbone
from fbnas.training.data import Data
from fbnas.training.heads import Accuracy, judge_network, task_of
from fbnas.training.loop import TrainingResult, train
from fbnas.training.reading import wait_words
from fbnas.training.settings import TrainingSettings


def main(config: dict[str, Any]) -> int:
    settings = TrainingSettings.from_dict(config["training"])
    if config["backbone"]:
        return _train_head(config, settings)
    if config["architecture"] is None:
        raise InputError(
            "fbnas train needs architecture=...; a file, or fbnet_a, fbnet_b, fbnet_c, "
            "fbnet_iphonex, fbnet_s8. See: fbnas train --help"
        )
    architecture = Architecture.load(config["architecture"])
    space = space_for(config, architecture)
    architecture.path(space)
    check_teacher("teacher", config["teacher"], words=(SUPERNET,))
    data = data_for(config, space)
    teacher = teacher_of(config["teacher"], data, Sources(search_beside(config)))
    torch.manual_seed(config["seed"])
    network = start(space, architecture, data.classes, config["supernet"])
    out = OutFolder(config)
    result = train(
        network,
        data,
        settings=settings,
        seed=config["seed"],
        out=out.folder,
        resume=out.resume,
        on_epoch=report_epoch(settings.epochs),
        task=task_of(data.heads),
        teacher=teacher,
    )
    card = card_for(space, architecture, data)
    save_network(out.folder, result.network, card)
    write_yaml(out.folder / "space.yaml", space.to_dict())
    predicted_ms = architecture.provenance.get("predicted_latency_ms")
    _finish(out, result, result.network, card, data, predicted_latency_ms=predicted_ms)
    return 0


def _train_head(config: dict[str, Any], settings: TrainingSettings) -> int:
    """Train heads alone, on the features of a trained network that stays as it is."""
    model, card, data = head_on(config)
    out = OutFolder(config)
    result = train(
        model,
        data,
        settings=settings,
        seed=config["seed"],
        out=out.folder,
        resume=out.resume,
        on_epoch=report_epoch(settings.epochs),
        task=task_of(data.heads),
    )
    assert isinstance(result.network, FrozenBackbone)
    save_network(out.folder, result.network.network, card)
    _finish(out, result, result.network.network, card, data)
    return 0


def _finish(
    out: OutFolder,
    result: TrainingResult,
    network: nn.Module,
    card: NetworkCard,
    data: Data,
    **more: Any,
) -> None:
    """Judge a trained network on the test images, say it, and write result.json."""
    accuracy = judge_network(network, data, data.test)
    found = count(network, card.input_shape)
    print(describe(result, accuracy.all, out.folder))
    validation = judge_network(network, data, data.validation) if data.heads else Accuracy(0.0)
    for head, value in validation.heads.items():
        print(
            f"  {head}: validation accuracy {100 * value:.2f} %, test accuracy "
            f"{100 * accuracy.heads[head]:.2f} %"
        )
    out.finish(
        space=card.space.name,
        architecture=list(card.architecture.blocks),
        accuracy_top1=accuracy.all,
        validation_accuracy=result.validation_accuracy,
        accuracy_by_head=accuracy.heads or None,
        validation_accuracy_by_head=validation.heads or None,
        best_epoch=result.best_epoch,
        params=found.params,
        macs=found.macs,
        **more,
    )


def start(
    space: SearchSpace, architecture: Architecture, classes: int, supernet: str | None
) -> Network:
    """Build the network, fresh or with a copy of the shared weights of the search in `supernet`.

    Raises:
        InputError: the search was for another space or number of classes.
    """
    if supernet is None:
        return build_network(space, architecture, classes)
    folder = search_folder(supernet)
    searched, _, searched_classes = read_result(folder)
    searched = searched.at(space.resolution)  # shared weights are the same at all
    if searched.to_dict() != space.to_dict() or searched_classes != classes:
        raise InputError(
            f"{folder} was searched in space {searched.name} with {searched_classes} classes; this "
            f"is {space.name} with {classes}: only the same space shares weights."
        )
    return read_supernet(folder, searched, classes).network(architecture)


def report_epoch(epochs: int, every: int = 1) -> Any:
    """Return a function that prints a line for an epoch's row."""

    def show(row: dict[str, Any]) -> None:
        if (row["epoch"] + 1) % every and row["epoch"] + 1 != epochs:
            return
        print(
            f"epoch {row['epoch'] + 1:3d}/{epochs} | loss {row['loss']:.3f} "
            f"acc {100 * row['accuracy']:5.1f} % | validation loss {row['validation_loss']:.3f} "
            f"acc {100 * row['validation_accuracy']:5.1f} % | {row['seconds']:.1f} s"
            f"{wait_words(row)}",
            flush=True,
        )

    return show


def describe(result: TrainingResult, accuracy: float, folder: Path) -> str:
    """Say in a line what training came to."""
    return (
        f"{folder}: best epoch {result.best_epoch + 1}, validation accuracy "
        f"{100 * result.validation_accuracy:.2f} %, test accuracy {100 * accuracy:.2f} %"
    )
