"""The whole chain for real, small: numbers recomputed, runs killed and resumed, stages rejected."""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import forked
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from tiny_run import SMALL, write_space, write_table

from fbnas import __version__
from fbnas.commands import main
from fbnas.commands.composition import compose_single
from fbnas.commands.folder import OutFolder
from fbnas.commands.run import Chain, measured_table
from fbnas.commands.stages import Judge, Stage, final_measurement
from fbnas.export import read_metadata
from fbnas.latency import calibration
from fbnas.latency.agreement import agreement
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.runtimes import runtime as runtime_file
from fbnas.latency.table import LatencyTable
from fbnas.latency.timing import Timing
from fbnas.space import SearchSpace
from fbnas.training.data import Data, load_data

HERE = Path(__file__).parent
FBNAS = [sys.executable, "-c", "import sys; from fbnas.commands import main; sys.exit(main())"]


@dataclass(frozen=True)
class Run:
    """A finished run: where it stands, what it said, its result."""

    root: Path
    code: int
    out: str
    result: dict[str, Any]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`fbnas run` as a user starts it: everything measured, in a process of its own."""
    root = tmp_path_factory.mktemp("chain")
    write_space(root)
    small = ["search.epochs=3", "training.epochs=2", "compression.fine_tuning.epochs=1"]
    more = ["networks=3", "candidates=2", "space=tiny.yaml", "data=digits", "out=r"]
    more += ["compression.methods=[channel_pruning,int8]"]  # so small a network gets no faster
    done = subprocess.run(
        [*FBNAS, "run", *small, *more], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, 3), done.stderr
    return Run(root, done.returncode, done.stdout, read(root / "r" / "result.json"))


@pytest.fixture
def stand(ran: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.chdir(ran.root)
    yield ran


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(source="digits", resolution=8)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def run_arguments(out: Path) -> list[str]:
    """A run whose search depends on no clock: its table is made by formula."""
    root = out.parent
    table = root / "table.csv"
    if not table.is_file():
        write_table(table)
    space = f"space={write_space(root)}"
    return ["run", space, f"table={table}", "target_ms=8", "networks=0", "candidates=2",
            *SMALL, f"out={out}"]  # fmt: skip


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("steady") / "r"
    assert main(run_arguments(out)) == 0
    return out


def test_the_result_has_the_fields_of_the_contract(ran: Run) -> None:
    result = ran.result
    assert result["command"] == "run"
    assert result["seed"] == 0
    assert result["seconds"] > 0
    for fields in (result, *result["stages"]):
        assert 0 <= fields["accuracy_top1"] <= 1
        latency = fields["latency_ms"]
        assert 0 < latency["low"] <= latency["value"] <= latency["high"]
        assert latency["samples"] >= 2
        assert fields["params"] > 0
        assert fields["macs"] > 0
        assert fields["model_bytes"] > 0
    assert [stage["name"] for stage in result["stages"]] == ["fp32", "pruned", "int8"]
    for stage in result["stages"]:
        assert stage["model_bytes"] == (ran.root / "r" / stage["file"]).stat().st_size
        assert stage["reason"]
    assert yaml.safe_load((ran.root / "r" / "config.yaml").read_text())["search"]["epochs"] == 3
    assert "<html" in (ran.root / "r" / "report.html").read_text()


def test_the_exit_code_and_the_last_line_follow_from_the_numbers(ran: Run) -> None:
    result = ran.result
    tolerance = max(0.05, 2 * result["noise_floor"])
    missed = result["latency_ms"]["value"] > result["target_ms"] * (1 + tolerance)
    assert ran.code == (3 if missed else 0)
    last = ran.out.splitlines()[-1]
    assert f"asked {result['target_ms']:.4g} ms" in last
    assert f"predicted {result['predicted_latency_ms']:.4g} ms" in last
    assert f"measured {result['latency_ms']['value']:.4g} ms" in last
    assert last.endswith("over budget" if missed else "within budget")


def test_the_final_file_is_that_of_the_last_accepted_stage(ran: Run) -> None:
    final = [stage for stage in ran.result["stages"] if stage["accepted"]][-1]
    assert ran.result["final_stage"] == final["name"]
    for key in ("accuracy_top1", "latency_ms", "params", "macs", "model_bytes"):
        assert ran.result[key] == final[key]
    model = (ran.root / "r" / "model.onnx").read_bytes()
    assert model == (ran.root / "r" / final["file"]).read_bytes()


def accuracy(path: Path, digits: Data) -> float:
    """Top-1 on the test digits from the file and its metadata alone: onnxruntime and numpy."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    stated = session.get_modelmeta().custom_metadata_map
    preparation = json.loads(stated["fbnas.preprocessing"])
    images = digits.test.batch(torch.arange(len(digits.test))).numpy().astype(np.float32) / 255
    assert images.shape[1:] == (preparation["channels"], *2 * (preparation["resolution"],))
    mean, std = (
        np.array(preparation[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std")
    )
    (scores,) = session.run(["scores"], {"images": (images - mean) / std})
    assert scores.shape[1] == len(json.loads(stated["fbnas.class_names"]))
    return float((scores.argmax(1) == digits.test.labels.numpy()).mean())


def test_every_model_file_classifies_as_well_as_stated(ran: Run, digits: Data) -> None:
    for stage in ran.result["stages"]:
        found = accuracy(ran.root / "r" / stage["file"], digits)
        assert found == pytest.approx(stage["accuracy_top1"], abs=2.1 / len(digits.test))


def test_sample_gives_the_most_probable_within_the_budget(stand: Run, tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert main(["sample", "run=r", "count=3", "random=2", f"out={out}"]) == 0
    theta = read(Path("r/search/theta.json"))
    target = theta["targets"][0]
    logits = np.array(target["logits"], float)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cost = np.array(target["latency_ms"], float)
    layers = range(len(cost))
    ranked = []
    for path in np.ndindex(*[cost.shape[1]] * len(cost)):
        ms = target["base_ms"] + sum(cost[i, j] for i, j in zip(layers, path, strict=True))
        if ms <= target["budget_ms"]:
            log = sum(np.log(probability[i, j]) for i, j in zip(layers, path, strict=True))
            ranked.append((log, ms))
    ranked.sort(reverse=True)
    for number, (log, ms) in enumerate(ranked[:3], start=1):
        found = yaml.safe_load((out / "architectures" / f"{number:02d}.yaml").read_text())
        assert found["log_probability"] == pytest.approx(log, abs=1e-4)
        assert found["predicted_latency_ms"] == pytest.approx(ms, rel=1e-6)
    assert len(list((out / "architectures").glob("random_*.yaml"))) == 2
    assert main(["sample", "run=r", "rank=shared_weights", "count=2", f"out={tmp_path / 't'}"]) == 0
    pair = [
        yaml.safe_load((tmp_path / "t" / "architectures" / f"0{i}.yaml").read_text())
        for i in (1, 2)
    ]
    ranks = [(-x["shared_weights_accuracy"], x["shared_weights_cross_entropy"]) for x in pair]
    assert ranks == sorted(ranks)


def test_train_compress_export_evaluate_by_hand(stand: Run, tmp_path: Path, digits: Data) -> None:
    trained, pruned, int8 = (tmp_path / name for name in ("trained", "pruned", "int8"))
    architecture = "architecture=r/architectures/chosen.yaml"
    quick = ["training.epochs=2", "compression.fine_tuning.epochs=1"]
    assert main(["train", architecture, f"out={trained}", quick[0]]) == 0
    own = read(trained / "result.json")
    assert own["architecture"] == stand.result["architecture"]
    assert own["params"] == stand.result["stages"][0]["params"]
    assert own["accuracy_top1"] == pytest.approx(
        stand.result["stages"][0]["accuracy_top1"], abs=0.01
    )

    assert main(["compress", f"model={trained}", f"out={pruned}", *quick]) == 0
    smaller = read(pruned / "result.json")
    assert smaller["params"] < smaller["params_before"] == own["params"]
    assert smaller["macs"] < smaller["macs_before"] == own["macs"]

    assert main(["compress", f"model={pruned}", "method=int8", f"out={int8}"]) == 0
    quantized = read(int8 / "result.json")
    assert accuracy(int8 / "model.onnx", digits) == pytest.approx(
        quantized["accuracy_top1"], abs=0.01
    )

    exported = tmp_path / "exported"
    assert main(["export", f"model={pruned}", f"out={exported}"]) == 0
    assert read(exported / "result.json")["model_bytes"] == (exported / "model.onnx").stat().st_size
    found = accuracy(exported / "model.onnx", digits)
    assert found == pytest.approx(smaller["accuracy_top1"], abs=2.1 / len(digits.test))

    evaluate = ["evaluate", f"model={exported}/model.onnx", "rounds=6"]
    assert main([*evaluate, f"out={tmp_path / 'e'}", "target_ms=1000"]) == 0
    judged = read(tmp_path / "e" / "result.json")
    assert judged["accuracy_top1"] == pytest.approx(found, abs=2.1 / len(digits.test))
    assert judged["latency_ms"]["value"] < 1000
    assert main([*evaluate, "target_ms=0.0001"]) == 3


def test_another_runtime_exports_evaluates_and_refuses_the_wrong_file(
    stand: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p"
    assert main(["export", "model=r", "format=pt2", "measure=false", f"out={out}"]) == 0
    assert "same class for 100.0 % of 256 validation images" in capsys.readouterr().out
    made = read(out / "result.json")
    assert (made["runtime"], made["model"]) == ("pytorch", "model.pt2")
    evaluate = ["evaluate", f"model={out}/model.pt2", "rounds=4"]
    assert main([*evaluate, "device.runtime=pytorch", f"out={tmp_path / 'e'}"]) == 0
    found = read(tmp_path / "e" / "result.json")
    source = next(s for s in stand.result["stages"] if s["network"] == stand.result["network"])
    assert found["accuracy_top1"] == pytest.approx(source["accuracy_top1"], abs=0.01)
    assert found["latency_ms"]["value"] > 0
    assert main(evaluate) == 2
    assert "expected device.runtime=pytorch" in capsys.readouterr().err
    (out / "model.pt2.json").unlink()
    assert read_metadata(out / "model.pt2")["architecture"] == made["architecture"]
    program = torch.export.export(torch.nn.Flatten(), (torch.zeros(1, 1, 8, 8),))
    torch.export.save(program, out / "model.pt2")
    assert main([*evaluate, "device.runtime=pytorch"]) == 2
    assert "model.pt2.json is missing" in capsys.readouterr().err
    assert main(["export", "model=r", "precision=int8", "measure=false", f"out={out / 'q'}"]) == 0
    assert "of 256 validation images" in capsys.readouterr().out  # of the run's own data


@pytest.mark.parametrize("runtime", ["openvino", "pytorch"])
def test_the_chain_ends_on_the_file_of_the_runtime_asked_for(
    runtime: str, tmp_path: Path, digits: Data
) -> None:
    if not runtime_file(runtime).available():
        pytest.skip(f"{runtime} is not installed here")
    one_layer = [{"channels": 16, "layers": 1, "stride": 2}]
    space = f"space={write_space(tmp_path, stages=one_layer, blocks=['k3_e1', 'k3_e3'])}"
    quick = ["networks=0", "candidates=1", *SMALL, "search.epochs=2", "training.epochs=1"]
    code = main(["run", space, f"device.runtime={runtime}", *quick, f"out={tmp_path / 'r'}"])
    assert code in (0, 3)
    result = read(tmp_path / "r" / "result.json")
    suffix = {"openvino": ".onnx", "pytorch": ".pt2"}[runtime]
    assert result["model"] == f"model{suffix}"
    assert (tmp_path / "r" / result["model"]).stat().st_size == result["model_bytes"]
    table = LatencyTable.load(tmp_path / "r" / "table.csv")
    assert table.runtime == runtime
    names = [stage["name"] for stage in result["stages"]]
    assert names[:2] == ["fp32", "pruned"]
    assert ("int8" in names) == (runtime == "openvino")  # eager PyTorch has none, which is said


def test_count_report_calibrate_doctor(
    stand: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["count", "architecture=r/architectures/chosen.yaml", "classes=10"]) == 0
    fp32 = stand.result["stages"][0]
    shown = capsys.readouterr().out
    assert f"{fp32['params']:,} parameters" in shown
    assert f"{fp32['macs']:,} multiply-adds" in shown
    shutil.copytree("r", tmp_path / "r")
    (tmp_path / "r" / "report.html").unlink()
    assert main(["report", f"run={tmp_path / 'r'}"]) == 0
    assert (tmp_path / "r" / "report.html").stat().st_size > 10_000
    judged = read(Path("r/search/front.json"))["networks"]
    assert judged[0]["architecture"] == stand.result["architecture"]
    candidates = [row["architecture"] for row in judged if row["kind"] == "candidate"]
    assert candidates == [row["architecture"] for row in stand.result["candidates"]]
    assert main(["report", f"run=[{tmp_path / 'r'},r]", f"out={tmp_path / 'both'}"]) == 0
    assert "2 runs" in (tmp_path / "both" / "report.html").read_text()
    table = tmp_path / "r" / "table.csv"
    arguments = ["space=tiny.yaml", f"table={table}", "classes=10", "networks=4", "held_out=2"]
    assert main(["calibrate", *arguments, f"out={tmp_path / 'c'}"]) == 0
    found = read(tmp_path / "c" / "result.json")
    networks = found["calibration"]["networks"]
    assert [n["held_out"] for n in networks].count(True) == 2
    assert len(networks) == 6
    assert found["applied"] == (
        found["calibration"]["error_after"] < found["calibration"]["error_before"]
    )
    capsys.readouterr()
    assert main(["doctor", f"out={tmp_path / 'd'}"]) == 0
    page, shown = (tmp_path / "d" / "doctor.md").read_text(), capsys.readouterr().out
    assert shown.startswith(page)
    assert f"paste {tmp_path / 'd' / 'doctor.md'} into an issue" in shown
    assert page.startswith(f"**fbnas {__version__}**")
    for name in ("torch", "lightning-fabric", "pillow", "rich", "scipy"):
        assert f"| {name} | {importlib.metadata.version(name)} | >=" in page
    assert f"{Path.home()}/" not in page
    runtimes = read(tmp_path / "d" / "result.json")["runtimes"]
    works, words = runtimes["onnxruntime"]["precisions"]["fp32"]
    assert works
    assert re.fullmatch(r"works \(\d+\.\d+ ms\)", words)
    assert "CPU" in runtimes["onnxruntime"]["providers"]


def test_a_plan_tells_known_free_and_shapes_to_measure_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = f"space={write_space(tmp_path)}"
    table = tmp_path / "t.csv"
    plan = ["profile", space, f"table={table}", "classes=10", "plan=true"]
    assert main(plan) == 0
    shown = capsys.readouterr().out
    assert "measure  k3_e3 (8 -> 16, stride 2, 8x8)" in shown
    assert "free     skip (8 -> 8, stride 1, 8x8)" in shown
    assert "15 shapes, 13 to measure on local through onnxruntime, fp32: about" in shown
    assert not table.exists()
    write_table(table)
    assert main(plan) == 0
    shown = capsys.readouterr().out
    assert "known    k3_e3 (8 -> 16, stride 2, 8x8)" in shown
    assert "0 to measure" in shown


def test_the_published_networks_are_counted_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "architecture=fbnet_c"]) == 0
    assert "multiply-adds (3" in capsys.readouterr().out  # about 375 M in the paper


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def assert_same(left: Path, right: Path) -> None:
    """Theta, architecture and trained weights are equal to the last bit."""
    ours, theirs = (read(run / "search" / "theta.json")["targets"][0] for run in (left, right))
    assert ours["logits"] == theirs["logits"]
    assert read(left / "result.json")["architecture"] == read(right / "result.json")["architecture"]
    for part in ("train", "pruned"):
        assert weights(left / part) == weights(right / part)


def struck(moment: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return forked.run(HERE / "struck_run.py", moment, *arguments)


MOMENTS = {"search": 5, "train": 13, "pruned": 19}  # of 9 steps of search, 8 of training, 4 more


def test_the_same_seed_gives_the_same_run(steady: Path, tmp_path: Path) -> None:
    assert main([*run_arguments(tmp_path / "r"), f"table={steady.parent / 'table.csv'}"]) == 0
    assert_same(steady, tmp_path / "r")


@pytest.mark.parametrize("part", MOMENTS)
def test_a_killed_run_resumes_to_the_same_numbers(part: str, steady: Path, tmp_path: Path) -> None:
    arguments = run_arguments(tmp_path / "r")
    assert struck(f"SIGKILL@{MOMENTS[part]}", arguments).returncode == -9
    begun = [name for name in ("search", "train", "pruned") if (tmp_path / "r" / name).is_dir()]
    assert begun[-1] == part
    assert not (tmp_path / "r" / "result.json").exists()
    assert main(arguments) == 2  # not without being asked to
    assert main([*arguments, "resume=true"]) == 0
    assert_same(steady, tmp_path / "r")


def test_an_interrupt_says_how_to_go_on(steady: Path, tmp_path: Path) -> None:
    stopped = struck("SIGINT@5", run_arguments(tmp_path / "r"))
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    line = stopped.stderr.splitlines()[-1]
    assert line.startswith("fbnas: interrupted. Continue with: fbnas run ")
    assert main(shlex.split(line.partition("Continue with: fbnas ")[2])) == 0
    assert_same(steady, tmp_path / "r")


def timing(ms: float) -> Timing:
    return Timing(ms, 0.99 * ms, 1.01 * ms, 30)


@dataclass(frozen=True)
class FakeDevice:
    """Says what its files take, by name, in ms."""

    ms: dict[str, float]
    noise_floor: float = 0.02

    def measure_quietly(self, files: list[Path], _: str, **__: Any) -> Measurement:
        return self.measure(files)

    def measure(self, files: list[Path], **_: Any) -> Measurement:
        timings = tuple(timing(self.ms[file.stem]) for file in files)
        return Measurement(timings, self.noise_floor, np.zeros((2, len(files))))


def stage(name: str, folder: Path, validation_accuracy: float) -> Stage:
    return Stage(name, folder / "models" / f"{name}.onnx", name, 1, 1, validation_accuracy)


@pytest.mark.parametrize(
    ("ms", "accuracy_after", "words"),
    [
        (0.5, 0.90, "2.00 times as fast"),
        (1.015, 0.90, "accepted"),  # within the noise of 2 %
        (1.03, 0.95, "rejected: slower"),
        (0.5, 0.891, "accepted"),
        (0.5, 0.885, "rejected: validation accuracy falls by 0.0150, allowed 0.01"),
    ],
)
def test_a_stage_is_kept_if_it_is_no_slower_and_accurate_enough(
    ms: float, accuracy_after: float, words: str, tmp_path: Path, digits: Data
) -> None:
    device: Any = FakeDevice({"fp32": 1.0, "pruned": ms})
    judge = Judge({"seed": 0, "max_accuracy_drop": 0.01}, tmp_path, digits, device)
    before, after = stage("fp32", tmp_path, 0.9), stage("pruned", tmp_path, accuracy_after)
    judge.decide(after, best=before, trained=before)
    assert after.accepted is not words.startswith("rejected")
    assert words in after.reason


def test_a_calibration_that_does_not_help_is_on_the_tables_record(
    tmp_path: Path, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = agreement(np.array([1.0, 2.0, 3.0]), np.array([1.1, 2.0, 2.9]))
    found = calibration.Calibration(1.0, 0.0, None, same, same, same, 0.01, 0.0, ())
    assert not found.helps
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: found)
    space = write_space(tmp_path)
    given = [f"space={space}", f"table={write_table(tmp_path / 't.csv')}", "networks=4", *SMALL]
    config = compose_single("run", [*given, f"out={tmp_path / 'r'}"])
    chain = Chain(config, OutFolder(config), SearchSpace.load(space), digits, Device())
    measured_table(chain)
    header = LatencyTable.load(tmp_path / "r" / "table.csv").header
    assert header["calibration"].startswith("no correction from")
    assert "correction_scale" not in header


@pytest.mark.parametrize(
    ("ms", "accepted"),
    [
        ({"fp32": 4.0, "pruned": 3.0, "int8": 2.9}, ["fp32", "pruned", "int8"]),
        ({"fp32": 4.0, "pruned": 3.0, "int8": 3.04}, ["fp32", "pruned", "int8"]),  # noise: 2 %
        ({"fp32": 4.0, "pruned": 3.0, "int8": 3.2}, ["fp32", "pruned"]),
        ({"fp32": 4.0, "pruned": 4.07, "int8": 4.13}, ["fp32", "pruned"]),  # creeping up
        ({"fp32": 4.0, "pruned": 4.5, "int8": 3.0}, ["fp32", "int8"]),
    ],
)
def test_a_stage_that_the_last_measurement_finds_slower_is_rejected_after_all(
    ms: dict[str, float], accepted: list[str], tmp_path: Path
) -> None:
    made = [stage(name, tmp_path, 0.9) for name in ms]
    final_measurement(made, cast("Any", FakeDevice(ms)), seed=0)
    assert [one.name for one in made if one.accepted] == accepted
    kept = [one for one in made[1:] if one.accepted]
    for one in kept:  # as the table has it, not as it was when the stage was accepted
        before = min(ms[x.name] for x in made[: made.index(one)] if x.accepted)
        assert one.reason.startswith(f"accepted: {before / ms[one.name]:.2f} times as fast as ")
    assert all(
        one.reason.startswith("rejected: slower when all stages were timed together")
        for one in made
        if not one.accepted
    )


@pytest.fixture
def again(
    steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Judge the stages of the steady run anew, with latencies of our own."""

    def judged(ms: dict[str, float], allowed: float = 0.01) -> tuple[int, dict[str, Any]]:
        shutil.copytree(steady, tmp_path / "r")
        for file in (tmp_path / "r" / "models").glob("*.decision.json"):
            file.unlink()
        fake = FakeDevice(ms)
        monkeypatch.setattr(Device, "measure", lambda _, files, **__: fake.measure(files))
        arguments = [*run_arguments(tmp_path / "r"), f"max_accuracy_drop={allowed}"]
        config = tmp_path / "r" / "config.yaml"
        config.write_text(yaml.safe_dump(compose_single("run", arguments[1:])))
        code = main([*arguments, "resume=true"])
        return code, read(tmp_path / "r" / "result.json")

    return judged


@pytest.mark.parametrize(
    ("ms", "final"),
    [
        ({"fp32": 4.0, "pruned": 5.0, "int8": 6.0}, "fp32"),
        ({"fp32": 4.0, "pruned": 3.0, "int8": 3.5}, "pruned"),
        ({"fp32": 4.0, "pruned": 5.0, "int8": 3.0}, "int8"),
    ],
)
def test_the_chain_goes_on_from_the_best_stage_before(
    again: Callable[..., tuple[int, dict[str, Any]]], ms: dict[str, float], final: str
) -> None:
    code, result = again(ms, 1.0)
    assert code == 0
    assert result["final_stage"] == final
    assert result["latency_ms"]["value"] == ms[final]
    kept = {stage["name"]: stage["network"] for stage in result["stages"]}
    assert kept["int8"] == ("pruned" if ms["pruned"] < ms["fp32"] else "train")


def test_a_budget_that_is_missed_is_exit_code_3(
    again: Callable[..., tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = again({"fp32": 8.5, "pruned": 9.0, "int8": 9.0})  # over 8 ms by more than 5 %
    assert code == 3
    assert result["latency_ms"]["value"] == 8.5
    assert capsys.readouterr().out.splitlines()[-1].endswith("over budget")


def test_config_yaml_composes_what_was_run(steady: Path) -> None:
    stored = yaml.safe_load((steady / "config.yaml").read_text())
    assert stored.pop("command_line").startswith("fbnas run ")
    assert stored == compose_single("run", run_arguments(steady)[1:])


def test_a_file_that_states_nothing_is_evaluated_with_the_datas_own_mean_and_std(
    steady: Path, tmp_path: Path
) -> None:
    model = onnx.load(steady / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    out = tmp_path / "e"
    arguments = [
        f"model={tmp_path / 'foreign.onnx'}",
        "data=digits",
        "data.limit=320",
        f"out={out}",
    ]
    assert main(["evaluate", *arguments, "rounds=2"]) == 0
    assert (
        read(out / "result.json")["accuracy_top1"] == read(steady / "result.json")["accuracy_top1"]
    )
