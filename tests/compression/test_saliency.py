"""Taylor's terms of channels, against the loss itself: its derivatives by autograd, exactly."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from digits_network import Trained, fit
from random_images import random_images
from torch import Tensor, nn

from fbnas.compression import ChannelPruning, Tools, compress_
from fbnas.compression.pruning import Ranked, rank
from fbnas.compression.saliency import as_judged, gauss_newton_diagonal, hessian
from fbnas.errors import InputError
from fbnas.space.depthwise import DepthwiseConv2d
from fbnas.training import evaluate
from fbnas.training.data import batches
from fbnas.training.task import CLASSIFICATION, Task

SHAPE = (2, 6, 6)
DATA = random_images(2, 6, classes=4, count=256)
HIDDEN, WIDE = 6, 8  # channels of the two sets
# Which weights leave with channel c of each set: of the tensor, the dimension that c indexes.
SETS = {
    "3": {"0.weight": 0, "1.weight": 0, "1.bias": 0, "3.weight": 0, "3.bias": 0, "4.weight": 1},
    "4": {"4.weight": 0, "4.bias": 0, "8.weight": 1},
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    found = nn.Sequential(
        nn.Conv2d(2, HIDDEN, 3, padding=1, bias=False),
        nn.BatchNorm2d(HIDDEN),
        nn.ReLU(),
        nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN),
        nn.Conv2d(HIDDEN, WIDE, 1),
        nn.ReLU(),
        nn.AvgPool2d(6),
        nn.Flatten(),
        nn.Linear(WIDE, 4),
    )
    nn.init.uniform_(found[1].weight, 0.5, 1.5)
    nn.init.uniform_(found[1].bias, -0.5, 0.5)
    nn.init.uniform_(found[1].running_var, 0.5, 1.5)
    return found.eval()


def tools(task: Task = CLASSIFICATION) -> Tools:
    return Tools(SHAPE, data=DATA, task=task, seed=1)


def ranked(model: nn.Module, importance: str) -> dict[str, Ranked]:
    method = ChannelPruning(importance=importance, images=len(DATA.train))
    return {found.name: found for found in rank(model, method, tools())[1]}


def by_channel(model: nn.Module, values: dict[str, Tensor], members: dict[str, int]) -> Tensor:
    """Sum over all the weights of each channel, tensor by tensor."""
    return torch.stack(
        [values[name].transpose(0, dim).flatten(1).sum(1) if values[name].ndim > 1 else values[name]
         for name, dim in members.items()]
    ).sum(0)  # fmt: skip


def gated_loss(model: nn.Module, members: dict[str, int], x: Tensor, y: Tensor) -> Tensor:
    """The derivative of the loss by a factor on all the weights of each channel, at 1."""
    channels = next(dict(model.named_parameters())[name].shape[d] for name, d in members.items())
    gates = torch.ones(channels, requires_grad=True)
    weights = dict(model.named_parameters())
    for name, dim in members.items():
        shape = [-1 if i == dim else 1 for i in range(weights[name].ndim)]
        weights[name] = weights[name] * gates.view(shape)
    loss = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
    return torch.autograd.grad(loss, gates)[0]


@pytest.mark.parametrize("name", sorted(SETS))
def test_taylor_is_the_squared_first_order_change_of_the_loss(name: str) -> None:
    model = network()
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    (x, y), *_ = batches(DATA.train, 256, mean=DATA.mean, std=DATA.std)
    changes = [gated_loss(model, SETS[name], x[part], y[part]) for part in order.split(32)]
    found = ranked(model, "taylor")[name].importance
    torch.testing.assert_close(found, torch.stack(changes).square().mean(0), rtol=1e-3, atol=1e-9)
    assert found.std() > 0


def exact_diagonal(model: nn.Module, task: Task, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The diagonal of the Hessian of the mean loss, by second derivatives."""
    found = {}
    for name, weight in model.named_parameters():

        def loss(flat: Tensor, name: str = name, like: Tensor = weight) -> Tensor:
            scores = torch.func.functional_call(model, {name: flat.view_as(like)}, (x,))
            return task.loss(scores, y)

        square = torch.func.hessian(loss)(weight.detach().flatten())
        found[name] = square.diagonal().view_as(weight).detach()
    return found


def squares(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores - F.one_hot(labels, 4)).square().sum(1).mean()


def four_bits(scores: Tensor, labels: Tensor) -> Tensor:
    bits = F.one_hot(labels, 4).float()
    return F.binary_cross_entropy_with_logits(scores, bits, reduction="none").sum(1).mean()


@pytest.mark.parametrize(
    "task",
    [CLASSIFICATION, Task(loss=squares), Task(loss=four_bits)],
    ids=["classification", "squares", "bits"],
)
def test_the_diagonal_is_that_of_the_hessian(task: Task) -> None:
    model = network()
    (x, y), *_ = batches(DATA.train, 12, mean=DATA.mean, std=DATA.std)
    names = [name for name, _ in model.named_parameters()]
    probes = (torch.eye(12 * 4) * (12 * 4) ** 0.5).view(-1, 12, 4)
    with as_judged(model) as weights:
        found = gauss_newton_diagonal(model(x), y, weights, probes, task)
    expected = exact_diagonal(model, task, x, y)
    for name, values in zip(names, found, strict=True):
        torch.testing.assert_close(values / 12, expected[name], rtol=1e-3, atol=1e-6)
    assert sum(float(values.abs().sum()) for values in found) > 0


