"""Budgets beside milliseconds: energy, peak memory and parameters, alone and together."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_run import SPACE, Table, run

from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.latency.profiling import plan
from fbnas.latency.table import Entry, LatencyTable
from fbnas.search import (
    Supernet,
    Target,
    build_objective,
    check_limits,
    loop,
    most_probable_within,
    read_result,
)
from fbnas.space import Architecture, build_network, count

HEADER = {"device": "board", "runtime": "none", "precision": "int8", "threads": "1", "batch": "1"}
MS = {"k3_e1": 1.0, "k3_e3": 3.0}
MJ = {"k3_e1": 2.0, "k3_e3": 4.0}  # a network needs 5 mJ (two are identities) to 15 mJ
MB = {"k3_e1": 0.2, "k3_e3": 0.6, "stem": 0.3}
LEARNING = {
    "epochs": 8,
    "warmup_epochs": 2,
    "batch_size": 16,
    "theta_passes": 12,
    "augment": {},
    "checkpoint_every_s": 300.0,
}


def table(*, energy: bool = True, peak: bool = True) -> LatencyTable:
    """Three layers of 0 to 3 ms on a base of 2 ms, as the stub of the other tests."""
    entries = []
    for shape in plan(SPACE, 10):
        name = shape.block
        fixed = {"stem": 1.0, "head": 1.0}
        ms = MS.get(name, fixed.get(name, 0.0))
        mj = MJ.get(name, fixed.get(name, 1.0)) if energy else None
        mb = MB.get(name, 0.1) if peak else None
        identity = name == "skip"  # this space has no skip that changes the shape
        nothing = {"energy_mj": None, "peak_mb": None}
        known: dict[str, Any] = nothing if identity else {"energy_mj": mj, "peak_mb": mb}
        entries.append(Entry(shape, ms, ms, ms, 0 if identity else 9, **known))
    return LatencyTable({**HEADER, "noise_floor": "0.01"}, entries)


def target(budget_ms: float | None = None, **budgets: Any) -> Target:
    return Target(table(), budget_ms, "board", **budgets)


def last(result: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The last epoch's row of the only target, and its further budgets by name."""
    row = result.history[-1]["targets"][0]
    return row, {limit["name"]: limit for limit in row["limits"]}


def test_energy_alone_takes_the_place_of_latency() -> None:
    row, limits = last(run(settings=LEARNING, targets=[target(budget_mj=10.0)]))
    assert row["budget_ms"] is None
    assert limits["energy"]["expected"] == pytest.approx(10.0, rel=0.1)


def test_of_two_budgets_both_are_met_and_the_tighter_binds() -> None:
    loose_ms, tight_mj = 9.5, 8.0  # 9.5 ms are 13 mJ
    row, limits = last(run(settings=LEARNING, targets=[target(loose_ms, budget_mj=tight_mj)]))
    assert row["expected_latency_ms"] < 0.8 * loose_ms
    assert limits["energy"]["expected"] == pytest.approx(tight_mj, rel=0.1)
    assert limits["energy"]["lambda"] > 0 == row["lambda"]
    tight_ms, loose_mj = 5.0, 14.0
    row, limits = last(run(settings=LEARNING, targets=[target(tight_ms, budget_mj=loose_mj)]))
    assert row["expected_latency_ms"] == pytest.approx(tight_ms, rel=0.1)
    assert limits["energy"]["expected"] < 0.8 * loose_mj
    assert limits["energy"]["lambda"] == 0


def test_parameters_are_met() -> None:
    lowest, highest = next(x for x in target(5.0).limits(SPACE, 10) if x.name == "params").range()
    most = round((lowest + highest) / 2)
    _, limits = last(run(settings=LEARNING, targets=[target(max_params=most)]))
    assert limits["params"]["expected"] == pytest.approx(most, rel=0.1)


def test_blocks_over_the_peak_are_never_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    forward = Supernet.forward

    def note(self: Supernet, images: torch.Tensor, gates: Any, *rest: Any) -> torch.Tensor:
        shown.append(gates if isinstance(gates, list) else gates.argmax(1).tolist())
        return forward(self, images, gates, *rest)

    monkeypatch.setattr(Supernet, "forward", note)
    result = run(targets=[target(budget_mb=0.5), target(6.0, budget_mb=0.4)])
    heavy = SPACE.blocks.index("k3_e3")
    assert not any(heavy in path for path in shown)
    for theta in result.distributions:
        assert (theta.probabilities()[:, heavy] == 0).all()
    row, limits = last(result)
    assert limits["peak"]["expected"] == 0.3  # the stem's
    assert all(line[heavy] is None for line in row["logits"])


def test_what_a_search_learned_reads_back_with_its_budgets(tmp_path: Path) -> None:
    asked = target(9.0, budget_mj=12.0, budget_mb=0.5, max_params=9000)
    result = run(tmp_path, targets=[asked])
    (learned,) = read_result(tmp_path)[1]
    before = asked.limits(SPACE, 10)
    assert [x.name for x in learned.limits] == ["latency", "energy", "peak", "params"]
    for found, expected in zip(learned.limits, before, strict=True):
        assert torch.equal(found.cost.nan_to_num(-1), expected.cost.nan_to_num(-1))
        for key in ("name", "unit", "budget", "base", "kind"):
            assert getattr(found, key) == getattr(expected, key)
    theta = result.distributions[0]
    assert torch.equal(learned.distribution.probabilities(), theta.probabilities())


