"""What the alternating loop promises: who learns from what, when, and what it refuses."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from search_run import BLOCKS, SPACE, Table, run, small_digits
from torch import Tensor

from fbnas.errors import InputError
from fbnas.files import load_checkpoint, read_jsonl
from fbnas.search import (
    ArchitectureDistribution,
    SearchResult,
    SearchSettings,
    Supernet,
    Target,
    build_objective,
    loop,
    read_result,
    read_supernet,
)
from fbnas.space import SearchSpace
from fbnas.training.state import TrainingDiverged

NO_MID_EPOCH = {"checkpoint_every_s": 300.0}


def numbers(result: SearchResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in result.history]


def parameters(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def all_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_seed_decides_every_number() -> None:
    first, again, other = run(seed=3), run(seed=3), run(seed=4)
    assert numbers(first) == numbers(again)
    assert all_equal(first.supernet.state_dict(), again.supernet.state_dict())
    assert numbers(first)[0]["weights_loss"] != numbers(other)[0]["weights_loss"]
    assert not torch.equal(first.distributions[0].logits, other.distributions[0].logits)


def test_warmup_leaves_theta_and_draws_every_block_equally(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths: list[list[int]] = []
    forward = Supernet.forward

    def note_path(self: Supernet, images: Tensor, gates: Any, *rest: Any) -> Tensor:
        if isinstance(gates, list):
            paths.append(gates)
        return forward(self, images, gates, *rest)

    monkeypatch.setattr(Supernet, "forward", note_path)
    settings = {"epochs": 16, "warmup_epochs": 15, "batch_size": 8, "augment": {}, **NO_MID_EPOCH}
    result = run(settings=settings, targets=[Target(Table(), 5.0)])
    steps = 15 * 16
    for row in result.history[:15]:
        assert row["phase"] == "warmup"
        assert row["theta_loss"] is None
        logits = [x for line in row["targets"][0]["logits"] for x in line if x is not None]
        assert set(logits) == {0.0}
    assert result.history[15]["phase"] == "search"
    assert bool((result.distributions[0].logits != 0).any())
    assert len({tuple(path) for path in paths[:steps]}) == 3 * 2 * 3  # every network was drawn
    for layer in SPACE.layers:
        share = 1 / len(layer.blocks)
        spread = math.sqrt(share * (1 - share) / steps)
        drawn = Counter(BLOCKS[path[layer.index]] for path in paths[:steps])
        assert set(drawn) == set(layer.blocks)
        for block in layer.blocks:
            assert abs(drawn[block] / steps - share) < 4 * spread, (layer.index, block)


def test_fbnet_tau_at_90_epochs_and_its_end_at_any_number() -> None:
    settings = SearchSettings(epochs=90, tau=5.0, tau_final=None)
    for epoch in range(90):
        assert settings.tau_at(epoch) == pytest.approx(5.0 * math.exp(-0.045) ** epoch)
    for epochs in (2, 7, 30, 200):
        shorter = SearchSettings(epochs=epochs, tau=5.0, tau_final=None)
        assert shorter.tau_at(0) == 5.0
        assert shorter.tau_at(epochs - 1) == pytest.approx(settings.tau_at(89))
    geometric = SearchSettings(epochs=5, tau=4.0, tau_final=0.25)
    assert [geometric.tau_at(e) for e in range(5)] == pytest.approx([4, 2, 1, 0.5, 0.25])


def test_a_schedule_of_points_takes_the_place_of_the_constants() -> None:
    settings = SearchSettings(
        epochs=11,
        schedule={
            "tau": [[0, 4.0], [1, 0.25]],
            "theta_lr": [[0, 0], [0.5, 0], [0.8, 0.3]],
            "weights_lr": [[0, 0.2], [1, 0.0]],
        },
    )
    assert settings.warmup == 6
    rates = [settings.theta_lr_at(epoch) for epoch in (0, 5, 6, 7, 8, 10)]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.3])
    assert [settings.tau_at(e) for e in (0, 5, 10)] == pytest.approx([4, 1, 0.25])
    assert [settings.weights_lr_at(step, 8) for step in (0, 4)] == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize("points", [[[0, 0]], [[0, 0], [0.5, 0.1], [1, 0]]])
def test_a_schedule_by_which_theta_sleeps_at_the_end_is_refused(points: list[list[float]]) -> None:
    with pytest.raises(InputError, match="expected 0 at its beginning only"):
        SearchSettings(epochs=10, schedule={"theta_lr": points})


@pytest.mark.parametrize("epochs", [3, 6])
def test_schedules_in_use_follow_the_epochs(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    temperatures: list[float] = []
    step, gates = torch.optim.SGD.step, ArchitectureDistribution.gates

    def note_rate(self: torch.optim.SGD, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    def note_tau(self: ArchitectureDistribution, tau: float, **options: Any) -> Tensor:
        temperatures.append(tau)
        return gates(self, tau, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", note_rate)
    monkeypatch.setattr(ArchitectureDistribution, "gates", note_tau)
    settings = {"epochs": epochs, "warmup_epochs": 0, "tau": 5.0, "tau_final": None}
    result = run(settings={**settings, "weights_lr": 0.2, "augment": {}, **NO_MID_EPOCH})
    total = epochs * 4
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * i / total)) for i in range(total)])
    assert [row["lr"] for row in result.history] == rates[::4]
    assert temperatures == [row["tau"] for row in result.history for _ in range(2)]  # 2 targets
    assert temperatures[-1] == pytest.approx(5.0 * math.exp(-0.045 * 89))


def test_theta_s_rate_is_as_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step

    def note_rate(self: torch.optim.Adam, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", note_rate)
    schedule = {"theta_lr": [[0, 0], [0.5, 0], [1, 0.4]]}
    result = run(settings={"epochs": 5, "schedule": schedule, "augment": {}, **NO_MID_EPOCH})
    assert rates == pytest.approx([0.2] * (len(rates) // 2) + [0.4] * (len(rates) // 2))
    assert [row["phase"] for row in result.history] == ["warmup"] * 3 + ["search"] * 2
    assert [row["theta_lr"] for row in result.history] == pytest.approx([0, 0, 0, 0.2, 0.4])


def test_the_objective_does_not_reach_the_weights() -> None:
    settings = {"weights_on": "uniform", **NO_MID_EPOCH}
    results = [
        run(settings=settings, objective=build_objective("absolute", weight=weight))
        for weight in (0.0, 50.0)
    ]
    logits = [result.distributions[0].logits for result in results]
    assert not torch.equal(*logits)
    assert all_equal(*(parameters(result.supernet) for result in results))


def test_theta_s_pass_moves_no_weight_but_bn_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    train_theta = loop.Loop.train_theta
    passes = []

    def watched(self: Any, *args: Any) -> None:
        weights, momenta = parameters(self.supernet), self.weights_optimiser.state_dict()
        means = self.supernet.state_dict()["head.1.running_mean"].clone()
        buffers = [s["momentum_buffer"].clone() for s in momenta["state"].values()]
        train_theta(self, *args)
        assert all_equal(weights, parameters(self.supernet))
        after = self.weights_optimiser.state_dict()["state"].values()
        for buffer, state in zip(buffers, after, strict=True):
            assert torch.equal(buffer, state["momentum_buffer"])
        assert not torch.equal(means, self.supernet.state_dict()["head.1.running_mean"])
        passes.append(1)

    monkeypatch.setattr(loop.Loop, "train_theta", watched)
    run(settings=NO_MID_EPOCH)
    assert len(passes) == 2


def test_each_target_s_theta_approaches_its_own_budget() -> None:
    budgets = [4.5, 7.0, 9.5]  # the fastest network takes 3 ms, the slowest 11
    settings = {
        "epochs": 8,
        "warmup_epochs": 2,
        "batch_size": 16,
        "theta_passes": 12,
        "augment": {},
        **NO_MID_EPOCH,
    }
    result = run(settings=settings, targets=[Target(Table(), budget) for budget in budgets])
    for theta, budget in zip(result.distributions, budgets, strict=True):
        latency_ms, base_ms = Table().tensor(SPACE)
        expected_ms = float(theta.expected(latency_ms, base=base_ms).detach())
        assert expected_ms == pytest.approx(budget, rel=0.1)
    last = result.history[-1]["targets"]
    assert [row["budget_ms"] for row in last] == budgets


@pytest.mark.parametrize("budget_ms", [2.9, 11.1, 0.0, -1.0, math.nan])
def test_an_impossible_budget_is_refused_before_any_training(
    budget_ms: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Supernet, "forward", lambda *_: pytest.fail("something was trained"))
    with pytest.raises(InputError, match=r"3 ms .* 11 ms") as refused:
        run(tmp_path / "run", targets=[Target(Table(), 5.0), Target(Table(), budget_ms)])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def spoil_weights(monkeypatch: pytest.MonkeyPatch, *, from_step: int) -> None:
    set_lr = loop.Loop.set_weights_lr

    def set_huge(self: Any, step: int, total: int) -> None:
        set_lr(self, step, total)
        if step >= from_step:
            self.weights_optimiser.param_groups[0]["lr"] = math.inf

    monkeypatch.setattr(loop.Loop, "set_weights_lr", set_huge)


@pytest.mark.parametrize("from_step", [4, 7])  # the first of epoch 2; its last, whose loss is fine
def test_nan_stops_the_search_and_keeps_the_last_good_checkpoint(
    from_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil_weights(patch, from_step=from_step)
        with pytest.raises(TrainingDiverged, match="epoch 2") as stopped:
            run(tmp_path, settings=NO_MID_EPOCH)
    assert str(tmp_path / "checkpoint.pt") in str(stopped.value)
    assert "\n" not in str(stopped.value)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["position"] == [1, "weights", 0]
    assert all(bool(value.isfinite().all()) for value in state["supernet"].values())
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
    assert numbers(run(tmp_path, resume=True)) == numbers(run())


def test_nan_in_mid_epoch_keeps_the_checkpoint_of_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_weights(monkeypatch, from_step=2)
    with pytest.raises(TrainingDiverged, match="epoch 1"):
        run(tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["position"] == [0, "weights", 2]


def test_nan_in_the_first_epoch_promises_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="epoch 1") as stopped:
        run(tmp_path, settings={"weights_lr": 1e38, **NO_MID_EPOCH})
    assert "kept" not in str(stopped.value)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_theta_that_is_no_number_stops_the_search(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="theta .* in epoch 3"):
        run(tmp_path, settings={"theta_lr": math.inf, **NO_MID_EPOCH})
    assert load_checkpoint(tmp_path / "checkpoint.pt")["position"] == [2, "weights", 0]


def test_only_the_weights_images_are_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def note(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return images

    monkeypatch.setattr(loop, "build_augmentation", lambda **_: note)
    data = small_digits()
    run(data=data, settings=NO_MID_EPOCH)
    weights_images, theta_images = loop.split_for_search(data.train, fraction=0.8, seed=0)

    def pictures(pixels: Tensor) -> set[bytes]:
        return {image.contiguous().numpy().tobytes() for image in pixels}

    def all_of(images: Any) -> set[bytes]:
        return pictures(images.batch(torch.arange(len(images))))

    shown = pictures((torch.cat(seen) * 255).round().to(torch.uint8))
    assert len(seen) == 4 * 4
    assert shown == all_of(weights_images)
    assert not shown & (all_of(theta_images) | all_of(data.validation))


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    result = run(tmp_path)
    space, learned, classes = read_result(tmp_path)
    assert (space, classes) == (SPACE, 10)
    assert SearchSpace.load(tmp_path / "space.yaml") == SPACE
    for found, target, theta in zip(learned, result.targets, result.distributions, strict=True):
        latency_ms, base_ms = target.table.tensor(SPACE)
        assert torch.equal(found.distribution.logits, theta.logits)
        assert torch.equal(found.distribution.probabilities(), theta.probabilities())
        assert torch.equal(found.latency_ms.isnan(), ~SPACE.offered)
        assert torch.equal(found.latency_ms.nan_to_num(-1), latency_ms.nan_to_num(-1))
        assert (found.base_ms, found.budget_ms) == (base_ms, target.budget_ms)
        assert found.table == target.name
    supernet = read_supernet(tmp_path, space, classes)
    assert all_equal(supernet.state_dict(), result.supernet.state_dict())


def test_a_theta_that_skips_too_early_is_said_once_with_the_remedy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"epochs": 8, "warmup_epochs": 1, "theta_lr": 0.5, "augment": {}, **NO_MID_EPOCH}
    settings |= {"batch_size": 16, "theta_passes": 4}
    with caplog.at_level("WARNING"):
        result = run(settings=settings, targets=[Target(Table(), 3.5, "tight")])
    assert result.distributions[0].skipped_layers() == (2, 2)
    lines = [r.getMessage() for r in caplog.records if "can skip" in r.getMessage()]
    assert len(lines) == 1
    assert "tight: 2 of the 2 layers that can skip do" in lines[0]
    assert "raise search.warmup_fraction" in lines[0]
    row = result.history[-1]["targets"][0]
    assert len(row["skips_per_stage"]) == len(row["entropy_per_stage"]) == 2
    assert sum(row["skips_per_stage"]) == pytest.approx(row["skips"])


def test_a_long_search_keeps_no_more_than_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    save = loop.Loop.save

    def note_size(self: Any) -> None:
        save(self)
        rows = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
        sizes.append(((tmp_path / "checkpoint.pt").stat().st_size, len(rows[-1])))
        assert self.history == []

    monkeypatch.setattr(loop.Loop, "save", note_size)
    settings = {"epochs": 200, "warmup_epochs": 1, "batch_size": 16, "augment": {}}
    run(tmp_path, data=small_digits(60), settings={**settings, **NO_MID_EPOCH})
    checkpoints, rows = zip(*sizes[2:], strict=True)
    assert max(checkpoints) <= 1.01 * checkpoints[0]
    assert max(rows) <= 1.1 * rows[0]


def test_a_resumed_search_misses_rows_that_were_taken_away(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds 0 rows and the checkpoint 4 epochs"):
        run(tmp_path, resume=True)
