"""What follows a layer is found whatever way the network is written."""

import torch
import torch.nn.functional as F
from digits_network import Trained
from torch import Tensor, nn

from fbnas.compression.dataflow import Call, layer_calls
from fbnas.compression.folding import fold_bn_

SHAPE = (3, 8, 8)


class Written(nn.Module):
    """Functions instead of modules, a normalisation read twice, a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.norm_a, self.norm_b, self.norm_c = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        first = F.relu(self.norm_a(self.a(images)))
        branch = self.b(first)
        second = torch.relu(self.norm_b(branch)) + branch  # branch is read twice
        third = F.relu_(self.norm_c(self.c(second)))
        return self.d(self.d(third))


def by_name(model: nn.Module) -> dict[str, Call]:
    return {call.name: call for call in layer_calls(model, SHAPE)}


def test_functions_and_branches_are_seen() -> None:
    model = Written()
    found = by_name(model)
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"].norm is model.norm_a
    assert found["a"].norm_name == "norm_a"
    assert found["a"].relu
    assert found["b"].norm is None
    assert not found["b"].relu
    assert found["c"].norm is model.norm_c
    assert found["c"].relu
    assert [call.once for call in found.values()] == [True, True, True, False]
    assert not found["d"].relu


def test_relu_in_place_does_not_hide_the_layer_before_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Flatten(),
        nn.Linear(256, 2),
    )  # fmt: skip
    assert [call.relu for call in layer_calls(model, SHAPE)] == [True, False, False]
    assert model.training


def test_layers_that_read_the_same_have_the_same_source() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, images: Tensor) -> Tensor:
            stem = self.stem(images)
            return self.left(stem) + self.right(stem)

    found = by_name(Forked())
    assert found["left"].source == found["right"].source != found["stem"].source


def test_layers_of_a_network_have_their_norms_and_relus(trained: Trained) -> None:
    found = {call.name: call for call in layer_calls(trained.network, trained.card.input_shape)}
    assert len(found) == 2 + 3 * 5 + 1
    for name, call in found.items():
        linear = "project" in name or "classifier" in name
        assert (call.norm is None) == ("classifier" in name)
        assert call.relu is not linear
        assert call.once


def test_folding_leaves_what_is_computed() -> None:
    torch.manual_seed(0)
    model = Written().eval()
    for norm in (model.norm_a, model.norm_b, model.norm_c):
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.uniform_(norm.bias, -1, 1)
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    images = torch.randn(4, *SHAPE)
    with torch.no_grad():
        expected = model(images)
        assert fold_bn_(model, SHAPE) == ("norm_a", "norm_c")
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model.norm_b, nn.BatchNorm2d)