def test_hessian_is_the_saliency_of_optimal_brain_damage() -> None:
    model = network()
    (x, y), *_ = batches(DATA.train, 256, mean=DATA.mean, std=DATA.std)
    diagonal = exact_diagonal(model, CLASSIFICATION, x, y)
    saliency = {
        name: diagonal[name] * weight.detach().square() / 2
        for name, weight in model.named_parameters()
    }
    for name, found in ranked(model, "hessian").items():
        expected = by_channel(model, saliency, SETS[name])
        assert float((found.importance / expected - 1).abs().mean()) < 0.15
        assert torch.corrcoef(torch.stack([found.importance, expected]))[0, 1] > 0.95


def test_probes_come_nearer_to_the_hessian_the_more_there_are() -> None:
    model = network()
    (x, y), *_ = batches(DATA.train, 32, mean=DATA.mean, std=DATA.std)
    expected = torch.cat(
        [v.flatten() for v in exact_diagonal(model, CLASSIFICATION, x, y).values()]
    )
    errors = []
    for count in (4, 400):
        generator = torch.Generator().manual_seed(0)
        probes = torch.randint(0, 2, (count, 32, 4), generator=generator).float() * 2 - 1
        with as_judged(model) as weights:
            found = gauss_newton_diagonal(model(x), y, weights, probes, CLASSIFICATION)
        flat = torch.cat([values.flatten() for values in found]) / 32
        errors.append(float((flat - expected).norm() / expected.norm()))
    assert errors[1] < 0.15 < errors[0]


class Channels(nn.Module):
    """Grouped convolutions, one of them five wide and depthwise, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = DepthwiseConv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.last = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.depthwise(F.relu(self.grouped(x))))
        return self.last(x.flatten(1))


def test_channels_that_are_groups_and_flattened_maps_have_all_their_weights() -> None:
    torch.manual_seed(0)
    model = Channels().eval()
    (found,) = ranked(model, "taylor").values()
    members = {"stem.weight": 0, "stem.bias": 0, "grouped.weight": 0, "grouped.bias": 0,
               "depthwise.weight": 0}  # fmt: skip
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    (x, y), *_ = batches(DATA.train, 256, mean=DATA.mean, std=DATA.std)
    changes = []
    for part in order.split(32):
        weights = {name: w.detach().requires_grad_() for name, w in model.named_parameters()}
        loss = F.cross_entropy(torch.func.functional_call(model, weights, (x[part],)), y[part])
        grads = torch.autograd.grad(loss, list(weights.values()))
        values = {n: w.detach() * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        total = by_channel(model, values, members)
        read = values["grouped.weight"].flatten(2).sum(2)  # (8, 4): of each group the inputs
        total += torch.cat([read[:4].sum(0), read[4:].sum(0)])
        total += values["last.weight"].view(4, 8, 36).sum((0, 2))
        changes.append(total)
    per_channel = torch.stack(changes).square().mean(0)
    expected = torch.stack([per_channel[list(unit)].mean() for unit in found.units])
    torch.testing.assert_close(found.importance, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_channels_that_the_loss_does_not_need_leave_first(
    trained: Trained, importance: str
) -> None:
    """Few channels of a network at rest: these are the terms of a small change."""
    rested, data = copy.deepcopy(trained.network), trained.data
    fit(rested, data, epochs=2, rate=0.005)

    def loss_without(which: str, seed: int = 0) -> float:
        model = copy.deepcopy(rested)
        method = ChannelPruning(ratio=0.05, importance=which, round_to=1, seed=seed)
        compress_(model, method, input_shape=trained.card.input_shape, data=data)
        return evaluate(model, data.train, mean=data.mean, std=data.std)[0]

    by_chance = [loss_without("random", seed) for seed in range(5)]
    assert loss_without(importance) < sum(by_chance) / len(by_chance)


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_modes_gradients_and_weights_are_left_alone(importance: str) -> None:
    model = network().train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    found = ranked(model, importance), ranked(model, importance)
    assert all(torch.equal(found[0][n].importance, found[1][n].importance) for n in SETS)
    assert model.training
    assert not model[3].training
    assert not model[0].weight.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_images_are_needed(importance: str) -> None:
    with pytest.raises(InputError, match=r"compress_ got no data; expected data="):
        compress_(network(), ChannelPruning(importance=importance), input_shape=SHAPE)


def test_another_seed_draws_other_images() -> None:
    model = network()
    first, second = (
        hessian(model, replace(tools(), seed=seed), images=32, seed=seed)[model[0].weight]
        for seed in (0, 1)
    )
    assert not torch.equal(first, second)
