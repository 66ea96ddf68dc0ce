"""Partial, unfinished and damaged folders; the shapes that the report computes on its own."""

import json
from pathlib import Path

import made_run as made
import pytest
from parsed_page import ParsedPage

from fbnas.errors import InputError
from fbnas.files import append_jsonl, read_json, read_yaml, write_json, write_yaml
from fbnas.report import write_report
from fbnas.report.shapes import read_space
from fbnas.report.words import digits, duration, percent, scaled, signed
from fbnas.shipped import configs_folder
from fbnas.space.search_space import SearchSpace


def test_a_search_alone(tmp_path: Path) -> None:
    made.write_search(tmp_path, (0.25, 0.4), table="gone.csv")
    page = ParsedPage(write_report(tmp_path))
    assert page.sections() == ["architecture", "theta", "search", "table"]
    assert page.text_of["summary"].replace("\u202f", " ") == (
        "Searched space quickstart for 12 epochs; theta expects 0.223 ms for the 0.250 ms asked "
        "for and 0.223 ms for the 0.400 ms asked for."
    )
    assert {"theta-0", "theta-1"} <= set(page.figures)
    assert [row[2] for row in page.tables["layers"][1:]] == made.CHOSEN  # theta's most probable
    heatmap = page.figures["table-0"]["data"][0]
    assert [list(column) for column in zip(*heatmap["z"], strict=True)] == made.latency_tensor()


def test_a_search_finds_its_table_and_its_samples(tmp_path: Path) -> None:
    made.write_table(tmp_path / "t.csv")
    made.write_search(tmp_path / "s", table=str(tmp_path / "t.csv"))
    for number, blocks in (("02", ["k3_e1"] * 7), ("01", ["k5_e1"] * 7)):
        write_yaml(tmp_path / f"s/architectures/{number}.yaml", {"blocks": blocks})
    page = ParsedPage(write_report(tmp_path / "s"))
    assert "t.csv, onnxruntime, int8" in page.text_of["table"]
    assert {row[2] for row in page.tables["layers"][1:]} == {"k5_e1"}
    assert "From architectures/01.yaml." in page.text_of["architecture"]


def test_a_training_alone(tmp_path: Path) -> None:
    made.write_training(tmp_path)
    page = ParsedPage(write_report(tmp_path))
    assert page.sections() == ["architecture", "training"]
    assert "Trained for 8 epochs; epoch 7 was best with 95.2" in page.text_of["summary"]
    assert page.tables["layers"][1][-1] == "\u2013"  # no table, no latency


def test_only_a_result(tmp_path: Path) -> None:
    result = {
        "command": "evaluate",
        "accuracy_top1": 0.5,
        "latency_ms": made.latency(1.0),
        "seed": 0,
    }
    write_json(tmp_path / "result.json", result)
    page = ParsedPage(write_report(tmp_path))
    assert page.sections() == ["environment"]
    assert "takes 1.00\u202fms (0.980 to 1.03) on this device" in page.text_of["summary"]


