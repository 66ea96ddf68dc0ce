"""fbnas sample beyond the most probable, for real: ranked by shared weights, evolved, halved."""

import itertools
import shlex
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from tiny_run import write_space, write_table

from fbnas.commands import main
from fbnas.files import read_json
from fbnas.search import SharedWeightsJudge, rank_by_shared_weights, read_result, read_supernet
from fbnas.space import Architecture
from fbnas.training import TrainingDiverged, halving, train
from fbnas.training.data import load_data

HERE = Path(__file__).parent
DATA = ["data=digits", "data.limit=320"]
SHARED = [*DATA, "rank=shared_weights"]
HALVING = [*DATA, "halving=true", "halving_epochs=1", "count=4", "training.batch_size=64"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with s, a search for 8 ms in the tiny space."""
    root = tmp_path_factory.mktemp("sample")
    space, table = write_space(root), write_table(root / "table.csv")
    given = [f"space={space}", f"table={table}", "target_ms=8", *DATA, "search.epochs=4"]
    assert main(["search", *given, f"out={root / 's'}"]) == 0
    return root


@pytest.fixture(autouse=True)
def place(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(searched / "s", tmp_path / "s")
    monkeypatch.chdir(tmp_path)


def written(folder: str) -> list[dict[str, Any]]:
    files = sorted((Path(folder) / "architectures").glob("[0-9]*.yaml"))
    return [yaml.safe_load(file.read_text()) for file in files]


def in_band() -> list[Architecture]:
    """Every network from 90 % of the budget to the budget, by brute force."""
    space, learned, _ = read_result(Path("s"))
    limit = learned[0].limits[0]
    every = itertools.product(*(x.nonzero().flatten().tolist() for x in space.offered))
    return [Architecture.from_path(space, list(p)) for p in every if 7.2 <= limit.of(p) <= 8]


def test_the_best_of_all_candidates_by_the_shared_weights() -> None:
    assert main(["sample", "run=s", *SHARED, "count=3", "candidates_from=random", "out=a"]) == 0
    space, _, classes = read_result(Path("s"))
    data = load_data(limit=320, resolution=8)
    best = rank_by_shared_weights(read_supernet(Path("s"), space, classes), in_band(), data)
    found = written("a")
    assert [tuple(x["blocks"]) for x in found] == [r.architecture.blocks for r in best[:3]]
    for row, r in zip(found, best, strict=False):
        assert row["shared_weights_cross_entropy"] == pytest.approx(r.cross_entropy, abs=1e-4)
        assert row["shared_weights_accuracy"] == pytest.approx(r.accuracy, abs=1e-4)
        assert row["source"] == "random within the budgets"
    assert main(["sample", "run=s", *SHARED, "count=3", "candidates_from=evolution", "out=b"]) == 0
    assert [x["blocks"] for x in written("b")] == [x["blocks"] for x in found]
    assert read_json(Path("b/result.json"))["architecture"] == found[0]["blocks"]


def test_candidates_of_theta_are_the_most_probable_and_draws() -> None:
    assert main(["sample", "run=s", "count=3", "out=likely"]) == 0
    given = ["run=s", *SHARED, "candidates=9"]
    assert main(["sample", *given, "count=9", "out=a"]) == 0
    found = written("a")
    assert len(found) == 9
    ranks = [(-x["shared_weights_accuracy"], x["shared_weights_cross_entropy"]) for x in found]
    assert ranks == sorted(ranks)
    assert all(x["predicted_latency_ms"] <= 8 for x in found)
    assert main(["sample", *given, "count=3", "out=b"]) == 0
    sources = [x["source"] for x in written("b")]
    assert set(sources) <= {"most probable within 8 ms", "sampled from P_theta"}
    assert main(["sample", *given, "count=3", "out=c"]) == 0  # the same seed, the same networks
    assert written("c") == written("b")
    assert main(["sample", *given, "count=3", "candidates=3", "out=d"]) == 0
    likely = {tuple(x["blocks"]) for x in written("likely")}
    assert {tuple(x["blocks"]) for x in written("d")} == likely


def test_the_ranking_runs_on_the_device_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    judge = SharedWeightsJudge.__init__

    def note(self: Any, *arguments: Any, device: Any, **options: Any) -> None:
        used.append(device)
        judge(self, *arguments, device=device, **options)

    monkeypatch.setattr(SharedWeightsJudge, "__init__", note)
    ranking = ["sample", "run=s", *SHARED, "count=3", "candidates=3", "training.device=cpu"]
    assert main([*ranking, "out=a"]) == 0
    assert used == [torch.device("cpu")] * 2  # the screening and the final ranking


def test_halving_keeps_the_best_by_validation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "run=s", *HALVING]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rung")]
    assert [line[:21] for line in lines] == ["rung 1/2, 1 epochs, c"] * 4 + [
        "rung 2/2, 2 epochs, c"
    ] * 2
    found = written("s/halving")
    assert [x["halving_rungs"] for x in found] == [2, 2, 1, 1]
    assert [x["halving_epochs"] for x in found] == [2, 2, 1, 1]
    assert {x["halving_init"] for x in found} == {"scratch"}
    for better, worse in ((0, 1), (2, 3)):
        ranks = [
            (-found[i]["validation_accuracy"], found[i]["validation_cross_entropy"])
            for i in (better, worse)
        ]
        assert ranks[0] <= ranks[1]
    record = read_json(Path("s/halving/halving.json"))
    assert [x["architecture"] for x in record["candidates"]] == [x["blocks"] for x in found]
    assert [len(x["trials"]) for x in record["candidates"]] == [2, 2, 1, 1]
    assert sorted(x["candidate"] for x in record["candidates"]) == [1, 2, 3, 4]
    result = read_json(Path("s/halving/result.json"))
    assert result["architecture"] == found[0]["blocks"]
    assert result["validation_accuracy"] == found[0]["validation_accuracy"]
    assert main(["sample", "run=s", *HALVING]) == 2
    assert "resume=true to continue it" in capsys.readouterr().err
    train = ["train", "architecture=s/halving/architectures/01.yaml", *DATA, "training.epochs=1"]
    assert main([*train, "out=t"]) == 0


def test_a_candidate_that_diverges_loses_its_rung_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def diverge_first(*given: Any, out: Path, **options: Any) -> Any:
        if out.name == "02":
            raise TrainingDiverged("The loss is not a finite number in epoch 1.")
        return train(*given, out=out, **options)

    with monkeypatch.context() as patch:
        patch.setattr(halving, "train", diverge_first)
        assert main(["sample", "run=s", *HALVING]) == 0
    shown = capsys.readouterr().out
    assert "rung 1/2, 1 epochs, candidate 02: diverged, the last of its rung\n" in shown
    assert "diverged, so it is the last of rung 1" in caplog.text
    last = read_json(Path("s/halving/halving.json"))["candidates"][-1]
    assert (last["candidate"], len(last["trials"])) == (2, 1)
    assert last["trials"][0]["diverged"] is True
    assert last["trials"][0]["validation_accuracy"] is None
    found = written("s/halving")
    assert [x.get("halving_diverged", False) for x in found] == [False, False, False, True]
    assert "validation_accuracy" not in found[-1]
    assert main(["sample", "run=s", *HALVING, "resume=true"]) == 0
    assert written("s/halving") == found


def test_halving_is_interrupted_and_resumed_to_the_same_result() -> None:
    ranked = ["sample", "run=s", *HALVING, "rank=shared_weights", "init=supernet"]
    assert main([*ranked, "out=whole"]) == 0
    stopped = forked.run(HERE / "struck_run.py", "SIGINT@7", *ranked, "out=struck", cwd=Path.cwd())
    assert not Path("struck/halving.json").exists()
    assert stopped.returncode == 130
    line = stopped.stderr.splitlines()[-1]
    assert line.startswith("fbnas: interrupted. Continue with: fbnas sample ")
    assert main(shlex.split(line.partition("Continue with: fbnas ")[2])) == 0
    assert written("struck") == written("whole")
    assert written("whole")[0]["halving_init"] == "supernet"
    assert read_json(Path("struck/halving.json")) == read_json(Path("whole/halving.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("rank=shared_weight", "Unknown rank 'shared_weight'. Did you mean 'shared_weights'?"),
        ("candidates_from=evolutoin", "Did you mean 'evolution'?"),
        ("init=scrach", "Did you mean 'scratch'?"),
        ("halvin=true", "Did you mean 'halving'?"),
        ("count=0", "count=0; expected a whole number from 1"),
        ("candidates=0", "candidates=0; expected a whole number from 1"),
        ("candidates=many", "candidates='many'; expected a whole number"),
        ("rank=shared_weights candidates=4", "candidates=4 for count=5; expected at least as many"),
        ("halving=true halving_epochs=0", "halving_epochs=0; expected a whole number from 1"),
        ("halving=true count=1", "halving=true of count=1; expected at least 2 candidates"),
        ("halving=true training.lr=0", "lr is 0; expected more than 0"),
        ("halving=true resume=true", "holds nothing to resume"),
        ("rank=shared_weights data=image_folder data.path=nowhere", "nowhere: no such folder"),
        ("rank=shared_weights training.device=nowhere", "device nowhere cannot be used"),
    ],
)
def test_bad_input(options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "run=s", *options.split()]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
    assert not Path("s/halving").exists()
    assert not Path("s/architectures").exists()
