"""Blocks of a layer that changes the shape begin as one function."""

import pytest
import torch

from fbnas.search import Supernet
from fbnas.search.alignment import align_
from fbnas.space import SearchSpace
from fbnas.space.blocks import build_block

BLOCKS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6")


@pytest.mark.parametrize(("stride", "channels"), [(2, (16, 24)), (1, (8, 12)), (2, (16, 16))])
def test_all_nine_begin_as_one_function(stride: int, channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    blocks = {name: build_block(name, *channels, stride) for name in (*BLOCKS, "skip")}
    align_(blocks.values())
    images = torch.randn(8, channels[0], 12, 12)
    expected = blocks["k3_e1"](images)
    for name in BLOCKS:
        assert torch.allclose(blocks[name](images), expected, atol=1e-5), name
    skipped = blocks["skip"](images).flatten()
    alike = torch.corrcoef(torch.stack([skipped, expected.flatten()]))[0, 1]
    assert alike > 0.6  # it has a ReLU in another place


def test_blocks_without_groups_are_projected_from_every_channel() -> None:
    torch.manual_seed(0)
    block = build_block("k5_e3", 6, 10, 2)
    align_([block])
    weight = block.project[0].weight.detach()
    assert weight[:, :6].count_nonzero() == 60
    assert weight[:, 6:].count_nonzero() == 0


def test_other_channels_still_learn() -> None:
    torch.manual_seed(0)
    block = build_block("k3_e6", 8, 12, 2)
    align_([block])
    block(torch.randn(4, 8, 6, 6)).square().mul(torch.rand(4, 12, 3, 3)).sum().backward()
    project = block.project[0].weight.grad[:, 8:]
    assert project.abs().amax(dim=(0, 2, 3)).min() > 0


def test_a_block_of_another_kind_is_left_alone() -> None:
    other = torch.nn.Conv2d(8, 12, 3, 2, 1)
    before = other.weight.clone()
    align_([build_block("k3_e1", 8, 12, 2), other])
    assert torch.equal(other.weight, before)
    align_([other])
    assert torch.equal(other.weight, before)


def test_paths_of_a_supernet_differ_little_at_first_and_can_differ_later() -> None:
    torch.manual_seed(0)
    space = SearchSpace.load("fbnet_cifar")
    supernet = Supernet(space, 10).train()
    images = torch.randn(4, 3, 32, 32)
    small, large = (supernet(images, [i] * len(space.layers)) for i in (0, 7))
    assert torch.allclose(small, large, atol=1e-4)
    weights = {block.expand[0].weight.data_ptr() for block in supernet.layers[1].branches.values()
               if hasattr(block, "expand")}  # fmt: skip
    assert len(weights) == 8  # none shares its weights with another