def test_an_unfinished_run(run_folder: Path) -> None:
    (run_folder / "result.json").unlink()
    with (run_folder / "search" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 12, "pha')  # killed while it wrote
    page = ParsedPage(write_report(run_folder))
    assert page.sections() == [
        *("front", "architecture", "theta", "search", "training", "table", "environment")
    ]
    assert len(page.figures["theta-0"]["frames"]) == made.EPOCHS


def test_a_search_that_has_just_begun(tmp_path: Path) -> None:
    made.write_search(tmp_path / "search", (0.25,), table="gone.csv")
    for name in ("theta.json", "space.yaml"):
        (tmp_path / "search" / name).unlink()
    with pytest.raises(InputError, match="resume=true"):
        write_report(tmp_path)
    write_yaml(tmp_path / "config.yaml", {"command": "run", "space": made.SPACE})
    written = write_report(tmp_path)
    assert "Where the unfinished search stands." in written.read_text()
    page = ParsedPage(written)
    assert {"theta", "search", "environment"} <= set(page.sections())
    assert len(page.figures["theta-0"]["frames"]) == made.EPOCHS


def test_the_precision_is_that_of_the_final_file(run_folder: Path) -> None:
    result = read_json(run_folder / "result.json")
    result["device"]["precision"] = "fp32"
    for stage, precision in (("pruned", "fp32"), ("int8", "int8"), ("qat", "int8")):
        write_json(run_folder / "result.json", result | {"final_stage": stage})
        summary = ParsedPage(write_report(run_folder)).text_of["summary"]
        assert f"(onnxruntime, {precision})" in summary


@pytest.mark.parametrize("stated", ["fp32", "int8"])
@pytest.mark.parametrize("stage", ["fp32", "qat"])
def test_the_precision_is_what_the_stage_states(stage: str, stated: str, run_folder: Path) -> None:
    result = read_json(run_folder / "result.json")
    result["device"]["precision"] = "int8" if stated == "fp32" else "fp32"
    result["stages"].append(result["stages"][0] | {"name": stage, "precision": stated})
    write_json(run_folder / "result.json", result | {"final_stage": stage})
    summary = ParsedPage(write_report(run_folder)).text_of["summary"]
    assert f"(onnxruntime, {stated})" in summary


@pytest.mark.parametrize(("model", "precision"), [("model.onnx", "int8"), ("model.pt2", "fp32")])
def test_an_older_run_trained_for_int8_is_int8_in_onnx_files_alone(
    model: str, precision: str, run_folder: Path
) -> None:
    result = read_json(run_folder / "result.json")
    write_json(run_folder / "result.json", result | {"final_stage": "qat", "model": model})
    summary = ParsedPage(write_report(run_folder)).text_of["summary"]
    assert f"(onnxruntime, {precision})" in summary


def test_a_stage_that_was_never_measured(run_folder: Path) -> None:
    result = read_json(run_folder / "result.json")
    result["stages"][1] = {"name": "pruned", "accepted": False, "reason": "could not be exported"}
    write_json(run_folder / "result.json", result)
    row = ParsedPage(write_report(run_folder)).tables["stage-table"][2]
    assert row == ["pruned", *["\u2013"] * 5, "✗ rejectedcould not be exported"]


def test_fine_tuning_has_its_own_curves(run_folder: Path) -> None:
    made.write_training(run_folder / "pruned", epochs=3)
    page = ParsedPage(write_report(run_folder))
    assert page.trace("pruned-loss", "training")["x"] == [0, 1, 2]


def test_an_epoch_written_twice_counts_as_last_written(tmp_path: Path) -> None:
    made.write_training(tmp_path, epochs=3)
    row = {"epoch": 1, "loss": 9.0, "accuracy": 0, "validation_loss": 1, "validation_accuracy": 0}
    append_jsonl(tmp_path / "metrics.jsonl", row)
    page = ParsedPage(write_report(tmp_path))
    assert page.trace("train-loss", "training")["y"] == pytest.approx([2.0, 9.0, 0.98])


def test_nan_in_the_metrics_leaves_a_gap(tmp_path: Path) -> None:
    made.write_training(tmp_path, epochs=3)
    row = {"epoch": 3, "accuracy": 0, "validation_loss": 1, "validation_accuracy": 0}
    append_jsonl(tmp_path / "metrics.jsonl", row | {"loss": float("nan")})
    assert ParsedPage(write_report(tmp_path)).trace("train-loss", "training")["y"][3] is None


def test_a_long_search_with_many_targets_is_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "EPOCHS", 90)
    made.write_search(tmp_path, tuple(0.2 + 0.01 * i for i in range(10)))
    path = write_report(tmp_path)
    page = ParsedPage(path)
    steps = next(a["data-steps"] for _, a in page.tags if a.get("id") == "epoch").split(",")
    assert (len(steps), steps[0], steps[-1]) == (25, "0", "89")
    assert len(page.figures["theta-9"]["frames"]) == 25
    assert path.stat().st_size < 6_000_000


