"""Ranking by shared weights: exact, whatever the order, and on the images that it may see."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from search_run import SPACE, small_digits
from torch import Tensor, nn
from torch.nn import functional

from fbnas.errors import InputError
from fbnas.search import SharedWeightsJudge, Supernet, rank_by_shared_weights, ranking
from fbnas.space import Architecture
from fbnas.training.data import Data, TensorImages, batches, split_for_search
from fbnas.training.evaluation import evaluate, recalibrate_bn

TRAINED = Architecture(("k3_e3", "k3_e1", "k3_e3"), "tiny")
UNTRAINED = Architecture(("k3_e1", "k3_e3", "k3_e1"), "tiny")
ALL = [
    Architecture(blocks, "tiny") for blocks in itertools.product(*(x.blocks for x in SPACE.layers))
]


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


@pytest.fixture(scope="module")
def lively(data: Data) -> Supernet:
    """No block is the identity at first: a mistake in any of them shows."""
    supernet = Supernet(SPACE, classes=10)
    torch.manual_seed(1)
    for parameter in supernet.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return supernet


def by_definition(
    supernet: Supernet, architecture: Architecture, data: Data, *, calibration: int, held_out: int
) -> tuple[float, float]:
    """A network of its own, its statistics from the weights' images, judged on theta's."""
    weights_images, theta_images = split_for_search(data.train, fraction=0.8, seed=0)
    shown = ranking._some(weights_images, calibration, 0)
    network = supernet.network(architecture)
    size = math.ceil(len(shown) / math.ceil(len(shown) / ranking.BATCH))  # even batches
    recalibrate_bn(network, network, batches(shown, size, mean=data.mean, std=data.std))
    return evaluate(network, ranking._some(theta_images, held_out, 0), mean=data.mean, std=data.std)


def test_a_trained_path_comes_before_an_untrained_one(supernet: Supernet, data: Data) -> None:
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    for order in ([UNTRAINED, TRAINED], [TRAINED, UNTRAINED]):
        first, second = rank_by_shared_weights(supernet, order, data)
        assert (first.architecture, second.architecture) == (TRAINED, UNTRAINED)
        assert first.cross_entropy < second.cross_entropy
    assert first.accuracy > 0.5 > second.accuracy
    assert supernet.training
    for name, value in supernet.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "images", [{"calibration": 150, "held_out": 100}, {"calibration": 64, "held_out": 9}]
)
def test_every_network_is_judged_as_it_would_be_alone(
    lively: Supernet, data: Data, images: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "BATCH", 64)  # several batches, the last one smaller
    options = {f"{name}_images": number for name, number in images.items()}
    ranked = rank_by_shared_weights(lively, ALL, data, **options)
    assert {r.architecture for r in ranked} == set(ALL)
    ranks = [(-r.accuracy, r.cross_entropy) for r in ranked]
    assert ranks == sorted(ranks)
    losses = [r.cross_entropy for r in ranked]
    assert max(losses) > min(losses) + 0.03
    for r in ranked:
        loss, accuracy = by_definition(lively, r.architecture, data, **images)
        assert r.cross_entropy == pytest.approx(loss, rel=1e-5)
        assert r.accuracy == pytest.approx(accuracy, abs=1e-9)


def test_without_calibration_images_the_statistics_are_the_supernet_s(
    supernet: Supernet, data: Data
) -> None:
    _, theta_images = split_for_search(data.train, fraction=0.8, seed=0)
    ranked = rank_by_shared_weights(supernet, ALL, data, calibration_images=0)
    with torch.no_grad():
        for r in ranked:
            network = supernet.network(r.architecture).eval()
            loss, accuracy = evaluate(network, theta_images, mean=data.mean, std=data.std)
            assert r.cross_entropy == pytest.approx(loss, rel=1e-5)
            assert r.accuracy == pytest.approx(accuracy, abs=1e-9)


def test_the_numbers_depend_on_neither_order_nor_company(lively: Supernet, data: Data) -> None:
    def found(architectures: list[Architecture]) -> dict[tuple[str, ...], float]:
        return {
            r.architecture.blocks: r.cross_entropy
            for r in rank_by_shared_weights(lively, architectures, data)
        }

    together = found(ALL)
    shuffled = random.Random(0).sample(ALL, len(ALL))
    assert found(shuffled) == together
    assert found([*shuffled[:5], shuffled[0]]) == {
        a.blocks: together[a.blocks] for a in shuffled[:5]
    }
    for architecture in shuffled[:3]:
        assert found([architecture])[architecture.blocks] == together[architecture.blocks]


def test_what_two_begin_with_is_computed_once(lively: Supernet, data: Data) -> None:
    judge = SharedWeightsJudge(lively, data, calibration_images=64, held_out_images=64)
    runs: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if len(output) == 64:  # not the few by which a folded part is checked
                runs[name] = runs.get(name, 0) + 1

        return note

    for name, part in judge.supernet.named_children():
        for key, module in part.named_children() if name == "layers" else [(name, part)]:
            for branch, block in module.branches.items() if name == "layers" else [("", module)]:
                block.register_forward_hook(count(f"{key}{branch}"))
    judge(ALL)
    first = len(SPACE.layers[0].blocks)
    assert runs["stem"] == 2  # for the statistics, and for the judgement
    assert sum(runs[f"0{name}"] for name in SPACE.layers[0].blocks) == 2 * first
    assert runs["head"] == 2 * len(ALL)


def test_no_batch_of_calibration_images_is_of_a_few(lively: Supernet, data: Data) -> None:
    judge = SharedWeightsJudge(lively, data)
    for images in (1, 255, 256, 257, 511, 513):
        sizes = [len(x) for x, _ in judge._batches(ranking._some(data.train, images, 0))]
        assert sum(sizes) == images
        assert max(sizes) <= ranking.BATCH
        assert min(sizes) >= max(sizes) - len(sizes)


def test_who_was_judged_before_is_not_judged_again(
    lively: Supernet, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, judged = SharedWeightsJudge(lively, data), []
    judge_them = judge._judge

    def note(paths: Any) -> None:
        judged.append(list(paths))
        judge_them(paths)

    monkeypatch.setattr(judge, "_judge", note)
    before = judge(ALL[:4])
    assert judge(ALL[:4]) == before
    assert len(judge(ALL[2:6])) == 4
    assert [len(paths) for paths in judged] == [4, 2]
    assert judge([]) == []
    with pytest.raises(InputError, match="space tiny has 3 layers"):
        judge([Architecture(("k3_e1",))])


def test_the_device_is_where_the_copy_runs(lively: Supernet, data: Data) -> None:
    few = {"calibration_images": 64, "held_out_images": 64}
    elsewhere = SharedWeightsJudge(lively, data, **few, device="meta")
    assert {p.device.type for p in elsewhere.supernet.parameters()} == {"meta"}
    assert [x.device.type for x, _ in elsewhere._batches(elsewhere.held_out)] == ["meta"]
    assert {p.device.type for p in lively.parameters()} == {"cpu"}
    here = rank_by_shared_weights(lively, ALL[:3], data, **few, device="cpu")
    assert here == rank_by_shared_weights(lively, ALL[:3], data, **few)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every batch that a ranking reads."""
    read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(*arguments: Any, **options: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in batches(*arguments, **options):
            read.append(batch)
            yield batch

    monkeypatch.setattr(ranking, "batches", note)
    return read


def test_few_images_are_of_all_classes_in_every_batch(
    supernet: Supernet,
    data: Data,
    shown: list[tuple[torch.Tensor, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranking, "BATCH", 128)
    rank_by_shared_weights(supernet, [TRAINED], data, calibration_images=256, held_out_images=100)
    assert [len(labels) for _, labels in shown] == [128, 128, 100]
    for _, labels in shown:
        assert labels.unique().tolist() == list(range(10))


def test_statistics_come_from_the_weights_part_and_the_loss_from_theta_s(
    supernet: Supernet, data: Data, shown: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    def pictures(pixels: torch.Tensor) -> set[bytes]:
        return {image.contiguous().numpy().tobytes() for image in pixels}

    def seen(x: torch.Tensor) -> set[bytes]:
        std, mean = torch.tensor(data.std), torch.tensor(data.mean)
        return pictures(((x * std + mean) * 255).round().to(torch.uint8))

    rank_by_shared_weights(supernet, [TRAINED], data, seed=5)
    weights_images, theta_images = split_for_search(data.train, fraction=0.8, seed=5)
    *statistics, judged = (seen(x) for x, _ in shown)
    assert len(statistics) == 2
    for part in statistics:
        assert part <= pictures(weights_images.batch(torch.arange(len(weights_images))))
    assert judged == pictures(theta_images.batch(torch.arange(len(theta_images))))
