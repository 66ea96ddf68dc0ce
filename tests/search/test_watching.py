"""What a person sees of a search under way: its choice every few epochs, and TensorBoard."""

import logging
import re
from pathlib import Path

import pytest
from search_run import SPACE, Table, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fbnas.errors import InputError
from fbnas.files import read_json
from fbnas.latency import LatencyTable
from fbnas.search import (
    ArchitectureDistribution,
    SearchSettings,
    Target,
    best_within,
    choice,
    read_result,
)
from fbnas.space import Architecture, SearchSpace

ROOT = Path(__file__).parents[2]
TWO = [Target(Table(), 5.0, "fast"), Target(Table(2.0), 9.0, "slow", max_params=4000)]
TABLE = "target_0/table/text_summary"
ROW = re.compile(r"epoch +(\d+) would choose for (\w+), predicted ([^\n]+):\n    (.+)")


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, ...]]:
    return [m.groups() for r in caplog.records if (m := ROW.fullmatch(r.getMessage()))]


def test_every_few_epochs_it_says_what_it_would_choose(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fbnas")
    run(tmp_path, targets=TWO, settings={"epochs": 6, "choice_every": 2})
    found = said(caplog)
    # not after epoch 2: theta slept
    assert [row[:2] for row in found] == [(e, n) for e in ("4", "6") for n in ("fast", "slow")]
    for learned, (_, _, cost, blocks) in zip(read_result(tmp_path)[1], found[2:], strict=True):
        best = best_within(learned.distribution, learned.limits, count=1)[0]
        assert blocks == choice.by_stage(best, SPACE)
        latency = learned.limits[0]
        predicted = best.provenance["predicted_latency_ms"]
        assert cost.startswith(f"{predicted:.4g} of {latency.budget:.4g} ms")
        assert predicted <= latency.budget
    assert found[2][2].count("of") == 1
    assert found[3][2].endswith(" of 4000 params")


def test_the_choice_changes_nothing_and_may_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fbnas")
    run(tmp_path / "never", settings={"choice_every": 0})
    assert said(caplog) == []
    run(tmp_path / "always", settings={"choice_every": 1})
    assert len(said(caplog)) == 4  # two epochs of theta, two targets
    never, always = (read_json(tmp_path / x / "theta.json") for x in ("never", "always"))
    assert never == always
    run(tmp_path / "never", settings={"choice_every": 1}, resume=True)  # it is not the recipe's
    with pytest.raises(InputError, match=r"choice_every is -1; expected a whole number"):
        SearchSettings(choice_every=-1)


def test_a_choice_that_takes_too_long_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space = SearchSpace.load("fbnet")
    theta = ArchitectureDistribution(space)
    table = LatencyTable.load(ROOT / "latency_tables" / "epyc_fbnet_onnxruntime_fp32.csv")
    limits = Target(table, 12.0, max_params=5_000_000).limits(space, 1000)
    assert best_within(theta, limits, count=1, at_most_s=0.0) == []
    caplog.set_level(logging.INFO, "fbnas")
    monkeypatch.setattr(choice, "best_within", lambda *_, **__: [])
    run(targets=TWO, settings={"choice_every": 4})
    lines = [r.getMessage() for r in caplog.records if "would choose" in r.getMessage()]
    assert len(lines) == 2
    assert "would choose for fast, nothing was found in 5 s:" in lines[0]


def test_22_layers_are_written_by_stage() -> None:
    space = SearchSpace.load("fbnet")
    blocks = [layer.blocks[0] for layer in space.layers]
    blocks[2:4] = ["skip", "skip"]
    words = choice.by_stage(Architecture(tuple(blocks)), space)
    assert words.startswith("k3_e1 | k3_e1 skip x2 k3_e1 | k3_e1 x4 | ")
    assert len(words.split(" | ")) == 7


def test_tensorboard_shows_scalars_theta_the_table_and_the_choice(tmp_path: Path) -> None:
    run(tmp_path, targets=TWO, settings={"choice_every": 2})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"weights_loss", "tau", "target_0/expected_latency_ms"} <= set(tags["scalars"])
    pictures = [f"target_{i}/{what}" for i in (0, 1) for what in ("table", "theta")]
    assert sorted(tags["images"]) == pictures
    assert [picture.step for picture in events.Images("target_0/theta")] == [0, 1, 2, 3]
    assert events.Images("target_0/table")[0].height == 16 * len(SPACE.layers)
    (table,) = (e.tensor_proto.string_val[0].decode() for e in events.Tensors(TABLE))
    assert table.startswith("fast: 2 ms for stem, head and classifier")
    assert "| 0: 8 -> 8, stride 1, 8x8 | 1 | 3 | 0 |" in table
    assert "| 1: 8 -> 16, stride 2, 8x8 | 1 | 3 |  |" in table  # no skip there
    assert [text.step for text in events.Tensors("target_1/choice/text_summary")] == [3]