def test_a_target_list_in_the_result(tmp_path: Path) -> None:
    made.write_search(tmp_path, (0.25, 0.4))
    write_json(tmp_path / "result.json", {"command": "search", "target_ms": [0.25, 0.4]})
    page = ParsedPage(write_report(tmp_path))
    assert "search in space quickstart" in page.source
    assert "asked" not in [name for name, _ in page.tables.items()]


def damage_result(folder: Path) -> None:
    path = folder / "result.json"
    path.write_text(path.read_text()[:400])


def damage_table(folder: Path) -> None:
    path = folder / "table.csv"
    lines = path.read_text().splitlines()
    lines[11] = lines[11].replace(",30", ",many")
    path.write_text("\n".join(lines))


def damage_columns(folder: Path) -> None:
    path = folder / "table.csv"
    path.write_text(path.read_text().replace("latency_ms,low_ms", "latency,low_ms"))


def damage_metrics(folder: Path) -> None:
    path = folder / "search" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[2])
    del row["targets"][0]["expected_latency_ms"]
    path.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]))


def damage_architecture(folder: Path) -> None:
    result = read_json(folder / "result.json")
    write_json(folder / "result.json", result | {"architecture": ["k3_e1"] * 6})


def damage_space(folder: Path) -> None:
    write_yaml(folder / "search" / "space.yaml", {"name": "x", "resolution": 16})


def damage_stage(folder: Path) -> None:
    result = read_json(folder / "result.json")
    del result["stages"][1]["accepted"]
    write_json(folder / "result.json", result)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_result, r"result\.json, line \d+: .*truncated or edited"),
        (damage_table, r"table\.csv, line 12: .*'many'; expected block,.*fbnas profile table="),
        (damage_columns, r"table\.csv, line 9: the columns latency_ms are missing"),
        (damage_metrics, r"metrics\.jsonl, epoch 2: `expected_latency_ms` is missing"),
        (damage_architecture, r"has 6 blocks, space quickstart has 7 layers"),
        (damage_space, r"space\.yaml: 'stem' is missing or of the wrong kind"),
        (damage_stage, r"result\.json, stages\[1\]: `accepted` is missing"),
    ],
)
def test_damage_is_one_line_with_the_file(run_folder: Path, damage: object, words: str) -> None:
    damage(run_folder)  # type: ignore[operator]
    with pytest.raises(InputError, match=words) as caught:
        write_report(run_folder)
    assert "\n" not in str(caught.value)
    assert not (run_folder / "report.html").exists()


def test_an_unknown_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no result\.json.*fbnas report run=FOLDER"):
        write_report(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such folder.*fbnas report run=FOLDER"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["fbnet", "fbnet_cifar", "quickstart"])
def test_shapes_are_those_of_the_search_space(name: str) -> None:
    path = configs_folder() / "space" / f"{name}.yaml"
    space, own = SearchSpace.load(name), read_space(read_yaml(path), path)
    assert [layer.shape for layer in own.layers] == [
        (x.in_channels, x.out_channels, x.stride, x.height, x.width) for x in space.layers
    ]
    assert [layer.stage for layer in own.layers] == [layer.stage for layer in space.layers]
    assert own.final_size == space.final_size


def test_shapes_of_an_odd_resolution() -> None:
    own = read_space(made.SPACE | {"resolution": 19}, Path("x"))
    space = SearchSpace.from_dict(made.SPACE | {"resolution": 19})
    assert [x.shape[3] for x in own.layers] == [x.height for x in space.layers]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (digits(0.031416), "0.0314"),
        (digits(0.9996), "1.00"),
        (digits(99.96), "100"),
        (digits(1234.5), "1234"),
        (digits(0), "0"),
        (digits(-12.34), "-12.3"),
        (scaled(4_472_000), "4.47\u202fM"),
        (scaled(98_000, "B"), "98.0\u202fkB"),
        (scaled(512, "B"), "512\u202fB"),
        (scaled(None), "\u2013"),
        (percent(0.97249), "97.2\u202f%"),
        (signed(-2.44), "\u22122.4"),
        (duration(59.4), "59\u202fs"),
        (duration(3725), "1\u202fh 02\u202fmin"),
    ],
)
def test_numbers_as_written(written: str, expected: str) -> None:
    assert written == expected
