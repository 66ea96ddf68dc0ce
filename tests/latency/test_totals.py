"""A table from totals alone: against a known truth, against algebra, and against real devices."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from fbnas.errors import InputError
from fbnas.latency.effects import effects, entries_of, prior_order, sizes_of
from fbnas.latency.measurements import read_measurements
from fbnas.latency.suggestion import random_paths, suggest
from fbnas.latency.table import LatencyTable
from fbnas.latency.totals import Estimate, _Model, estimate, table_of
from fbnas.space import SearchSpace, build_block
from fbnas.space.network import count

DATA = Path(os.environ.get("FBNAS_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL = DATA / "whole_network_latency" / "fbnet_cifar.csv.gz"
HEADER = {
    "device": "made",
    "runtime": "whole networks",
    "precision": "fp32",
    "threads": "1",
    "batch": "1",
    "noise_floor": "0.01",
}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.from_dict(
        {
            "name": "small",
            "resolution": 16,
            "input_channels": 3,
            "stem": {"channels": 8, "stride": 1},
            "stages": [
                {"channels": 8, "layers": 2, "stride": 1},
                {"channels": 16, "layers": 3, "stride": 2},
                {"channels": 24, "layers": 3, "stride": 2},
            ],
            "head": 32,
            "blocks": ["k3_e1", "k3_e1_g2", "k3_e3", "k5_e6", "skip"],
        }
    )


@pytest.fixture(scope="module")
def truth(space: SearchSpace) -> tuple[np.ndarray, float]:
    """Entries in ms that multiply-adds explain only in part, and a base."""
    entries = entries_of(space)
    macs = np.array([size.macs for size in entries.sizes]) / 2e5
    grouped = np.array(["g2" in shape.block for shape in entries.shapes])
    return np.where(entries.identities, 0.0, 0.2 + macs + 0.5 * grouped), 3.0


def made(
    space: SearchSpace, truth: tuple[np.ndarray, float], networks: int, *, noise_ms: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    paths = random_paths(entries_of(space), networks, seed=1)
    noise = np.random.default_rng(0).normal(0.0, noise_ms, networks) if noise_ms else 0.0
    return paths, truth[1] + entries_of(space).counts(paths) @ truth[0] + noise


def test_sizes_agree_with_the_counting_rule() -> None:
    for name, channels in (("k3_e6", (16, 24, 2)), ("k5_e1_g2", (16, 16, 1)), ("skip", (8, 16, 2))):
        block = build_block(name, *channels)
        expected = count(block, (channels[0], 10, 10))
        found = sizes_of(build_block(name, *channels), (channels[0], 10, 10))
        assert (found.weights, found.macs) == (expected.params, expected.macs)
    block = sizes_of(build_block("k3_e1_g2", 8, 8, 1), (8, 4, 4))
    assert block.operators == 4  # three convolutions and the shuffle
    assert block.depthwise_macs == 9 * 8 * 16
    assert sizes_of(build_block("skip", 8, 8, 1), (8, 4, 4)).macs == 0


def test_entries_are_tied_by_shape(space: SearchSpace) -> None:
    entries = entries_of(space)
    assert len(set(entries.shapes)) == len(entries.shapes)
    assert (entries.index[3] == entries.index[4]).all()  # two layers of one shape
    paths = random_paths(entries, 20, seed=0)
    assert (entries.counts(paths).sum(axis=1) == len(space.layers)).all()
    assert sum(layers for _, layers in entries.places()) == len(space.layers)
    scaled = [
        (entries.counts(random_paths(entries, 4000, 7)) @ g).var(0).sum()
        for g in effects(entries, "macs")
    ]
    assert np.allclose(scaled, 1.0, atol=0.2)


def test_the_gradient_of_the_marginal_likelihood(space: SearchSpace) -> None:
    entries = entries_of(space)
    groups = [np.vstack([g, np.zeros((1, g.shape[1]))]) for g in effects(entries, "macs")]
    base = np.eye(len(entries.shapes) + 1)[:, -1:]
    rows = np.hstack([entries.counts(random_paths(entries, 15, 0)), np.ones((15, 1))])
    y = np.random.default_rng(0).normal(size=15)
    model = _Model(rows, y, [*groups, base])
    model.trust = np.random.default_rng(1).uniform(0.3, 1.2, 15)
    model._weigh()
    logs = np.random.default_rng(2).normal(-2.0, 1.0, len(model.belief_mean))
    loss, gradient = model._loss(logs)
    steps = 1e-5 * np.eye(len(logs))
    numeric = [(model._loss(logs + s)[0] - model._loss(logs - s)[0]) / 2e-5 for s in steps]
    assert gradient == pytest.approx(np.array(numeric), abs=1e-4)
    # the loss is the density of y under its own covariance, up to constants
    strengths = [*np.exp(logs[:-1]), 1.0]
    prior = sum(s * g @ g.T for s, g in zip(strengths, model.groups, strict=True))
    full = rows @ prior @ rows.T + np.diag(np.exp(logs[-1]) / model.trust)
    dense = 0.5 * (y @ np.linalg.solve(full, y) + np.linalg.slogdet(full)[1])
    dense += 0.5 * float((((logs - model.belief_mean) / model.belief_spread) ** 2).sum())
    assert loss == pytest.approx(dense - 0.5 * np.log(1 / model.trust).sum())


def test_left_out_predictions_are_those_of_a_fit_without_the_network(
    space: SearchSpace, truth: tuple[np.ndarray, float]
) -> None:
    entries = entries_of(space)
    paths, latency_ms = made(space, truth, 40, noise_ms=0.3)
    found = estimate(entries, paths, latency_ms)
    whole = found.predict(paths)[0]
    others = [i for i in range(40) if i != 7]
    without = estimate(entries, paths[others], latency_ms[others]).predict(paths[7:8])[0][0]
    assert found.left_out_ms[7] == pytest.approx(without, abs=0.1)
    error = np.abs(found.left_out_ms - latency_ms)
    assert (error >= np.abs(whole - latency_ms) - 1e-9).all()  # nobody is worse off when seen


@pytest.mark.parametrize("prior", ["macs", "none"])
def test_the_truth_is_found(
    space: SearchSpace, truth: tuple[np.ndarray, float], prior: str
) -> None:
    entries = entries_of(space)
    paths, latency_ms = made(space, truth, 400, noise_ms=0.02)
    found = estimate(entries, paths, latency_ms, prior=prior)  # type: ignore[arg-type]
    new = random_paths(entries, 200, seed=9)
    expected = truth[1] + entries.counts(new) @ truth[0]
    mean, deviation = found.predict(new)
    assert np.abs(mean - expected).max() < 0.05
    assert (np.abs(mean - expected) < 4 * deviation).all()
    assert found.noise_ms == pytest.approx(0.02, rel=0.5)
    assert (found.entry_ms[entries.identities] == 0).all()
    if prior == "macs":  # a shape with an identity is known absolutely
        low, high = found.interval_ms()
        tied = np.isin(np.arange(len(entries.shapes)), entries.index[[1, 3, 6]])
        assert ((low <= truth[0] + 1e-6) & (truth[0] <= high + 1e-6))[tied].mean() > 0.8


def test_disturbed_totals_do_not_bend_the_table(
    space: SearchSpace, truth: tuple[np.ndarray, float]
) -> None:
    entries = entries_of(space)
    paths, latency_ms = made(space, truth, 80, noise_ms=0.02)
    disturbed = latency_ms.copy()
    disturbed[::16] *= 2
    new = random_paths(entries, 200, seed=9)
    expected = truth[1] + entries.counts(new) @ truth[0]
    found = estimate(entries, paths, disturbed).predict(new)[0]
    assert np.abs(found / expected - 1).mean() < 0.02


def test_a_prior_helps_where_there_are_few_networks(
    space: SearchSpace, truth: tuple[np.ndarray, float]
) -> None:
    entries = entries_of(space)
    paths, latency_ms = made(space, truth, 10, noise_ms=0.1)
    new = random_paths(entries, 300, seed=9)
    expected = truth[1] + entries.counts(new) @ truth[0]
    true_table = table_of(_as_estimate(space, truth), HEADER, classes=10)
    scores = {
        str(prior): spearman(
            estimate(entries, paths, latency_ms, prior=prior).predict(new)[0], expected
        )
        for prior in ("none", "macs", true_table)
    }
    none, macs, table = scores.values()
    assert none + 0.1 < macs < table
    assert table > 0.98


def _as_estimate(space: SearchSpace, truth: tuple[np.ndarray, float]) -> Estimate:
    entries = entries_of(space)
    size = len(entries.shapes)
    samples = np.ones(size, dtype=int)
    return Estimate(entries, truth[0], truth[1], np.eye(size + 1) * 1e-4, 0.1, np.ones(3), samples)


def test_the_table_predicts_what_the_estimate_predicts(
    space: SearchSpace, truth: tuple[np.ndarray, float], tmp_path: Path
) -> None:
    entries = entries_of(space)
    paths, latency_ms = made(space, truth, 60, noise_ms=0.02)
    found = estimate(entries, paths, latency_ms)
    assert found.entry_ms.min() > -0.05  # next to nothing has to be clipped
    table_of(found, HEADER, classes=10).save(tmp_path / "t.csv")
    latency, base_ms = LatencyTable.load(tmp_path / "t.csv").tensor(space, classes=10)
    told = base_ms + latency.numpy()[np.arange(len(space.layers)), paths].sum(axis=1)
    assert told == pytest.approx(found.predict(paths)[0], abs=0.1)
    lowered = _as_estimate(space, (truth[0] - 0.3 * ~entries.identities, truth[1]))
    shifted = table_of(lowered, HEADER, classes=10)
    assert min(entry.latency_ms for entry in shifted.entries) == 0.0
    assert [e.samples for e in shifted.entries if e.shape.block == "head"] == [0]


def test_suggested_networks_tell_more_than_random_ones(
    space: SearchSpace, truth: tuple[np.ndarray, float]
) -> None:
    entries = entries_of(space)
    pool = random_paths(entries, 300, seed=3)
    chosen = suggest(entries, 12, among=pool)
    assert len(chosen) == 12
    assert {tuple(p) for p in chosen.tolist()} <= {tuple(p) for p in pool.tolist()}
    assert (suggest(entries, 12, among=pool) == chosen).all()
    assert len(suggest(entries, 1000, among=pool[:20])) <= 20

    def spread(paths: np.ndarray) -> float:
        known = estimate(entries, paths, truth[1] + entries.counts(paths) @ truth[0])
        return float(known.predict(pool)[1].mean() / known.noise_ms)

    assert spread(chosen) < np.mean([spread(pool[i : i + 12]) for i in range(0, 96, 12)])
    known = estimate(entries, chosen, truth[1] + entries.counts(chosen) @ truth[0])
    following = suggest(entries, 4, among=pool, known=known)
    assert not {tuple(p) for p in following.tolist()} & {tuple(p) for p in chosen.tolist()}


def test_what_cannot_be_fitted_is_refused(
    space: SearchSpace, truth: tuple[np.ndarray, float]
) -> None:
    entries = entries_of(space)
    paths, latency_ms = made(space, truth, 20)
    with pytest.raises(InputError, match="7 measured networks; expected at least 8"):
        estimate(entries, paths[:7], latency_ms[:7])
    with pytest.raises(InputError, match="all 20 measured networks take 5 ms; expected networks"):
        estimate(entries, paths, np.full(20, 5.0))


@pytest.mark.skipif(not REAL.is_file(), reason=f"no real measurements: {REAL} is absent")
def test_real_devices_are_ranked_from_a_hundred_totals() -> None:
    """Two devices of nine, one split: the study over all is scripts/totals."""
    space = SearchSpace.load("fbnet_cifar")
    entries = entries_of(space)
    macs = prior_order(entries, "macs")
    assert macs is not None
    for column, bar in (("titan_rtx_1_ms", 0.97), ("gold_6226_ms", 0.88)):
        real = read_measurements(REAL, space, column)
        order = np.random.default_rng(0).permutation(len(real))
        seen, unseen = order[:100], order[-1000:]
        found = estimate(entries, real.paths[seen], real.latency_ms[seen])
        mean, deviation = found.predict(real.paths[unseen])
        truth_ms = real.latency_ms[unseen]
        assert spearman(mean, truth_ms) > bar
        assert spearman(mean, truth_ms) > spearman(
            entries.counts(real.paths[unseen]) @ macs, truth_ms
        )
        within = np.abs(mean - truth_ms) < 1.96 * np.hypot(deviation, found.noise_ms)
        assert 0.85 < within.mean() <= 1.0


def test_a_misleading_prior_is_outvoted(
    space: SearchSpace, truth: tuple[np.ndarray, float]
) -> None:
    entries = entries_of(space)
    paths, latency_ms = made(space, truth, 60, noise_ms=0.05)
    wrong = np.where(entries.identities, 0.0, truth[0].max() + 0.1 - truth[0])
    misleading = table_of(_as_estimate(space, (wrong, 1.0)), HEADER, classes=10)
    new = random_paths(entries, 300, seed=9)
    expected = truth[1] + entries.counts(new) @ truth[0]
    found = estimate(entries, paths, latency_ms, prior=misleading).predict(new)[0]
    assert spearman(entries.counts(new) @ wrong, expected) < 0.5
    assert spearman(found, expected) > 0.95
