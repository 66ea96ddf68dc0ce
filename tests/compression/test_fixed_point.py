"""Fixed point: grids and lengths by their definition, dynamic against static formats on digits."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits_network import Trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fbnas.compression import ChannelPruning, FixedPoint, LowRank, compress_
from fbnas.compression.fixed_point import longest_fraction, round_to
from fbnas.errors import InputError
from fbnas.export import export_onnx
from fbnas.export.onnx import ParityError
from fbnas.latency import Device
from fbnas.latency.checks import check_path
from fbnas.space import load_network, save_network
from fbnas.space.structure import Rounding
from fbnas.training.data import batches


def grid(bits: int, fraction: int) -> Tensor:
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * 2.0**-fraction


@pytest.mark.parametrize("fraction", [-3, 0, 2, 9])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_gives_the_nearest_number_of_the_format(bits: int, fraction: int) -> None:
    numbers = grid(bits, fraction)
    x = torch.linspace(2 * float(numbers[0]), 2 * float(numbers[-1]), 997)
    nearest = (x[:, None] - numbers).abs().min(1).values
    for found in (round_to(x, bits, fraction), Rounding(bits, fraction)(x)):
        assert torch.isin(found, numbers).all()
        torch.testing.assert_close((x - found).abs(), nearest, rtol=0, atol=0)
    module = Rounding(bits, fraction)
    assert torch.equal(module.eval()(x), module.train()(x))


def test_gradients_pass_where_nothing_is_cut_off() -> None:
    x = torch.tensor([-3.0, -0.6, 0.2, 0.9, 5.0], requires_grad=True)
    Rounding(4, 2)(x).sum().backward()  # -2 to 1.75
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_longer_fraction_is_without_overflow(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.37, 1.0, 60.0):
        for values in (scale * torch.randn(50, generator=generator), torch.tensor([scale])):
            fraction = longest_fraction(values, bits)
            for longer in (0, 1):
                codes = (values.double() * 2.0 ** (fraction + longer)).round()
                low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
                assert bool(((codes >= low) & (codes <= high)).all()) == (longer == 0)


def test_ends_of_a_format() -> None:
    assert longest_fraction(torch.tensor([1.0]), 8) == 6  # 128 is no 8-bit number
    assert longest_fraction(torch.tensor([-1.0]), 8) == 7  # -128 is
    assert longest_fraction(torch.tensor([127.6 / 128]), 8) == 6  # rounds up to 128
    assert longest_fraction(torch.zeros(3), 8) == 7


def rounded(trained: Trained, **settings: Any) -> tuple[nn.Module, Any]:
    network = copy.deepcopy(trained.network)
    return network, compress_(network, FixedPoint(**settings), data=trained.data)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_everything_that_is_multiplied_is_on_its_grid(trained: Trained, static: bool) -> None:
    network, report = rounded(trained, bits=6, static=static)
    changes = {change.layer: change for change in report.changes}
    read: dict[str, Tensor] = {}
    for name in changes:
        layer = network.get_submodule(name)[1]
        layer.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    network(trained.data.validation.batch(torch.arange(32)).float() / 255)
    assert len(read) == len(changes) == 3 * 5 + 3
    for name, change in changes.items():
        layer = network.get_submodule(name)[1]
        for values, fraction in (
            (layer.weight, change.weights),
            (layer.bias, change.biases),
            (read[name], change.inputs),
        ):
            assert torch.isin(values.detach(), grid(6, fraction)).all()
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    lengths = [{getattr(x, part) for x in changes.values()} for part in ("weights", "inputs")]
    assert [len(x) == 1 for x in lengths] == [static, static]


def test_dynamic_formats_beat_static_ones(trained: Trained) -> None:
    """On validation digits, dynamic and static: the fewer bits the farther apart, until both fail.

    Measured, accuracy (in floats 0.930), and error of the scores relative to those in floats:
    8 bits 0.937 and 0.937, 0.08 and 0.15; 6 bits 0.882 and 0.847, 0.20 and 0.33;
    5 bits 0.847 and 0.275, 0.43 and 0.85; 4 bits 0.408 and 0.230, 0.80 and 1.00.
    """
    exact = scores(trained.network, trained)
    found, errors, an_image = {}, {}, 1.01 / len(trained.data.validation)
    for bits in (8, 6, 5, 4):
        for static in (False, True):
            network, report = rounded(trained, bits=bits, static=static)
            found[bits, static] = report.after.accuracy
            errors[bits, static] = float((scores(network, trained) - exact).norm() / exact.norm())
        tie = an_image if bits == 8 else 0.0
        assert found[bits, False] >= found[bits, True] - tie
        assert errors[bits, False] <= errors[bits, True]
    assert found[8, False] > report.before.accuracy - 0.01
    assert found[6, False] > report.before.accuracy - 0.1
    assert found[6, False] > found[6, True]
    assert found[5, False] > found[5, True] + 0.2


def scores(network: nn.Module, trained: Trained) -> Tensor:
    data = trained.data
    shown = batches(data.validation, 512, mean=data.mean, std=data.std)
    with torch.no_grad():
        return torch.cat([network(images) for images, _ in shown])


def test_saturating_weights_have_less_squared_error(trained: Trained) -> None:
    """Against 16 bits, whose weights are those in floats but for 1e-4 of the largest."""
    exact, closest = rounded(trained, bits=16)
    layers = [change.layer for change in closest.changes]

    def errors(saturate: bool) -> list[float]:
        network, _ = rounded(trained, bits=4, saturate=saturate)
        pairs = ([m.get_submodule(x)[1].weight.detach() for m in (exact, network)] for x in layers)
        return [float((left - right).square().sum()) for left, right in pairs]

    pairs = list(zip(errors(saturate=False), errors(saturate=True), strict=True))
    assert all(cut <= whole * (1 + 1e-3) for whole, cut in pairs)
    assert sum(cut for _, cut in pairs) < 0.95 * sum(whole for whole, _ in pairs)


def test_maps_that_two_layers_read_have_one_format(trained: Trained) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 10, 6)
            self.right = nn.Conv2d(4, 10, 6)

        def forward(self, images: Tensor) -> Tensor:
            stem = self.stem(images)
            return (self.left(stem) + 9 * self.right(stem)).flatten(1)

    from fbnas.training.data import load_data

    torch.manual_seed(0)
    network = Forked()
    report = compress_(network, FixedPoint(bits=5), input_shape=(1, 8, 8), data=load_data("digits"))
    fractions = {change.layer: change.inputs for change in report.changes}
    assert fractions["left"] == fractions["right"]
    assert isinstance(network.left[0], Rounding)


def test_a_rounded_network_goes_on(trained: Trained, tmp_path: Path) -> None:
    """Saved, loaded, exported with the same scores, factored before, pruned after."""
    network = copy.deepcopy(trained.network)
    methods = [LowRank(energy=0.9), FixedPoint(bits=8)]
    for further in (methods, [ChannelPruning(ratio=0.25, round_to=4)]):
        report = compress_(network, further, data=trained.data)
        save_network(tmp_path, network, trained.card)
        loaded, _ = load_network(tmp_path)
        images = torch.randn(3, *trained.card.input_shape)
        with torch.no_grad():
            assert torch.equal(loaded(images), network.eval()(images))
        exported = export_onnx(loaded, tmp_path / "model.onnx", card=trained.card)
        assert exported.argmax_agreement == 1
        assert exported.max_error < 1e-6  # sums of fixed-point numbers are exact in any order
    assert report.after.macs < report.before.macs
    assert str(loaded) == str(network)


def test_a_rounded_network_may_differ_by_steps_from_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sums with long fractional lengths are not exact: 2e-3 apart at 8 bits on CIFAR-10, measured.

    A file and a device's check allow a network in floats 1e-3 as ever.
    """
    monkeypatch.setattr("fbnas.export.onnx.compare", lambda *_: (0.01, 1.0))
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rounded = nn.Sequential(Rounding(8, 4), *plain)
    assert export_onnx(rounded, tmp_path / "a.onnx", input_shape=(1, 8, 8)).max_error == 0.01
    with pytest.raises(ParityError, match=r"tolerance 1e-03"):
        export_onnx(plain, tmp_path / "b.onnx", input_shape=(1, 8, 8))
    for network, tolerance in ((rounded, 0.3), (plain, 1e-3)):
        Device().compile(network, (1, 8, 8), tmp_path / "c.onnx")
        assert np.load(check_path(tmp_path / "c.onnx"))["tolerance"] == tolerance


