"""Features that are computed around what changed are those of the whole image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.export import export_onnx
from fbnas.export.regions import Box, Reach, Regions
from fbnas.export.stream import Stream
from fbnas.latency.lowering import quantize_onnx, write_onnx
from fbnas.latency.session import open_session
from fbnas.space import Architecture, NetworkCard, SearchSpace, Stage, Stem, build_network

SIDE = 64


def network(blocks: Sequence[str]) -> tuple[nn.Module, NetworkCard]:
    """Four layers with two strides before them, initialised."""
    stages = (Stage(8, 1, 1), Stage(16, 2, 2), Stage(16, 1, 2))
    space = SearchSpace("regions", SIDE, Stem(8, 2), stages, 32, blocks=tuple(sorted(set(blocks))))
    architecture = Architecture(tuple(blocks), space.name)
    torch.manual_seed(0)
    built = build_network(space, architecture, classes=5)
    for module in built.modules():  # residual blocks begin as the identity
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return built.eval(), NetworkCard(space, architecture, tuple("abcde"), (0.5,) * 3, (0.3,) * 3)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regions")
    built, card = network(("k3_e3", "k5_e3", "k3_e3", "k5_e1"))
    export_onnx(built, folder / "fp32.onnx", card=card)
    if request.param == "fp32":
        return folder / "fp32.onnx"
    shown = [np.random.default_rng(0).standard_normal((8, 3, SIDE, SIDE)).astype(np.float32)]
    quantize_onnx(folder / "fp32.onnx", folder / "int8.onnx", shown)
    return folder / "int8.onnx"


def prepared(frame: np.ndarray) -> np.ndarray:
    return ((frame.transpose(2, 0, 1)[None] / np.float32(255)) - np.float32(0.5)) / np.float32(0.3)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("at", [0.1, 0.4, 0.8])
def test_regions_give_the_scores_of_the_whole_frame(file: Path, at: float) -> None:
    rng = np.random.default_rng(1)
    regions, session = Regions(file, at=at), open_session(file, threads=1)
    frame = noise(rng, SIDE, SIDE, 3)
    assert regions(frame, None, prepared)[1] == 1
    works = []
    for _ in range(40):
        top, left = (int(x) for x in rng.integers(0, SIDE - 1, 2))
        box = Box(top, min(SIDE, top + 6), left, min(SIDE, left + 9))
        frame[box.slices] = noise(rng, *frame[box.slices].shape)
        found, work = regions(frame, box, prepared)
        expected = session.run(None, {"images": prepared(frame)})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        works.append(work)
    assert min(works) < 1
    if at < 0.5:  # of features that see little
        assert np.mean(works) < 1 - 0.4 * regions.share


def test_the_first_part_has_about_the_share_that_is_asked_for(file: Path) -> None:
    shares = [Regions(file, at=at).share for at in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert shares == sorted(shares)
    np.testing.assert_allclose(shares, (0.1, 0.3, 0.5, 0.7, 0.9), atol=0.15)


def test_the_reach_is_what_a_pixel_changes(tmp_path: Path) -> None:
    """Of the features' first part, by what changes in them, pixel after pixel."""
    layers = [
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 5, 1, 2), nn.ReLU(),
        nn.Conv2d(4, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ]  # fmt: skip
    torch.manual_seed(0)
    write_onnx(nn.Sequential(*layers), (3, 32, 32), tmp_path / "n.onnx")
    regions = Regions(tmp_path / "n.onnx", at=0.99)
    assert regions.reach == Reach(4, 1 + 2 * 2 + 2)
    rng = np.random.default_rng(0)
    frame = noise(rng, 32, 32, 3)
    before = regions._first(prepared(frame))
    for row, column in rng.integers(0, 32, (30, 2)):
        changed = frame.copy()
        changed[row, column] ^= 255
        differs = (regions._first(prepared(changed)) != before).any((0, 1))
        for axis, pixel in enumerate((int(row), int(column))):
            first, last, begin, end = regions.reach.window(pixel, pixel + 1, 32)
            found = np.flatnonzero(differs.any(1 - axis))
            assert first <= found.min()
            assert found.max() < last
            assert last - first <= 4  # 15 pixels wide, every 4
            assert begin % 4 == 0
            assert begin <= pixel < end


def test_a_stream_of_regions_computes_what_moved(file: Path) -> None:
    rng = np.random.default_rng(2)
    still = noise(rng, SIDE, SIDE, 3)
    whole, parts = (Stream.load(file, threshold=0, regions=at) for at in (None, 0.3))
    for step in range(20):
        frame = still.copy()
        frame[8:16, 2 * step : 2 * step + 8] = 128
        answers = whole(frame), parts(frame)
        np.testing.assert_allclose(answers[0].scores, answers[1].scores, rtol=1e-4, atol=1e-5)
        assert (answers[0].work, answers[1].work < 1) == (1, step > 0)
    assert parts(frame).work == 0
    assert whole.saving == 0
    assert isinstance(parts.run, Regions)
    assert 0.05 < parts.saving < parts.run.share


def test_cells_that_did_not_change_enough_stay_those_of_the_key_frame(file: Path) -> None:
    stream = Stream.load(file, threshold=5, regions=0.3)
    first = np.full((SIDE, SIDE, 3), 100, dtype=np.uint8)
    stream(first)
    second = first + np.uint8(4)
    second[:8, :8] = 200
    stream(second)
    expected = first.copy()
    expected[:8, :8] = 200
    assert stream.key is not None
    assert np.array_equal(stream.key, expected)
    third = first + np.uint8(6)  # slow changes add up
    third[:8, :8] = 200
    assert stream(third).work == 1


