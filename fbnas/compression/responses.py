"""What layers answer to training images, at a few random places of each."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fbnas.compression.quantization import StaticQuantization, calibration_images
from fbnas.errors import InputError
from fbnas.modes import modes_kept

if TYPE_CHECKING:
    from fbnas.compression.method import Tools

BATCH = 64


def training_images(tools: "Tools", count: int, device: torch.device) -> list[Tensor]:
    """Return batches (n, c, h, w) of training images, normalised, in a seeded random choice.

    Raises:
        InputError: there is no data.
    """
    if tools.data is None:
        raise InputError(
            "compress_ got no data; expected data=, as of load_data, whose training images show "
            "what the layers answer."
        )
    chosen = StaticQuantization(calibration_images=count, batch_size=BATCH)
    shown = calibration_images(tools.data, chosen, seed=tools.seed)
    return [torch.from_numpy(images).to(device) for images in shown]


@torch.no_grad()
def outputs_of(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    images: Sequence[Tensor],
    *,
    places: int,
    seed: int,
) -> dict[str, Tensor]:
    """Return rows (n * places, d) of what each module gives out: all channels at random places.

    The same seed chooses the same places, so that rows of a network and of its copy are pairs. Of
    a linear layer all rows are taken. The network computes in eval mode, and no further than to
    the last of the modules where that is one.
    """
    return _collected(model, modules, images, places, seed, of_inputs=False)


@torch.no_grad()
def inputs_of(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    images: Sequence[Tensor],
    *,
    places: int,
    seed: int,
) -> dict[str, Tensor]:
    """Return rows of what each module reads, as `outputs_of`."""
    return _collected(model, modules, images, places, seed, of_inputs=True)


def _collected(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    images: Sequence[Tensor],
    places: int,
    seed: int,
    *,
    of_inputs: bool,
) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    met: set[str] = set()  # in this batch
    generators = {name: torch.Generator().manual_seed(seed) for name in modules}

    def hook(name: str) -> Any:
        def take(_: nn.Module, inputs: Any, output: Any = None) -> None:
            if name in met:
                return  # called again: its first call stands for it
            met.add(name)
            seen = inputs[0] if of_inputs else output
            rows[name].append(_sampled(seen, places, generators[name]))
            if len(modules) == 1:
                raise _Reached

        return take

    hooks = [
        module.register_forward_pre_hook(hook(name))
        if of_inputs
        else module.register_forward_hook(hook(name))
        for name, module in modules.items()
    ]
    try:
        with modes_kept(model):
            model.eval()
            for batch in images:
                met.clear()
                try:
                    model(batch)
                except _Reached:
                    continue
    finally:
        for registered in hooks:
            registered.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


class _Reached(Exception):  # noqa: N818 - the rest of a network need not be computed
    pass


def _sampled(features: Tensor, places: int, generator: torch.Generator) -> Tensor:
    """Return channels at random places of each image: (n, d, h, w) to (n * places, d)."""
    if features.ndim != 4:
        return features.reshape(-1, features.shape[-1]).clone()
    flat = features.flatten(2)
    count, channels, area = flat.shape
    if area > places:
        chosen = torch.randint(area, (count, 1, places), generator=generator).to(flat.device)
        flat = flat.gather(2, chosen.expand(count, channels, places))
    return flat.transpose(1, 2).reshape(-1, channels).clone()
