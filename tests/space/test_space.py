"""Spaces: shapes, files, refusals; checked against the paper's table."""

from pathlib import Path

import pytest
import torch

from fbnas.errors import InputError
from fbnas.files import write_yaml
from fbnas.shipped import shipped_names
from fbnas.space import BLOCKS, Architecture, SearchSpace, build_block, build_network

SMALL = {
    "name": "small",
    "resolution": 16,
    "stem": {"channels": 8, "stride": 1},
    "stages": [
        {"channels": 8, "layers": 1, "stride": 1},
        {"channels": 16, "layers": 2, "stride": 2},
    ],
    "head": 32,
}


@pytest.mark.parametrize("name", shipped_names("space"))
def test_every_shipped_space_is_named_after_its_file_and_round_trips(name: str) -> None:
    space = SearchSpace.load(name)
    assert space.name == name
    assert SearchSpace.from_dict(space.to_dict()) == space


def test_fbnet_has_the_shapes_of_the_published_table() -> None:
    layers = SearchSpace.load("fbnet").layers
    first = [layers[i] for i in (0, 1, 5, 9, 13, 17, 21)]
    found = [(x.height, x.in_channels, x.out_channels, x.stride) for x in first]
    assert found == [
        (112, 16, 16, 1),
        (112, 16, 24, 2),
        (56, 24, 32, 2),
        (28, 32, 64, 2),
        (14, 64, 112, 1),
        (14, 112, 184, 2),
        (7, 184, 352, 1),
    ]
    assert len(layers) == 22


def test_fbnet_cifar_ends_at_4x4() -> None:
    assert SearchSpace.load("fbnet_cifar").final_size == 4


@pytest.mark.parametrize("block", sorted(BLOCKS))
@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 16, 1), (8, 16, 2)])
def test_every_block_maps_to_its_shape(block: str, shape: tuple[int, int, int]) -> None:
    in_channels, out_channels, stride = shape
    images = torch.randn(2, in_channels, 7, 7)
    side = -(-7 // stride)
    assert build_block(block, *shape)(images).shape == (2, out_channels, side, side)


def test_the_residual_is_there_only_where_the_shape_is_kept() -> None:
    for shape, expected in (((8, 8, 1), True), ((8, 8, 2), False), ((8, 16, 1), False)):
        block = build_block("k3_e3", *shape).eval()
        block.project[1].weight.data.zero_()  # type: ignore[union-attr, index]
        images = torch.randn(1, 8, 6, 6)
        assert torch.equal(block(images), images) is expected
        assert block.residual is expected


def test_channel_shuffle_mixes_groups() -> None:
    images = torch.arange(6.0).reshape(1, 6, 1, 1)
    shuffled = build_block("k3_e1_g2", 6, 6, 1).shuffle(images)
    assert shuffled.flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_skip_can_be_switched_off_where_the_shape_changes() -> None:
    space = SearchSpace.from_dict({**SMALL, "skip_on_reduction": False})
    assert ["skip" in layer.blocks for layer in space.layers] == [True, False, True]
    assert not space.offered[1, space.blocks.index("skip")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 2}, "1x1 before stage 1"),
        ({"stem": {"channels": 7, "stride": 1}}, "cannot be divided into 2 groups"),
        ({"stem": {"channels": 8, "stride": 1, "wavelet": True}}, "expected both to be even"),
        ({"stem": {"channels": 8, "stride": 2, "wavelet": 3}}, "expected true or false"),
        ({"stem": {"channels": 8, "stride": 2, "wavelets": True}}, "and, if wanted, wavelet"),
        ({"blocks": ["k3_e1", "k3e6"]}, "Did you mean 'k3_e6'"),
        ({"blocks": ["k3_e1", "k3_e1"]}, "listed twice"),
        ({"resolutoin": 3}, "Did you mean 'resolution'"),
        ({"stages": []}, "`stages` is empty"),
        ({"stages": [{"channels": 8, "layers": 1}]}, "expected exactly the keys"),
        ({"head": 0}, "expected a whole number of at least 1"),
        ({"modules": ["nowhere.py"]}, "no such module"),
        ({"modules": "mine.py"}, "`modules` is 'mine.py'; expected a list, as in [mine.py]"),
        ({"blocks": "skip"}, "`blocks` is 'skip'; expected a list, as in [skip]"),
    ],
)
def test_a_bad_space_is_one_clear_line(change: dict, words: str, tmp_path: Path) -> None:
    write_yaml(tmp_path / "s.yaml", {**SMALL, **change})
    with pytest.raises(InputError, match="s.yaml") as error:
        SearchSpace.load(tmp_path / "s.yaml")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names_list_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="Did you mean 'fbnet_cifar'"):
        SearchSpace.load("fbnet_cifr")
    with pytest.raises(InputError, match="Did you mean 'fbnet_c'"):
        Architecture.load("fbnetc")


def test_a_users_module_adds_blocks(tmp_path: Path) -> None:
    (tmp_path / "my_blocks.py").write_text(
        "from torch import nn\nfrom fbnas.space import register_block\n"
        "@register_block('plain3')\n"
        "def plain3(i, o, s):\n    return nn.Conv2d(i, o, 3, s, 1)\n"
    )
    write_yaml(
        tmp_path / "mine.yaml",
        {**SMALL, "modules": ["my_blocks.py"], "blocks": ["plain3", "k3_e1", "skip"]},
    )
    space = SearchSpace.load(tmp_path / "mine.yaml")
    network = build_network(space, Architecture(("plain3", "k3_e1", "skip")), classes=5)
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    BLOCKS.pop("plain3")


def test_a_block_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad_blocks.py").write_text(
        "from torch import nn\nfrom fbnas.space import register_block\n"
        "register_block('no_stride')(lambda i, o, s: nn.Conv2d(i, o, 3, 1, 1))\n"
    )
    with pytest.raises(InputError, match=r"'no_stride' in layer 1 .* returns \(16, 16, 16\)"):
        SearchSpace.from_dict(
            {**SMALL, "modules": ["bad_blocks.py"], "blocks": ["no_stride"]}, folder=tmp_path
        )
    BLOCKS.pop("no_stride")


def test_a_name_registered_twice_names_both() -> None:
    from fbnas.space import register_block

    with pytest.raises(ValueError, match="skip.*registered twice"):
        register_block("skip")(lambda i, o, s: torch.nn.Identity())