def test_a_file_without_a_normalisation_that_was_not_folded_is_refused(
    trained: Trained, tmp_path: Path
) -> None:
    save_network(tmp_path, trained.network, trained.card)
    tensors = load_file(tmp_path / "weights.safetensors")
    save_file(
        {key: x for key, x in tensors.items() if not key.startswith("stem.1.")},
        tmp_path / "weights.safetensors",
    )
    with pytest.raises(InputError, match=r"belong to another network: .*stem\.1\.weight"):
        load_network(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1}, "bits is 1; expected a whole number from 2 to 16"),
        ({"bits": 17}, "bits is 17; expected"),
        ({"candidates": 0}, "candidates is 0; expected at least 1"),
        ({"images": 0}, "images is 0; expected at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        FixedPoint(**settings)


def test_data_is_needed(trained: Trained) -> None:
    with pytest.raises(InputError, match="got no data; expected data="):
        compress_(copy.deepcopy(trained.network), FixedPoint())


def test_a_layer_that_is_called_twice_has_one_format(trained: Trained) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.last = nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            y = self.again(self.again(self.first(x)).relu())
            return self.last(y.relu().mean((2, 3)))

    shape = tuple(trained.data.train.batch(torch.arange(1)).shape[1:])
    report = compress_(Twice(), FixedPoint(bits=6), data=trained.data, input_shape=shape)
    assert sorted(change.layer for change in report.changes) == ["again", "first", "last"]
