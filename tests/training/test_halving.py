"""Successive halving: who stays is decided by validation, and a kill costs no finished epoch."""

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from halving_run import CANDIDATES, SETTINGS, STEPS, build, run, small_digits
from torch import nn

from fbnas.errors import InputError
from fbnas.space import Architecture
from fbnas.training import (
    Halved,
    TrainingDiverged,
    TrainingResult,
    Trial,
    halve,
    halving,
    planned,
    train,
)

SCRIPT = Path(__file__).with_name("halving_run.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Halved]]:
    """A halving that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "halved"
    return out, run(out)


def hit(out: Path, when: str) -> int:
    return forked.run(SCRIPT, out, when).returncode


def test_four_are_halved_to_one_by_validation(whole: tuple[Path, list[Halved]]) -> None:
    found = whole[1]
    assert {x.architecture for x in found} == set(CANDIDATES)
    assert [len(x.trials) for x in found] == [2, 2, 1, 1]
    for place in (0, 2):
        assert found[place].trials[-1].rank <= found[place + 1].trials[-1].rank
    assert max(x.trials[0].rank for x in found[:2]) <= min(x.trials[0].rank for x in found[2:])
    for each in found:
        assert [trial.rung for trial in each.trials] == list(range(1, len(each.trials) + 1))
        assert [trial.epochs for trial in each.trials] == [1, 2][: len(each.trials)]
        assert all(CANDIDATES[trial.candidate - 1] == each.architecture for trial in each.trials)
    assert (
        found[0].trials[-1].validation_cross_entropy < found[0].trials[0].validation_cross_entropy
    )


def test_a_rung_is_a_training_from_the_weights_of_the_one_before(
    whole: tuple[Path, list[Halved]], tmp_path: Path
) -> None:
    best = whole[1][0]
    torch.manual_seed(0)
    network = build(best.architecture)
    for rung, trial in enumerate(best.trials):
        settings = replace(SETTINGS, epochs=1)
        result = train(network, small_digits(), settings=settings, seed=rung)
        assert result.validation_accuracy == trial.validation_accuracy
        loss = result.history[result.best_epoch]["validation_loss"]
        assert loss == trial.validation_cross_entropy


def test_killed_and_interrupted_it_ends_at_the_same_numbers(
    whole: tuple[Path, list[Halved]], tmp_path: Path
) -> None:
    out = tmp_path / "halved"
    assert hit(out, f"SIGKILL@{STEPS + 2}") == -signal.SIGKILL  # the second of rung 1
    done = out / "rung_1" / "01" / "trial.json"
    written = done.stat().st_mtime_ns
    assert hit(out, f"SIGTERM@{3 * STEPS + 2}") != 0  # the first of rung 2
    assert list((out / "rung_2").glob("*/checkpoint.pt"))
    seen: list[Trial] = []
    found = run(out, on_trial=lambda trial, rungs: seen.append(trial))
    assert found == whole[1]
    assert len(seen) == 6
    assert done.stat().st_mtime_ns == written
    for file in whole[0].rglob("weights.safetensors"):
        assert (out / file.relative_to(whole[0])).read_bytes() == file.read_bytes()
    assert not list(out.rglob("checkpoint.pt"))


def test_another_halving_is_not_continued(whole: tuple[Path, list[Halved]]) -> None:
    assert planned(whole[0]) == CANDIDATES
    assert [a.provenance for a in planned(whole[0]) or []] == [a.provenance for a in CANDIDATES]
    assert planned(whole[0] / "rung_1") is None
    for options, name in (
        ({"epochs": 2}, "epochs"),
        ({"seed": 1}, "seed"),
        ({"settings": replace(SETTINGS, lr=0.05)}, "training"),
    ):
        with pytest.raises(InputError, match=f"of another halving: its {name} differ"):
            run(whole[0], **options)


def fake_training(
    accuracies: dict[str, list[float | None]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, int, float]]:
    """Training that ends as told, None: it diverges; returns (who, epochs, first weight at the
    start) of each."""
    calls: list[tuple[str, int, float]] = []

    def fake(network: Any, *_: Any, settings: Any, out: Path, **__: Any) -> TrainingResult:
        weight = network.weight.data
        calls.append((network.name, settings.epochs, float(weight[0, 0])))
        weight += settings.epochs
        out.mkdir(parents=True)
        (out / "checkpoint.pt").touch()
        accuracy = accuracies[network.name].pop(0)
        if accuracy is None:
            raise TrainingDiverged("The loss is not a finite number in epoch 1.")
        row = {"validation_accuracy": accuracy, "validation_loss": 1 - accuracy}
        return TrainingResult(network, 0, accuracy, [row], 0.0)

    monkeypatch.setattr(halving, "train", fake)
    return calls


class Named(nn.Linear):
    def __init__(self, name: str) -> None:
        super().__init__(1, 1)
        nn.init.zeros_(self.weight)
        self.name = name


def named(names: str) -> list[Architecture]:
    return [Architecture((name,)) for name in names]


def order(found: Sequence[Halved]) -> str:
    return "".join(each.architecture.blocks[0] for each in found)


def test_half_is_kept_and_each_goes_on_from_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {"a": [0.1], "b": [0.9, 0.5], "c": [0.2], "d": [0.6, 0.7, 0.8], "e": [0.5]}
    ends |= {"f": [0.7, 0.8, 0.7], "g": [0.8, 0.6], "h": [0.3]}
    calls = fake_training(ends, monkeypatch)
    found = halve(
        named("abcdefgh"),
        lambda a: Named(a.blocks[0]),
        small_digits(),
        epochs=3,
        out=tmp_path / "halved",
    )
    assert order(found) == "dfgbehca"
    assert [each.trials[-1].epochs for each in found] == [12, 12, 6, 6, 3, 3, 3, 3]
    assert calls[:8] == [(name, 3, 0.0) for name in "abcdefgh"]
    assert sorted(calls[8:12]) == [(name, 3, 3.0) for name in "bdfg"]
    assert sorted(calls[12:]) == [("d", 6, 6.0), ("f", 6, 6.0)]
    assert not any(ends.values())


@pytest.mark.parametrize(("number", "rungs"), [(1, 0), (2, 1), (3, 1), (5, 2), (7, 2), (9, 3)])
def test_any_number_ends_at_one(
    number: int, rungs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "abcdefghi"[:number]
    calls = fake_training({name: [0.5 + ord(name) / 1e3] * 4 for name in names}, monkeypatch)
    seen: list[int] = []
    found = halve(
        named(names),
        lambda a: Named(a.blocks[0]),
        small_digits(),
        out=tmp_path / "halved",
        on_trial=lambda trial, rungs: seen.append(rungs),
    )
    assert order(found) == ("".join(sorted(names, reverse=True)) if rungs else names)
    assert len(found[0].trials) == rungs
    assert set(seen) == ({rungs} if rungs else set())
    assert len(calls) == sum(number // 2**rung for rung in range(rungs))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"a": [0.4, 0.6], "b": [None], "c": [0.3, 0.7], "d": [0.2]}, "c2 a2 d1 b1"),
        ({"a": [0.9, None], "b": [0.4], "c": [0.3], "d": [0.5, 0.1]}, "d2 a2 b1 c1"),
        ({"a": [None], "b": [None], "c": [0.1], "d": [None]}, "c1 a1 b1 d1"),
    ],
    ids=["in rung 1", "in rung 2", "all but one"],
)
def test_who_diverges_is_the_last_of_its_rung(
    ends: dict[str, list[float | None]],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = [name for name, accuracies in ends.items() if None in accuracies]
    fake_training(ends, monkeypatch)

    def again(resume: bool) -> list[Halved]:
        return halve(
            named("abcd"),
            lambda a: Named(a.blocks[0]),
            small_digits(),
            out=tmp_path / "halved",
            resume=resume,
        )

    found = again(resume=False)
    names = [each.architecture.blocks[0] for each in found]
    rungs = [len(each.trials) for each in found]
    assert " ".join(f"{n}{r}" for n, r in zip(names, rungs, strict=True)) == expected
    diverged = [x.architecture.blocks[0] for x in found if x.trials[-1].diverged]
    assert sorted(diverged) == lost
    for name in lost:
        assert f"Candidate {1 + 'abcd'.index(name):02d} ({name}) diverged, so it" in caplog.text
    assert not list(tmp_path.rglob("checkpoint.pt"))
    assert again(resume=True) == found  # nothing is trained again: no end is left to tell


def test_an_error_only_where_all_diverge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_training({"a": [None], "b": [None]}, monkeypatch)
    for resume in (False, True):
        with pytest.raises(TrainingDiverged, match="All 2 candidates of rung 1 diverged.* lower"):
            halve(
                named("ab"),
                lambda a: Named(a.blocks[0]),
                small_digits(),
                out=tmp_path / "halved",
                resume=resume,
            )


def test_starting_anew_forgets_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for accuracies in ({"a": [0.9], "b": [0.1]}, {"a": [0.1], "b": [0.9]}):
        expected = max(accuracies, key=lambda name: accuracies[name][0])
        fake_training(accuracies, monkeypatch)
        found = halve(
            named("ab"), lambda a: Named(a.blocks[0]), small_digits(), out=tmp_path / "halved"
        )
        assert found[0].architecture.blocks == (expected,)


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    for candidates, epochs in (([], 1), (CANDIDATES, 0)):
        with pytest.raises(InputError, match="expected at least 1 of each"):
            halve(candidates, build, small_digits(), epochs=epochs, out=tmp_path / "halved")
    assert not (tmp_path / "halved").exists()
