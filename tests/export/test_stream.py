"""A video loop: what is reused, what is computed, and what a threshold costs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.export import export_onnx
from fbnas.export.stream import Stream, changes_of, choose_threshold
from fbnas.space import Architecture, NetworkCard, SearchSpace, Stage, Stem, build_network
from fbnas.training import batches, load_data

RNG = np.random.default_rng(0)


def brightness(threshold: float) -> Stream:
    """A network whose scores are the mean of the frame and its negative."""

    def run(images: np.ndarray) -> np.ndarray:
        return np.array([[images.mean(), -images.mean()]])

    return Stream(run, mean=[0.5], std=[0.5], threshold=threshold)


def change_of(frame: np.ndarray, key: np.ndarray) -> float:
    return float(changes_of(frame, key)[0].max())


def grey(level: int, size: int = 16) -> np.ndarray:
    return np.full((size, size, 1), level, dtype=np.uint8)


def test_the_change_is_that_of_the_cell_that_changes_most() -> None:
    frame, key = grey(100), grey(100)
    assert change_of(frame, key) == 0
    frame[2:4, 4:6] = 140  # one of 8 x 8 cells
    assert change_of(frame, key) == 40
    frame[2, 4] = 100
    assert change_of(frame, key) == 30
    assert change_of(grey(0), grey(255)) == 255  # no overflow of bytes
    small = change_of(
        RNG.integers(0, 255, (5, 7, 3), dtype=np.uint8), np.zeros((5, 7, 3), np.uint8)
    )
    assert 0 < small <= 255  # fewer pixels than cells, and sides that 8 does not divide


def test_similar_frames_are_reused_and_slow_motion_adds_up() -> None:
    stream = brightness(4)
    computed = [stream(grey(100 + level)).computed for level in range(11)]
    assert computed == [level % 5 == 0 for level in range(11)]
    assert stream.saving == pytest.approx(8 / 11)
    exact = brightness(0)
    assert [exact(grey(level)).computed for level in (7, 7, 8)] == [True, False, True]


def test_the_scores_are_those_of_the_normalised_frame() -> None:
    answer = brightness(0)(grey(255))
    assert answer.scores[0] == pytest.approx(1.0)
    assert answer.change == np.inf


def test_the_threshold_is_the_largest_that_agrees() -> None:
    video = [
        grey(level) for level in [*range(100, 127), *range(129, 156)]
    ]  # the class turns at 127.5
    for agreement in (1.0, 0.9):
        found = choose_threshold(video, brightness, agreement=agreement)
        wrong = []
        for threshold in (found, 2 * found):
            stream = brightness(threshold)
            answers = [int(stream(frame).scores.argmax()) for frame in video]
            wrong.append(
                sum(a != int(f.mean() < 127.5) for a, f in zip(answers, video, strict=True))
            )
        assert wrong[0] <= (1 - agreement) * len(video) + 1e-9
        assert found > 0
    assert choose_threshold(video, brightness, candidates=[200]) == 0.0


def test_the_threshold_holds_for_each_of_several_heads() -> None:
    """The first head's scores are larger: among all scores the second's class is never seen."""
    heads = {"always": ["yes", "no"], "brightness": ["light", "dark"]}

    def two(threshold: float) -> Stream:
        def run(images: np.ndarray) -> np.ndarray:
            return np.array([[9.0, 5.0, images.mean(), -images.mean()]])

        return Stream(run, mean=[0.5], std=[0.5], threshold=threshold, heads=heads)

    video = [grey(level) for level in [*range(100, 127), *range(129, 156)]]
    stream = two(0)
    assert stream.classes(stream(video[0])) == (0, 1)
    assert stream.classes(stream(video[-1])) == (0, 0)
    assert choose_threshold(video, two) == choose_threshold(video, brightness) < 32
    assert brightness(0).classes(brightness(0)(video[0])) == (1,)


def test_a_file_tells_of_its_heads(tmp_path: Path) -> None:
    space = SearchSpace(
        "tiny", 8, Stem(8, 1), (Stage(8, 1, 1),), 16, blocks=("k3_e1",), input_channels=1
    )
    architecture = Architecture(("k3_e1",), "tiny")
    heads = {"digit": ("a", "b", "c"), "parity": ("even", "odd")}
    names = (*heads["digit"], *heads["parity"])
    card = NetworkCard(space, architecture, names, (0.5,), (0.5,), heads=heads)
    torch.manual_seed(0)
    network = build_network(space, architecture, classes=5).eval()
    export_onnx(network, tmp_path / "n.onnx", card=card)
    stream = Stream.load(tmp_path / "n.onnx", threshold=0)
    answer = stream(RNG.integers(0, 255, (8, 8, 1), dtype=np.uint8))
    assert answer.scores.shape == (5,)
    assert stream.classes(answer) == (answer.scores[:3].argmax(), answer.scores[3:].argmax())


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    stream = brightness(1)
    with pytest.raises(InputError, match="expected \\(height, width, 1\\) uint8"):
        stream(np.zeros((4, 4, 3), np.uint8))
    stream(grey(1))
    with pytest.raises(InputError, match="expected one size"):
        stream(grey(1, size=8))
    with pytest.raises(InputError, match="0 to 255 levels"):
        brightness(-1)
    with pytest.raises(InputError, match="at least one frame"):
        choose_threshold([], brightness)
    with pytest.raises(InputError, match="no such file"):
        Stream.load(tmp_path / "none.onnx", threshold=1)


def test_an_exported_network_on_a_video_of_real_images(tmp_path: Path) -> None:
    """Each digit stays for ten frames under noise that a camera has."""
    data = load_data("digits")
    space = SearchSpace(
        "tiny", 8, Stem(8, 1), (Stage(8, 1, 1),), 16, blocks=("k3_e1",), input_channels=1
    )
    architecture = Architecture(("k3_e1",), "tiny")
    torch.manual_seed(0)
    network = build_network(space, architecture, classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for x, y in batches(data.train, 32, mean=data.mean, std=data.std, drop_last=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    card = NetworkCard(space, architecture, data.class_names, data.mean, data.std)
    export_onnx(network.eval(), tmp_path / "n.onnx", card=card)
    digits = data.validation.batch(torch.arange(30)).permute(0, 2, 3, 1).numpy()
    video = [
        np.clip(digit.astype(int) + RNG.integers(-2, 3, digit.shape), 0, 255).astype(np.uint8)
        for digit in digits
        for _ in range(10)
    ]

    def answers(threshold: float) -> tuple[list[int], float]:
        stream = Stream.load(tmp_path / "n.onnx", threshold=threshold)
        return [int(stream(frame).scores.argmax()) for frame in video], stream.saving

    every, none = answers(0)
    with torch.no_grad():
        shown = torch.from_numpy(np.stack(video)).permute(0, 3, 1, 2).float() / 255
        alone = network((shown - data.mean[0]) / data.std[0]).argmax(1).tolist()
    assert none < 0.1
    assert np.mean(np.array(every) == alone) > 0.99
    some, saving = answers(8)
    assert saving == pytest.approx(0.9, abs=0.02)
    assert np.mean(np.array(some) == every) > 0.95
