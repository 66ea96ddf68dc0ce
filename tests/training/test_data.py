"""Splits, batches and the checks against a space."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fbnas.errors import InputError
from fbnas.space import SearchSpace
from fbnas.training import Data, Subset, TensorImages, batches, load_data, split_for_search
from fbnas.training.data import stratified_order

QUICKSTART = SearchSpace.load("quickstart")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data()


def test_digits_are_read_as_they_are(digits: Data) -> None:
    assert (digits.classes, digits.channels, digits.resolution) == (10, 1, 8)
    assert digits.class_names == tuple("0123456789")
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    pixels = digits.train.batch(torch.arange(100))
    assert pixels.dtype == torch.uint8 and pixels.shape == (100, 1, 8, 8)
    assert pixels.max() == 255  # 16 of 16


def test_splits_are_disjoint_stratified_and_decided_by_the_seed() -> None:
    parts = [load_data(seed=seed) for seed in (0, 0, 1)]
    rows = [
        torch.cat([p.train.pixels, p.validation.pixels, p.test.pixels]).flatten(1) for p in parts
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert torch.equal(*(torch.unique(r, dim=0) for r in (rows[0], rows[2])))  # the same images
    share = torch.bincount(parts[0].test.labels) / torch.bincount(
        torch.cat([parts[0].train.labels, parts[0].validation.labels, parts[0].test.labels])
    )
    assert ((share - 0.2).abs() < 0.01).all()


def test_test_images_load_on_first_access_only(digits: Data) -> None:
    calls = []
    lazy = replace(digits, load_test=lambda: calls.append(1) or digits.train)
    assert len(lazy.validation) and calls == []
    assert lazy.test is lazy.test
    assert calls == [1]


def test_limit_takes_nested_balanced_subsets_and_leaves_the_test_set(digits: Data) -> None:
    small, large = (load_data(limit=n, validation_fraction=0.5) for n in (40, 80))
    assert len(small.train) + len(small.validation) == 40
    assert torch.equal(small.test.pixels, digits.test.pixels)
    chosen = [
        {tuple(row.tolist()) for part in (d.train, d.validation) for row in part.pixels.flatten(1)}
        for d in (small, large)
    ]
    assert chosen[0] < chosen[1]
    counts = torch.bincount(torch.cat([small.train.labels, small.validation.labels]))
    assert counts.min() >= 3 and counts.max() <= 5


def test_stratified_order_advances_every_class_at_its_share() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(100))
    for cut in (10, 50, 90):
        counts = torch.bincount(labels[order[:cut]], minlength=3)
        assert ((counts - torch.tensor([0.6, 0.3, 0.1]) * cut).abs() <= 1).all()


def test_split_for_search_is_a_partition_by_class(digits: Data) -> None:
    weights, theta = split_for_search(digits.train, 0.8, seed=0)
    assert not set(weights.indices.tolist()) & set(theta.indices.tolist())
    assert len(weights) + len(theta) == len(digits.train)
    assert abs(len(weights) / len(digits.train) - 0.8) < 0.01
    assert torch.bincount(theta.labels).min() > 10
    assert torch.equal(
        theta.batch(torch.tensor([0, 2])), digits.train.batch(theta.indices[torch.tensor([0, 2])])
    )


def test_statistics_equal_those_of_numpy(digits: Data) -> None:
    values = digits.train.pixels.double() / 255
    assert digits.mean == pytest.approx((values.mean().item(),))
    assert digits.std == pytest.approx((values.std(unbiased=False).item(),))


def test_batches_cover_each_image_once_normalised(digits: Data) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = list(batches(digits.train, 100, generator=generator, mean=digits.mean, std=digits.std))
    x, y = (torch.cat(part) for part in zip(*seen, strict=True))
    assert len(x) == len(digits.train)
    assert x.mean().abs() < 1e-4 and abs(x.std() - 1) < 1e-3
    assert torch.equal(torch.bincount(y), torch.bincount(digits.train.labels))
    assert not torch.equal(y, digits.train.labels)


def test_batches_start_skips_in_the_same_order(digits: Data) -> None:
    def read(start: int) -> list:
        generator = torch.Generator().manual_seed(5)
        return list(
            batches(
                digits.train,
                64,
                generator=generator,
                mean=digits.mean,
                std=digits.std,
                drop_last=True,
                start=start,
            )
        )

    whole, rest = read(0), read(7)
    assert {len(y) for _, y in whole} == {64}
    assert len(rest) == len(whole) - 7
    for (x, y), (x2, y2) in zip(whole[7:], rest, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_batches_without_generator_keep_the_order(digits: Data) -> None:
    y = torch.cat([y for _, y in batches(digits.validation, 50, mean=digits.mean, std=digits.std)])
    assert torch.equal(y, digits.validation.labels)


def test_augmentation_sees_images_between_0_and_1() -> None:
    images = TensorImages(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(4).long())
    seen = []
    x, _ = next(
        batches(images, 4, mean=(0.5,), std=(0.25,), augment=lambda x: seen.append(x.max()) or x)
    )
    assert seen == [1.0]
    assert (x == 2).all()


def test_data_must_fit_the_space(two_classes: Path) -> None:
    with pytest.raises(InputError, match=r"8x8, the space quickstart expects 16x16.*resize=true"):
        load_data(space=QUICKSTART)
    fitting = load_data(space=QUICKSTART, resize=True)
    assert fitting.resolution == 16 and fitting.train.batch(torch.arange(2)).shape[2:] == (16, 16)
    with pytest.raises(InputError, match=r"3 channel\(s\).*quickstart expects 1.*data.channels=1"):
        load_data("image_folder", path=str(two_classes), space=QUICKSTART, resize=True)
    grey = load_data(
        "image_folder", path=str(two_classes), space=QUICKSTART, resize=True, channels=1
    )
    assert grey.train.batch(torch.arange(2)).shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "digit"}, "Unknown data source 'digit'. Did you mean 'digits'"),
        ({"path": "/x"}, "data.path=/x was given, but digits come with scikit-learn"),
        ({"limit": 0}, "data.limit is 0; expected"),
        ({"limit": 12}, "counted from 0.*split needs 2.*raise data.limit"),
        ({"limit": 5}, "after data.limit=5; raise it"),
        ({"channels": 2}, "data.channels is 2; expected 1"),
        ({"workers": -1}, "data.workers is -1; expected a whole number from 0, or null"),
        ({"device_mb": -1}, "data.device_mb is -1; expected 0 or more"),
        ({"test_fraction": 1.0}, "data.test_fraction is 1.0; expected"),
        ({"resize": True}, "expected data.resolution=PIXELS"),
        ({"resolution": 9}, r"digit \d+: the image is 8x8; expected 9x9.*data.resize=true"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_data(**options)
    assert "\n" not in str(caught.value)


def test_subset_of_a_subset(digits: Data) -> None:
    inner = Subset(Subset(digits.train, torch.tensor([5, 6, 7])), torch.tensor([2, 0]))
    assert inner.labels.tolist() == digits.train.labels[[7, 5]].tolist()
    assert torch.equal(inner.batch(torch.tensor([1])), digits.train.batch(torch.tensor([5])))