def test_an_older_theta_json_still_reads(tmp_path: Path) -> None:
    run(tmp_path)
    content = read_json(tmp_path / "theta.json")
    for stored in content["targets"]:
        del stored["limits"]
    write_json(tmp_path / "theta.json", content)
    learned = read_result(tmp_path)[1][0]
    assert [x.name for x in learned.limits] == ["latency", "params"]
    assert [x.bounded for x in learned.limits] == [True, False]


def test_a_resumed_search_has_its_multipliers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [target(6.0, budget_mj=6.5)]
    whole = run(targets=targets)
    save = loop.Loop.save

    def die(self: Any) -> None:
        save(self)
        if (self.epoch, self.phase, self.step) == (3, "weights", 0):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "save", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, targets=targets)
    with pytest.raises(InputError, match="of another search: limits"):
        run(tmp_path, targets=[target(6.0, budget_mj=7.0)], resume=True)
    resumed = run(tmp_path, targets=targets, resume=True)
    assert last(resumed) == last(whole)
    assert last(whole)[1]["energy"]["lambda"] > 0


def test_selection_keeps_all_budgets_and_states_what_is_known() -> None:
    latency, *others = target(6.0, budget_mj=9.0, budget_mb=0.5).limits(SPACE, 10)
    found = most_probable_within(
        torch.full(latency.cost.shape, 1 / 3),
        latency.cost,
        budget_ms=latency.budget,
        base_ms=latency.base,
        count=99,
        space=SPACE,
        limits=others,
    )
    assert {blocks for best in found for blocks in best.blocks} == {"k3_e1", "skip"}
    for best in found:
        energy_mj = 3.0 + sum(MJ.get(block, 0.0) for block in best.blocks)
        assert best.provenance["predicted_energy_mj"] == energy_mj <= 9.0
        assert best.provenance["predicted_peak_mb"] == 0.3
        architecture = Architecture(best.blocks, "tiny")
        network = build_network(SPACE, architecture, 10)
        assert best.provenance["params"] == count(network, (1, 8, 8)).params
    assert found[0].provenance["source"] == "most probable within 6 ms and 9 mJ and 0.5 MB"


def test_of_two_budgets_one_may_be_loose() -> None:
    loose, binding = {"budget_ms": 99.0}, {"budget_mj": 9.0}
    check_limits(target(**loose, **binding).limits(SPACE, 10))
    check_limits(target(budget_ms=6.0, budget_mj=99.0).limits(SPACE, 10))
    with pytest.raises(InputError, match="nothing to trade"):
        check_limits(target(**loose).limits(SPACE, 10))
    with pytest.raises(InputError, match="under the fastest network"):
        check_limits(target(budget_ms=0.1, **binding).limits(SPACE, 10))


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ({"budget_mj": 4.9}, r"target_mj=4.9 is too low: .* lowest needs 5 mJ .* highest 15 mJ"),
        ({"budget_mj": math.nan}, "target_mj=nan is not positive"),
        ({"budget_mj": 15.1}, "met by every network"),
        ({"budget_mb": 0.2}, r"target_mb=0.2 is too low: .* lowest needs 0.3 MB .* 0.6 MB"),
        ({"max_params": 10}, r"max_params=10 is too low: .* needs \d+ params .* by count"),
        ({"budget_ms": 9.0, "budget_mb": 0.1}, "target_mb=0.1 is too low"),
    ],
)
def test_budgets_that_no_network_meets_are_refused_with_both_ends(
    budgets: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as refused:
        run(tmp_path / "run", targets=[target(**budgets)])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_budgets_that_no_network_meets_together_are_refused() -> None:
    swapped = {"k3_e1": 4.0, "k3_e3": 2.0}  # what is fast takes energy
    entries = [
        replace(entry, energy_mj=swapped.get(entry.shape.block, entry.energy_mj))
        for entry in table().entries
    ]
    asked = Target(LatencyTable(table().header, entries), 4.0, budget_mj=6.0)
    with pytest.raises(InputError, match=r"No network fits 4 ms, 6 mJ together: .* are 3 ms, 5 mJ"):
        run(targets=[asked])


def test_a_target_needs_a_budget_and_what_the_budget_needs() -> None:
    with pytest.raises(InputError, match="has no budget; expected at least one: target_ms"):
        Target(Table(), None)
    with pytest.raises(InputError, match=r"no column energy_mj; .* device=roofline"):
        run(targets=[Target(table(energy=False), 6.0, budget_mj=9.0)])
    with pytest.raises(InputError, match=r"no column peak_mb; .* profile again with this fbnas"):
        run(targets=[Target(table(peak=False), 6.0, budget_mb=9.0)])
    with pytest.raises(InputError, match="stub knows no energy"):
        run(targets=[Target(Table(), 6.0, "stub", budget_mj=9.0)])


@pytest.mark.parametrize("name", ["fbnet", "fbnet_additive"])
def test_logarithmic_objectives_need_a_budget_of_latency(name: str) -> None:
    with pytest.raises(InputError, match="give target_ms as well, or use objective=target"):
        run(targets=[target(budget_mj=9.0)], objective=build_objective(name))
