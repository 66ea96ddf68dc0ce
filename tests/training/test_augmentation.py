import pytest
import torch

from fbnas.errors import InputError
from fbnas.training.augmentation import build_augmentation


def test_nothing_asked_is_nothing_done() -> None:
    assert build_augmentation() is None
    assert build_augmentation(crop_padding=0, flip=False) is None


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    torch.manual_seed(0)
    images = torch.rand(400, 3, 4, 4)
    flip = build_augmentation(flip=True)
    assert flip is not None
    changed = flip(images)
    same = (changed == images).flatten(1).all(1)
    mirrored = (changed == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # 5 standard deviations of a fair coin


def test_crop_is_a_window_of_the_padded_image() -> None:
    torch.manual_seed(0)
    images = torch.rand(50, 1, 6, 6)
    crop = build_augmentation(crop_padding=2)
    assert crop is not None
    windows = torch.nn.functional.pad(images, (2, 2, 2, 2)).unfold(2, 6, 1).unfold(3, 6, 1)
    found = torch.zeros(5, 5)
    for image, options in zip(crop(images), windows[:, 0], strict=True):
        places = torch.isclose(options, image[0], atol=1e-6).flatten(2).all(2)
        assert places.sum() == 1
        found += places
    assert (found > 0).sum() > 12  # of 25 places, 50 draws


@pytest.mark.parametrize("options", [{"jitter": 0.3}, {"erase": 0.5}, {"crop_padding": 1}])
@pytest.mark.parametrize("channels", [1, 3])
def test_torch_seed_decides_and_shape_and_range_stay(options: dict, channels: int) -> None:
    images = torch.rand(16, channels, 8, 8)
    augment = build_augmentation(**options)
    assert augment is not None
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(augment(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].shape == images.shape
    assert results[0].min() >= 0 and results[0].max() <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flipp": True}, "Unknown augmentation 'flipp'. Did you mean 'flip'"),
        ({"crop_padding": -1}, "crop_padding is -1; expected a whole number"),
        ({"erase": 1.5}, "erase is 1.5; expected"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        build_augmentation(**options)
