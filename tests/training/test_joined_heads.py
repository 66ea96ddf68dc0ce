"""Several heads in one training: what is asked of each image, and their images as one data set."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fbnas.errors import InputError
from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import Data, TensorImages
from fbnas.training.heads import Accuracy, accuracy_by_head, join_data, task_of

HEADS = {"digit": tuple("abcd"), "parity": ("even", "odd")}
SPACE = {
    "name": "smallest",
    "resolution": 4,
    "input_channels": 1,
    "stem": {"channels": 4, "stride": 1},
    "stages": [{"channels": 4, "layers": 1, "stride": 1}],
    "head": 8,
    "blocks": ["k3_e1"],
}


def images(count: int, classes: int, seed: int) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.arange(count) % classes)


def data(names: tuple[str, ...], seed: int, resolution: int = 4) -> Data:
    splits = [images(count, len(names), seed + count) for count in (12, 6, 8)]
    train, validation, test = splits
    return Data(str(seed), names, 1, resolution, train, validation, lambda: test, (0.5,), (0.25,))


@pytest.fixture
def joint() -> Data:
    return join_data({"digit": data(HEADS["digit"], 0), "parity": data(HEADS["parity"], 100)})


def test_the_loss_is_cross_entropy_among_the_classes_of_the_own_head() -> None:
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 1, 4, 5, 5])
    task = task_of(HEADS)

    def by_hand(smoothing: float) -> Tensor:
        digits = F.cross_entropy(
            scores[:3, :4], labels[:3], reduction="sum", label_smoothing=smoothing
        )
        parities = F.cross_entropy(
            scores[3:, 4:], labels[3:] - 4, reduction="sum", label_smoothing=smoothing
        )
        return (digits + parities) / 6

    torch.testing.assert_close(task.loss(scores, labels), by_hand(0.0))
    assert task.smoothed is not None
    torch.testing.assert_close(task.smoothed(scores, labels, 0.1), by_hand(0.1))
    right = [scores[i, :4].argmax() == labels[i] for i in range(3)]
    right += [scores[i, 4:].argmax() + 4 == labels[i] for i in range(3, 6)]
    assert task.metric(scores, labels).tolist() == right


def test_the_images_of_a_head_do_not_touch_the_classifier_of_another(joint: Data) -> None:
    torch.manual_seed(0)
    space = SearchSpace.from_dict(dict(SPACE))
    network = build_network(space, Architecture(("k3_e1",), "smallest"), joint.classes)
    linear = network.classifier.get_submodule("linear")
    shown = joint.train.batch(torch.arange(12)).float() / 255  # all of digit
    task_of(joint.heads).loss(network(shown), joint.train.labels[:12]).backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad[:4].abs().sum() > 0
    assert linear.weight.grad[4:].abs().sum() == 0
    assert linear.bias.grad[4:].abs().sum() == 0
    assert network.stem[0].weight.grad.abs().sum() > 0  # the backbone learns from every head


def test_joined_images_are_those_of_their_parts_in_any_order(joint: Data) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    parts = [data(HEADS["digit"], 0).train, data(HEADS["parity"], 100).train]
    pixels = torch.cat([part.batch(torch.arange(12)) for part in parts])
    labels = torch.cat([parts[0].labels, parts[1].labels + 4])
    assert torch.equal(joint.train.batch(order), pixels[order])
    assert torch.equal(joint.train.labels, labels)
    assert joint.class_names == ("a", "b", "c", "d", "even", "odd")
    values = pixels.double() / 255
    assert joint.mean[0] == pytest.approx(float(values.mean()))
    assert joint.std[0] == pytest.approx(float(values.std(correction=0)))
    assert (len(joint.validation), len(joint.test)) == (12, 16)


def test_accuracy_is_of_all_images_and_of_each_head(joint: Data) -> None:
    found = accuracy_by_head(
        joint.test, joint.heads, lambda some: float((some.labels > 3).double().mean())
    )
    assert found == Accuracy(0.5, {"digit": 0.0, "parity": 1.0})
    assert str(found) == "0.5000 (digit 0.0000, parity 1.0000)"
    assert accuracy_by_head(joint.test, {}, lambda some: 0.25) == Accuracy(0.25)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("digit",), "1 heads; expected at least two"),
        (("digit", "images"), "a head is called 'images'; expected letters"),
        (("digit", "a/b"), "a head is called 'a/b'; expected letters"),
    ],
)
def test_names_that_no_head_can_have_are_refused(names: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        join_data({name: data(HEADS["parity"], 0) for name in names})


def test_images_of_two_sizes_are_refused(joint: Data) -> None:
    other = replace(data(HEADS["parity"], 0), resolution=8)
    with pytest.raises(InputError, match="of b are 8x8 of 1 channel.s., those of a 4x4"):
        join_data({"a": data(HEADS["digit"], 0), "b": other})
