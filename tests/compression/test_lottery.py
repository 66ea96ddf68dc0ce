"""Tickets rewind to what they began with, under masks that only grow; their control does not."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from digits_network import Trained, fit
from torch import nn

from fbnas.compression import LotteryTicket, Round, Sparsity, compress_
from fbnas.compression.lottery import initialise_anew_, masks_of, rewind_
from fbnas.errors import InputError
from fbnas.space import build_network
from fbnas.space.network import save_weights

SHAPE = (3, 8, 8)


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Trainer:
    """Trains a little, and remembers what it was given and what it left."""

    def __init__(self) -> None:
        self.given: list[dict[str, torch.Tensor]] = []
        self.left: list[dict[str, torch.Tensor]] = []
        self.epochs: list[int | None] = []

    def __call__(self, model: nn.Module, epochs: int | None = None) -> int:
        self.given.append(plain(model))
        self.epochs.append(epochs)
        generator = torch.Generator().manual_seed(len(self.given))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, *SHAPE, generator=generator)).square().sum().backward()
            optimizer.step()
        self.left.append(plain(model))
        return len(self.given)


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights as the layers use them, also while they are held."""
    found = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if "parametrizations" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            found[f"{name}.weight"] = module.weight.detach().clone()
    return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


PRUNED = ("0.weight", "6.weight")


def test_each_round_prunes_the_trained_weights_and_trains_the_first_ones() -> None:
    network, trainer = small(), Trainer()
    method = LotteryTicket(rounds=3, fraction=0.3)
    report = compress_(network, method, input_shape=SHAPE, train_anew=trainer, seed=5)
    first = small(seed=1)
    initialise_anew_(first, 5)
    beginning = plain(first)
    assert same(trainer.given[0], beginning)
    total = sum(beginning[name].numel() for name in PRUNED)
    left = total
    for number in range(1, 4):
        before, given = trainer.left[number - 1], trainer.given[number]
        left = total - round(total * (1 - left / total * 0.7))
        kept = torch.cat([before[name].abs().flatten() for name in PRUNED])
        limit = kept.sort(descending=True).values[left - 1]
        for name, value in beginning.items():  # by definition: the mask of the trained weights
            expected = value * (before[name].abs() >= limit) if name in PRUNED else value
            assert torch.equal(given[name], expected), name
        assert report.changes[number].sparsity == pytest.approx(1 - left / total)
    assert len(trainer.given) == 4
    assert report.trained == 4
    assert same(plain(network), trainer.left[-1])
    assert [found.number for found in report.changes] == [0, 1, 2, 3]
    assert report.changes[3].sparsity == pytest.approx(1 - 0.7**3, abs=0.01)


def test_rewinding_to_an_early_epoch_goes_back_to_what_a_short_training_left() -> None:
    trainer = Trainer()
    method = LotteryTicket(rounds=1, rewind_epochs=2)
    network = small()
    compress_(network, method, input_shape=SHAPE, train_anew=trainer)
    assert trainer.epochs == [2, None, None]
    assert same(trainer.given[1], trainer.left[0])
    for name, value in trainer.given[2].items():
        mask = value != 0 if name in PRUNED else torch.ones_like(value)
        assert torch.equal(value, trainer.left[0][name] * mask)


def test_the_control_has_the_same_mask_other_weights_and_as_much_training() -> None:
    trainer = Trainer()
    method = LotteryTicket(rounds=2, rewind_epochs=1, control=True)
    compress_(small(), method, input_shape=SHAPE, train_anew=trainer)
    assert trainer.epochs == [1, None, 1, None, None, 1, None, None]
    for control, ticket in ((2, 4), (5, 7)):
        for name in PRUNED:
            random, rewound = trainer.given[control][name], trainer.given[ticket][name]
            assert torch.equal(random != 0, rewound != 0)
            assert not torch.isin(random[random != 0], rewound).any()
        trained = trainer.given[control + 1]
        assert same(trained, trainer.left[control])
    assert not torch.equal(trainer.given[2]["6.weight"], trainer.given[5]["6.weight"])

    alone = Trainer()
    without = LotteryTicket(rounds=2, rewind_epochs=1)
    compress_(small(), without, input_shape=SHAPE, train_anew=alone)
    assert len(alone.given) == 4


def test_given_weights_are_rewound_to_and_the_network_is_taken_as_trained(tmp_path: Path) -> None:
    network, trainer = small(3), Trainer()
    save_weights(network, tmp_path / "w.safetensors")
    beginning = plain(network)
    Trainer()(network)
    end = plain(network)
    method = LotteryTicket(rounds=1, scope="layer", rewind_to=str(tmp_path / "w.safetensors"))
    compress_(network, method, input_shape=SHAPE, train_anew=trainer)
    (given,) = trainer.given
    for name in PRUNED:
        smallest = end[name].abs().flatten().argsort()[: round(0.2 * end[name].numel())]
        mask = torch.ones(end[name].numel())
        mask[smallest] = 0
        assert torch.equal(given[name], beginning[name] * mask.view(end[name].shape))


