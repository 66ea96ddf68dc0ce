"""Low rank: against the regression's own optimum, the paper's greedy rule, and on digits."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from digits_network import Trained, accuracy, fit
from torch import Tensor, nn

from fbnas.compression import ChannelPruning, LowRank, Tools, compress_, low_rank
from fbnas.compression.low_rank import (
    ReducedRank,
    Spectrum,
    auxiliary,
    factor_,
    rank_for_energy,
    ranks_for_macs,
)
from fbnas.compression.low_rank import fit as fit_responses
from fbnas.compression.responses import outputs_of, training_images
from fbnas.errors import InputError
from fbnas.export import export_onnx
from fbnas.space import count, load_network, save_network


def rows(count: int, width: int, seed: int) -> Tensor:
    """Correlated responses, not centred."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 0.5


def loss(targets: Tensor, found: Tensor) -> float:
    return float((targets - found).square().sum())


def test_on_its_own_responses_the_solution_is_their_principal_components() -> None:
    y = rows(200, 6, seed=0)
    outer, inner, offset = ReducedRank(y, 2).fit(y)
    _, _, right = np.linalg.svd((y - y.mean(0)).numpy(), full_matrices=False)
    projector = torch.from_numpy(right[:2].T @ right[:2])
    torch.testing.assert_close(outer @ inner.T, projector, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(offset, y.mean(0) - projector @ y.mean(0), rtol=1e-5, atol=1e-5)


def test_regression_reaches_the_optimum_that_theory_gives() -> None:
    """Eckart-Young on fitted values: the residual of least squares and the singular values left."""
    y, z = (
        rows(300, 5, seed=1),
        rows(300, 5, seed=2) + rows(300, 5, seed=1) @ torch.ones(5, 5).double(),
    )
    design = np.c_[y.numpy(), np.ones(300)]
    fitted = design @ np.linalg.lstsq(design, z.numpy(), rcond=None)[0]
    values = np.linalg.svd(fitted - fitted.mean(0), compute_uv=False)
    for rank in (1, 2, 4):
        regression = ReducedRank(y, rank)
        outer, inner, offset = regression.fit(z)
        least = ((z.numpy() - fitted) ** 2).sum() + (values[rank:] ** 2).sum()
        assert loss(z, regression.answers(outer, inner, offset)) == pytest.approx(least, rel=1e-6)
        assert torch.linalg.matrix_rank(outer @ inner.T) == rank


def test_silent_channels_are_no_obstacle() -> None:
    y = rows(100, 4, seed=3)
    y[:, 1] = 0.0
    y[:, 3] = y[:, 2]
    outer, inner, offset = ReducedRank(y, 2).fit(y)
    assert loss(y, (y @ inner) @ outer.T + offset) < 1e-4 * loss(y, y.mean(0))
    silent = torch.zeros(10, 3).double()
    assert ReducedRank(silent, 1).fit(silent + 2)[2].tolist() == [2, 2, 2]


def test_auxiliary_responses_are_the_minimum_of_their_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(500, generator=generator, dtype=torch.float64).relu()
    answers = torch.randn(500, generator=generator, dtype=torch.float64)
    grid = torch.linspace(-5, 5, 20001, dtype=torch.float64)[:, None]
    for penalty in (0.01, 1.0):

        def cost(z: Tensor, penalty: float = penalty) -> Tensor:
            return (target - z.relu()) ** 2 + penalty * (z - answers) ** 2

        found = cost(auxiliary(target, answers, penalty))
        assert (found <= cost(grid).min(0).values + 1e-9).all()


def test_fitting_behind_the_relu_is_better_there_than_fitting_before_it() -> None:
    y = rows(600, 8, seed=4)
    given = y + 0.3 * rows(600, 8, seed=5)  # as from layers before that were approximated
    linear = fit_responses(given, y, 3, relu=False)
    behind = fit_responses(given, y, 3, relu=True)

    def error(solution: tuple[Tensor, Tensor, Tensor, float]) -> float:
        outer, inner, offset, _ = solution
        answers = ((given @ inner) @ outer.T + offset).relu()
        target = y.relu()
        return loss(target, answers) / loss(target, target.mean(0).expand_as(target))

    assert error(behind) < 0.97 * error(linear)
    assert behind[3] == pytest.approx(error(behind))
    symmetric = fit_responses(y, y, 3, relu=True)
    assert error(behind) < error(symmetric)


SPECTRA = [
    Spectrum("a", (8.0, 4.0, 2.0, 1.0), whole_macs=400, rank_macs=110),
    Spectrum("b", (5.0, 0.5, 0.1), whole_macs=600, rank_macs=250),
    Spectrum("c", (1.0, 1.0, 1.0, 1.0, 1.0), whole_macs=500, rank_macs=120),
]


def test_ranks_follow_the_energy_asked_for() -> None:
    assert rank_for_energy(SPECTRA[0], 0.8) == 2  # exactly 12 of 15
    assert rank_for_energy(SPECTRA[0], 0.81) == 3
    assert rank_for_energy(SPECTRA[0], 1.0) == 4
    assert rank_for_energy(SPECTRA[1], 0.5) == 1
    assert rank_for_energy(Spectrum("dead", (0.0, 0.0), 4, 1), 0.95) == 1


@pytest.mark.parametrize("budget", [1500, 1200, 1000, 800, 600, 480])
def test_greedy_ranks_keep_the_budget_and_nearly_the_best_energy(budget: int) -> None:
    def macs(ranks: tuple[int, ...]) -> int:
        return sum(s.macs(rank) for s, rank in zip(SPECTRA, ranks, strict=True))

    def energy(ranks: tuple[int, ...]) -> float:
        return math.prod(s.energy(r) for s, r in zip(SPECTRA, ranks, strict=True) if s.pays(r))

    ranks = tuple(ranks_for_macs(SPECTRA, budget))
    assert macs(ranks) <= budget
    every = itertools.product(*(range(1, s.width + 1) for s in SPECTRA))
    best = max((r for r in every if macs(r) <= budget), key=energy)
    assert energy(ranks) >= 0.75 * energy(best)


def test_the_first_eigenvalue_to_go_loses_least_for_what_it_saves() -> None:
    """0.1 of 5.6 for 250 multiply-adds is less than 1 of 15 for 110 and 1 of 5 for 120."""
    assert ranks_for_macs(SPECTRA, 1499) == [4, 2, 5]


class Plain(nn.Sequential):
    """A network without batch normalisation: strided, dilated, grouped, repeated layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=2, dilation=2, bias=False, padding_mode="reflect"),
            nn.ReLU6(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.Conv2d(24, 32, 1),
            nn.Flatten(),
            nn.Linear(512, 48),
            nn.ReLU(),
            nn.Linear(48, 10),
        )


def lower_rank_(layer: nn.Module, rank: int) -> None:
    with torch.no_grad():
        left, values, right = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
        values[rank:] = 0
        layer.weight.copy_((left * values @ right).view_as(layer.weight))


def test_layers_of_low_rank_are_factored_exactly(trained: Trained) -> None:
    torch.manual_seed(0)
    network = Plain()
    for place, rank in ((0, 2), (2, 5), (5, 4), (7, 7), (9, 3)):
        lower_rank_(network[place], rank)
    expected = copy.deepcopy(network)
    report = compress_(
        network, LowRank(energy=1 - 1e-6, images=200), input_shape=(1, 8, 8), data=trained.data
    )
    changes = {change.layer: change for change in report.changes}
    assert {name: x.rank for name, x in changes.items()} == {
        "0": 2, "2": 5, "4": 24, "5": 4, "7": 7, "9": 3,
    }  # fmt: skip
    assert changes["4"].reason == "grouped"
    assert network[2][0].padding_mode == "reflect"
    images = torch.cat(training_images(tools(trained), 100, torch.device("cpu")))
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected(images), rtol=1e-3, atol=1e-3)
    assert report.after.macs < 0.6 * report.before.macs


def tools(trained: Trained, **more: object) -> Tools:
    return Tools(trained.card.input_shape, data=trained.data, **more)  # type: ignore[arg-type]


def test_later_layers_make_up_for_earlier_ones(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asymmetric: fitted to inputs as they are, the scores are nearer than fitted to exact ones."""
    whole, network, symmetric = (copy.deepcopy(trained.network) for _ in range(3))
    factor_(network, LowRank(energy=0.8, images=200), tools(trained))

    def of_whole(model: nn.Module, modules: dict, images: list, **sampling: int) -> dict:
        if len(modules) == 1:
            model, modules = whole, {name: whole.get_submodule(name) for name in modules}
        return outputs_of(model, modules, images, **sampling)

    monkeypatch.setattr(low_rank, "outputs_of", of_whole)
    factor_(symmetric, LowRank(energy=0.8, images=200), tools(trained))
    images = torch.cat(training_images(tools(trained), 1000, torch.device("cpu")))
    with torch.no_grad():
        exact, found, other = (m.eval()(images) for m in (whole, network, symmetric))
    assert loss(exact, found) < 0.8 * loss(exact, other)


def test_fine_tuning_brings_the_accuracy_back_at_the_speed_up_asked_for(trained: Trained) -> None:
    network = copy.deepcopy(trained.network)
    report = compress_(
        network,
        LowRank(speedup=1.5, images=200),
        data=trained.data,
        train=lambda model: fit(model, trained.data, epochs=3, rate=0.02),
    )
    assert report.after.macs <= report.before.macs / 1.5
    assert report.after.macs >= 0.9 * report.before.macs / 1.5
    assert accuracy(network, trained.data) > accuracy(trained.network, trained.data) - 0.03


def test_a_factored_network_goes_on(trained: Trained, tmp_path: Path) -> None:
    """Saved, loaded, counted, exported, pruned and factored again."""
    network = copy.deepcopy(trained.network)
    factored = compress_(network, LowRank(energy=0.9, images=100), data=trained.data)
    for further in (ChannelPruning(ratio=0.25, round_to=4), LowRank(energy=0.8, images=200)):
        compress_(network, further, data=trained.data)
        save_network(tmp_path, network, trained.card)
        loaded, _ = load_network(tmp_path)
        images = torch.randn(3, *trained.card.input_shape)
        with torch.no_grad():
            assert torch.equal(loaded(images), network.eval()(images))
        counted = count(loaded, trained.card.input_shape)
        assert counted == count(network, trained.card.input_shape)
        assert counted.macs < factored.after.macs
        exported = export_onnx(loaded, tmp_path / "model.onnx", card=trained.card)
        assert exported.argmax_agreement == 1
    assert str(loaded) == str(network)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"energy": 0.0}, r"energy is 0\.0; expected a fraction, 0 < energy <= 1"),
        ({"energy": 1.1}, r"energy is 1\.1; expected a fraction"),
        ({"speedup": 1.0}, r"speedup is 1\.0; expected more than 1"),
        ({"images": 0}, "images is 0; expected at least 1"),
        ({"places": 0}, "places is 0; expected at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        LowRank(**settings)


def test_what_cannot_be_had_is_refused(trained: Trained) -> None:
    with pytest.raises(InputError, match=r"speedup is 90; expected at most \d+\.\d+, which all"):
        compress_(copy.deepcopy(trained.network), LowRank(speedup=90), data=trained.data)
    with pytest.raises(InputError, match="got no data; expected data="):
        compress_(copy.deepcopy(trained.network), LowRank())