LAYERS = {
    "same": [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 5, 2, 2), nn.ReLU()],
    "strided 1x1": [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, 2), nn.ReLU()],
    "even": [nn.Conv2d(3, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, 4, 2, 1), nn.ReLU()],
    "valid": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.ReLU()],
    "dilated": [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 2, dilation=2)],
}


@pytest.mark.parametrize("shape", [(32, 32), (37, 50)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_of_any_form_and_sides(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    more = [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    write_onnx(nn.Sequential(*LAYERS[name], *more), (3, *shape), tmp_path / "n.onnx")
    regions = Regions(tmp_path / "n.onnx", at=0.99)
    assert regions.share > 0.9
    rng = np.random.default_rng(0)
    frame = noise(rng, *shape, 3)
    regions(frame, None, prepared)
    for _ in range(60):
        top, left = (int(rng.integers(0, side)) for side in shape)
        height, width = (int(x) for x in rng.integers(1, 6, 2))
        box = Box(top, min(shape[0], top + height), left, min(shape[1], left + width))
        frame[box.slices] = noise(rng, *frame[box.slices].shape)
        regions(frame, box, prepared)
        assert regions.features is not None
        np.testing.assert_allclose(
            regions.features, regions._first(prepared(frame)), rtol=1e-4, atol=1e-5
        )


class Positions(nn.Module):
    """Adds what differs from place to place."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.randn(1, 4, 16, 16))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.added


@pytest.mark.parametrize("end", [Positions(), nn.Conv2d(4, 4, 4, 1, 2)], ids=["places", "padded"])
def test_what_is_not_the_same_everywhere_ends_the_first_part(
    end: nn.Module, tmp_path: Path
) -> None:
    begin = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()]
    rest = [nn.Conv2d(4, 8, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    write_onnx(nn.Sequential(*begin, end, *rest), (3, 32, 32), tmp_path / "n.onnx")
    assert Regions(tmp_path / "n.onnx", at=0.99).reach == Reach(2, 1)


def test_several_heads_and_a_wavelet_stem(tmp_path: Path) -> None:
    space = SearchSpace(
        "regions", SIDE, Stem(8, 2, wavelet=True), (Stage(8, 1, 1), Stage(16, 1, 2)), 32,
        blocks=("k3_e3",),
    )  # fmt: skip
    architecture = Architecture(("k3_e3",) * 2, space.name)
    heads = {"digit": ("a", "b", "c"), "parity": ("even", "odd")}
    names = (*heads["digit"], *heads["parity"])
    card = NetworkCard(space, architecture, names, (0.5,) * 3, (0.3,) * 3, heads=heads)
    torch.manual_seed(0)
    export_onnx(
        build_network(space, architecture, classes=5).eval(), tmp_path / "n.onnx", card=card
    )
    rng = np.random.default_rng(2)
    whole, parts = (Stream.load(tmp_path / "n.onnx", threshold=0, regions=at) for at in (None, 0.3))
    frame = noise(rng, SIDE, SIDE, 3)
    for step in range(6):
        frame[8:16, 2 * step : 2 * step + 8] = 128
        answers = whole(frame), parts(frame)
        assert answers[1].scores.shape == (5,)
        np.testing.assert_allclose(answers[0].scores, answers[1].scores, rtol=1e-4, atol=1e-5)
        assert whole.classes(answers[0]) == parts.classes(answers[1])
    assert parts.saving > 0


def test_a_frame_whose_computing_failed_is_not_taken_for_known(file: Path) -> None:
    stream = Stream.load(file, threshold=5, regions=0.3)
    assert isinstance(stream.run, Regions)
    rng = np.random.default_rng(0)
    frame = noise(rng, SIDE, SIDE, 3)
    stream(frame)
    second = stream.run.second
    stream.run.second = None  # type: ignore[assignment]
    frame[:8, :8] = 0
    with pytest.raises(AttributeError):
        stream(frame)
    stream.run.second = second
    assert stream(frame).work == 1


@pytest.mark.parametrize("block", ["k3_e3", "k3_e1_g2"])
def test_a_shuffle_ends_what_can_be_computed_by_regions(block: str, tmp_path: Path) -> None:
    built, card = network(("k3_e3", block, "k3_e3", "k3_e3"))
    export_onnx(built, tmp_path / "n.onnx", card=card)
    share = Regions(tmp_path / "n.onnx", at=0.99).share
    assert (share > 0.9) == (block == "k3_e3")
    rng = np.random.default_rng(0)
    regions = Regions(tmp_path / "n.onnx", at=0.5)
    frame = noise(rng, SIDE, SIDE, 3)
    regions(frame, None, prepared)
    frame[:4, :4] = 0
    found, _ = regions(frame, Box(0, 4, 0, 4), prepared)
    session = open_session(tmp_path / "n.onnx", threads=1)
    expected = session.run(None, {"images": prepared(frame)})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_cut_is_refused(tmp_path: Path, file: Path) -> None:
    for at in (0, 1, 2):
        with pytest.raises(InputError, match="between 0 and 1"):
            Regions(file, at=at)
    with pytest.raises(InputError, match="no such model file"):
        Regions(tmp_path / "none.onnx")
    write_onnx(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), (3, 4, 4), tmp_path / "flat.onnx")
    with pytest.raises(InputError, match="no place to cut"):
        Regions(tmp_path / "flat.onnx")
    assert onnx.load(file).graph.input[0].type.tensor_type.shape.dim[2].dim_value == SIDE
