"""A folded part answers as the part does, with whatever statistics it is given."""

import pytest
import torch
from torch import Tensor, nn

from fbnas.search.folding import Folded, folded, tracked
from fbnas.space.blocks import BLOCKS, build_block


class Twice(nn.Module):
    """A convolution whose output is used beside what its normalisation makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, features: Tensor) -> Tensor:
        convolved = self.pair[0](features)
        return convolved + self.pair[1](convolved)


PARTS = {
    **{name: lambda name=name: build_block(name, 4, 8, 2) for name in BLOCKS},
    "bias, no affine": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False)),
    "normalisation first": lambda: nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)
    ),
    "used twice": Twice,
}


def lively(part: nn.Module) -> list[Tensor]:
    """Make nothing the identity; return other statistics than the part's own."""
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.5)
    return [
        x for norm in tracked(part)
        for x in (torch.randn(norm.num_features), torch.rand(norm.num_features) + 0.5)
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", PARTS)
def test_it_answers_as_the_part(name: str) -> None:
    torch.manual_seed(0)
    part = PARTS[name]().eval()
    first, second = lively(part), lively(part)
    before = {key: value.clone() for key, value in part.state_dict().items()}
    features = torch.randn(5, 4, 8, 8)
    made = folded(part, features, first)
    for statistics in (first, second):
        for norm, mean, variance in zip(
            tracked(part), statistics[::2], statistics[1::2], strict=True
        ):
            norm.running_mean, norm.running_var = mean, variance
        torch.testing.assert_close(made(features, statistics), part(features), rtol=1e-4, atol=1e-4)
    for key, value in before.items():
        if "running" not in key:
            assert torch.equal(part.state_dict()[key], value), key


@torch.no_grad()
def test_only_what_may_be_folded_is() -> None:
    torch.manual_seed(0)
    part = build_block("k3_e3", 4, 8, 2).eval()
    assert len(Folded(part).pairs) == len(tracked(part)) > 0
    odd = Twice().eval()
    statistics = lively(odd)
    features = torch.randn(2, 4, 3, 3)
    assert not folded(odd, features, statistics).pairs
    assert Folded(odd).pairs  # which would answer otherwise