def test_a_weight_that_begins_as_zero_is_not_taken_for_pruned() -> None:
    network = small()
    masks = masks_of(network)
    masks["6.weight"][0] = False
    with torch.no_grad():
        network[6].weight.zero_()
    rewind_(network, dict(network.state_dict()), masks)
    assert torch.equal(network[6].weight != 0, masks["6.weight"])
    assert float(network[6].weight.detach().abs().max()) < 1e-30


def test_zeros_of_earlier_methods_stay_in_every_round() -> None:
    network, trainer = small(), Trainer()
    methods = [Sparsity(sparsity=0.4, steps=1), LotteryTicket(rounds=1, fraction=0.5)]
    report = compress_(network, methods, input_shape=SHAPE, train_anew=trainer, train=None)
    assert report.changes[0].sparsity == pytest.approx(0.4, abs=0.01)
    assert report.changes[1].sparsity == pytest.approx(0.7, abs=0.01)
    for name in PRUNED:
        assert (trainer.given[1][name] == 0)[trainer.given[0][name] == 0].all()


def test_new_weights_are_those_of_build_network_and_leave_the_generator_alone(
    trained: Trained,
) -> None:
    torch.manual_seed(4)
    built = build_network(trained.card.space, trained.card.architecture, classes=10)
    drawn = copy.deepcopy(trained.network)
    state = torch.get_rng_state()
    initialise_anew_(drawn, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(plain(drawn), plain(built))
    again = copy.deepcopy(trained.network)
    initialise_anew_(again, 4)
    assert same(plain(drawn), plain(again))
    initialise_anew_(again, 5)
    assert not same(plain(drawn), plain(again))


def test_a_ticket_of_digits_learns_and_says_what_each_round_came_to(
    trained: Trained, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    method = LotteryTicket(rounds=2, fraction=0.6, control=True)
    report = compress_(
        network,
        method,
        input_shape=(1, 8, 8),
        train_anew=lambda model: fit(model, trained.data, epochs=8),
        data=trained.data,
        folder=tmp_path,
    )
    rounds: list[Round] = list(report.changes)
    assert rounds[2].accuracy == report.after.accuracy
    assert rounds[2].accuracy > rounds[0].accuracy - 0.03 > 0.9
    assert rounds[0].control_accuracy is None
    assert all(0.5 < found.control_accuracy < rounds[0].accuracy for found in rounds[1:])
    rows = list(csv.DictReader((tmp_path / "lottery.csv").open()))
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(
        [found.accuracy for found in rounds], rel=1e-5
    )
    assert rows[0]["control_accuracy"] == ""
    assert "round 1: sparsity 0.600, ticket accuracy" in str(rounds[1])


class Own(nn.Module):
    """Parameters that nothing can draw anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.linear = nn.Linear(4, 2)


def test_what_a_ticket_cannot_begin_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the network \(Own\) has parameters and no reset_para"):
        initialise_anew_(Own(), 0)
    with pytest.raises(InputError, match="LotteryTicket got nothing that trains"):
        compress_(small(), LotteryTicket(), input_shape=SHAPE)
    network = small()
    with torch.no_grad():
        network[6].weight.copy_(network[6].weight.sign())
    with pytest.raises(InputError, match="expected it before the method that shares weights"):
        compress_(network, LotteryTicket(), input_shape=SHAPE, train=Trainer())

    def rewound(path: Path) -> None:
        method = LotteryTicket(rewind_to=str(path))
        compress_(small(), method, input_shape=SHAPE, train=Trainer())

    with pytest.raises(InputError, match="no such file; expected weights.safetensors"):
        rewound(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="damaged"):
        rewound(tmp_path / "bad.safetensors")
    save_weights(nn.Linear(2, 2), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="the weights of another network"):
        rewound(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 0}, "rounds is 0; expected a whole number of at least 1"),
        ({"rewind_epochs": -1}, "rewind_epochs is -1"),
        ({"fraction": 0.0}, r"fraction is 0\.0; expected more than 0, less than 1"),
        ({"max_sparsity": 1.0}, r"max_sparsity is 1\.0; expected more than 0, less than 1"),
        ({"scope": "layers"}, "Did you mean 'layer'"),
        ({"rewind_to": "a", "rewind_epochs": 1}, "expected one of them"),
        ({"kinds": ["convolutions"]}, "Did you mean 'convolution'"),
    ],
)
def test_settings_of_a_ticket_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        LotteryTicket(**settings)


def test_a_ticket_by_layer_takes_the_fraction_of_what_each_has_left() -> None:
    network = small()
    with torch.no_grad():
        network[6].weight[:, :4] = 0
    method = LotteryTicket(rounds=1, fraction=0.5, scope="layer")
    trainer = Trainer()
    compress_(network, method, input_shape=SHAPE, train_anew=trainer)
    sparse = {name: float((trainer.given[1][name] == 0).float().mean()) for name in PRUNED}
    assert sparse == {"0.weight": 0.5, "6.weight": 0.75}
