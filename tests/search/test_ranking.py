"""Ranking by shared weights: what was trained comes first, whatever the order of the images."""

import pytest
import torch
from search_run import SPACE, small_digits
from torch.nn import functional

from fbnas.search import Supernet, rank_by_shared_weights, ranking
from fbnas.space import Architecture
from fbnas.training.data import Data, TensorImages, batches, split_for_search

TRAINED = Architecture(("k3_e3", "k3_e1", "k3_e3"), "tiny")
UNTRAINED = Architecture(("k3_e1", "k3_e3", "k3_e1"), "tiny")


def sorted_by_class(data: Data) -> Data:
    """The order in which class folders are read."""
    order = data.train.labels.argsort(stable=True)
    images = TensorImages(data.train.batch(order), data.train.labels[order])
    rest = {name: getattr(data, name) for name in ("name", "class_names", "channels", "resolution")}
    return Data(
        **rest,
        train=images,
        validation=data.validation,
        load_test=data.load_test,
        mean=data.mean,
        std=data.std,
    )


@pytest.fixture(scope="module")
def data() -> Data:
    return sorted_by_class(small_digits(800))


@pytest.fixture(scope="module")
def supernet(data: Data) -> Supernet:
    """Trained along a single path; the other blocks are as they were initialised."""
    torch.manual_seed(0)
    supernet = Supernet(SPACE, classes=10)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images = split_for_search(data.train, fraction=0.8, seed=0)[0]
    for _ in range(6):
        for x, labels in batches(images, 32, generator=generator, mean=data.mean, std=data.std):
            optimizer.zero_grad()
            loss = functional.cross_entropy(supernet(x, TRAINED.path(SPACE)), labels)
            loss.backward()
            optimizer.step()
    return supernet


def test_a_trained_path_comes_before_an_untrained_one(supernet: Supernet, data: Data) -> None:
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    for order in ([UNTRAINED, TRAINED], [TRAINED, UNTRAINED]):
        first, second = rank_by_shared_weights(supernet, order, data)
        assert (first.architecture, second.architecture) == (TRAINED, UNTRAINED)
        assert first.cross_entropy < second.cross_entropy
    assert first.accuracy > 0.5 > second.accuracy
    for name, value in supernet.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_few_images_are_of_all_classes_in_every_batch(
    supernet: Supernet, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    recalibrate, evaluate = ranking.recalibrate_bn, ranking.evaluate

    def note_batches(module, forward, batches):  # type: ignore[no-untyped-def]
        seen.extend(labels for _, labels in batches)
        recalibrate(module, forward, batches)

    def note_images(network, images, **options):  # type: ignore[no-untyped-def]
        seen.append(images.labels)
        return evaluate(network, images, **options)

    monkeypatch.setattr(ranking, "recalibrate_bn", note_batches)
    monkeypatch.setattr(ranking, "evaluate", note_images)
    monkeypatch.setattr(ranking, "BATCH", 128)
    rank_by_shared_weights(supernet, [TRAINED], data, calibration_images=256, held_out_images=100)
    assert [len(labels) for labels in seen] == [128, 128, 100]
    for labels in seen:
        assert labels.unique().tolist() == list(range(10))


def test_statistics_come_from_the_weights_part_and_the_loss_from_theta_s(
    supernet: Supernet, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, set[bytes]] = {"statistics": set(), "judged": set()}
    recalibrate, evaluate = ranking.recalibrate_bn, ranking.evaluate

    def pictures(pixels: torch.Tensor) -> set[bytes]:
        return {image.contiguous().numpy().tobytes() for image in pixels}

    def note_batches(module, forward, batches):  # type: ignore[no-untyped-def]
        for x, _ in batches:
            std, mean = torch.tensor(data.std), torch.tensor(data.mean)
            shown["statistics"] |= pictures(((x * std + mean) * 255).round().to(torch.uint8))
        recalibrate(module, forward, batches)

    def note_images(network, images, **options):  # type: ignore[no-untyped-def]
        shown["judged"] |= pictures(images.batch(torch.arange(len(images))))
        return evaluate(network, images, **options)

    monkeypatch.setattr(ranking, "recalibrate_bn", note_batches)
    monkeypatch.setattr(ranking, "evaluate", note_images)
    rank_by_shared_weights(supernet, [TRAINED], data, seed=5)
    weights_images, theta_images = split_for_search(data.train, fraction=0.8, seed=5)
    assert shown["statistics"] <= pictures(weights_images.batch(torch.arange(len(weights_images))))
    assert shown["judged"] == pictures(theta_images.batch(torch.arange(len(theta_images))))
