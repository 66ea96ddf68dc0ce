"""One network with two heads: trained, compressed, exported and judged together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_run import write_space

from fbnas.commands import main
from fbnas.export import read_metadata
from fbnas.latency.session import open_session
from fbnas.space import load_network
from fbnas.training.data import load_data

HEADS = {"digit": [str(i) for i in range(10)], "parity": ["even", "odd"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that knows digits, and odd ones from even ones of other images."""
    root = tmp_path_factory.mktemp("joint")
    write_space(root)
    (root / "a.yaml").write_text("space: tiny\nblocks: [k3_e3, k5_e1, k3_e3]\n")
    images = load_data(source="digits").train
    for name in ("even", "odd"):
        (root / "photos" / name).mkdir(parents=True)
    for index, label in enumerate(images.labels[:400].tolist()):
        pixels = images.batch(torch.tensor([index]))[0, 0].numpy()
        larger = Image.fromarray(pixels).resize((12, 12)).convert("RGB")  # brought to the space's
        larger.save(root / "photos" / ("even", "odd")[label % 2] / f"{index}.png")
    folder = {"source": "image_folder", "path": str(root / "photos")}
    (root / "parity.yaml").write_text(yaml.safe_dump(folder))
    heads = f"heads={{digit: digits, parity: {root / 'parity.yaml'}}}"
    given = [f"architecture={root / 'a.yaml'}", f"space={root / 'tiny.yaml'}", heads]
    assert main(["train", *given, "training.epochs=8", f"out={root / 'joint'}"]) == 0
    return root


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


def test_both_heads_have_learned_and_the_folder_tells_them(place: Path) -> None:
    found = result(place / "joint")
    assert found["accuracy_by_head"]["digit"] > 0.8
    assert found["accuracy_by_head"]["parity"] > 0.65
    assert set(found["validation_accuracy_by_head"]) == set(HEADS)
    stored = yaml.safe_load((place / "joint" / "network.yaml").read_text())
    assert stored["heads"] == HEADS
    assert "class_names" not in stored
    network, card = load_network(place / "joint")
    assert network(torch.zeros(1, 1, 8, 8)).shape == (1, 12)
    assert {name: list(names) for name, names in card.heads.items()} == HEADS
    assert card.class_names == (*HEADS["digit"], "even", "odd")


def test_all_is_compressed_together_and_the_file_has_an_output_for_each_head(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["method=[channel_pruning,int8]", "compression.fine_tuning.epochs=2", "measure=false"]
    out = tmp_path / "small"
    model = f"model={place / 'joint'}"
    assert main(["compress", model, *small, f"out={out}"]) == 0
    found = result(out)
    assert found["params"] < found["params_before"]
    assert set(found["accuracy_by_head"]) == set(found["accuracy_by_head_before"]) == set(HEADS)
    session = open_session(out / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["digit", "parity"]
    capsys.readouterr()
    file = f"model={out / 'model.onnx'}"
    assert main(["evaluate", file, "rounds=4", f"out={tmp_path / 'judged'}"]) == 0
    assert result(tmp_path / "judged")["accuracy_by_head"] == found["accuracy_by_head"]
    assert "(digit 0." in capsys.readouterr().out


def test_exported_files_answer_as_torch_does_and_are_told_of_by_head(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "files"
    several = ["precision=[fp32,fp16,int8]", "rounds=4", f"out={out}"]
    assert main(["export", f"model={place / 'joint'}", *several]) == 0
    said = capsys.readouterr().out
    assert "model_fp32.onnx, parity: accuracy 0." in said
    assert "ms for 2 heads" in said
    network, _ = load_network(place / "joint")
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = network(images).numpy()
    for row in result(out)["files"]:
        file = out / row["file"]
        session = open_session(file)
        assert [output.name for output in session.get_outputs()] == ["digit", "parity"]
        answers = session.run(["digit", "parity"], {"images": images.numpy()})
        assert [scores.shape for scores in answers] == [(5, 10), (5, 2)]
        if row["precision"] == "fp32":
            np.testing.assert_allclose(np.concatenate(answers, 1), expected, rtol=1e-3, atol=1e-4)
        assert read_metadata(file)["heads"] == HEADS
        assert row["accuracy_by_head"]["digit"] > 0.8
        assert row["parity_argmax_agreement_by_head"]["parity"] > 0.9
        assert row["separate_latency_ms"] > 0
    assert sorted(x.name for x in out.iterdir() if x.is_dir()) == []  # files of one head are gone
    image = next((place / "photos" / "odd").iterdir())
    shown = subprocess.run(
        [sys.executable, "classify_onnx.py", str(image)], cwd=out, capture_output=True, text=True
    )
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["digit", "parity"]


def test_openvino_reads_such_a_file_too_and_writes_its_own_with_all_scores_side_by_side(
    place: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    both = ["format=[onnx,openvino]", "measure=false", f"out={tmp_path / 'both'}"]
    assert main(["export", f"model={place / 'joint'}", *both]) == 0
    found = {row["format"]: row for row in result(tmp_path / "both")["files"]}
    for name in ("model.onnx", "model.xml"):
        file = [f"model={tmp_path / 'both' / name}", "device.runtime=openvino", "rounds=4"]
        assert main(["evaluate", *file, f"out={tmp_path / name}"]) == 0
        accuracy = result(tmp_path / name)["accuracy_by_head"]
        assert accuracy == pytest.approx(found["onnx"]["accuracy_by_head"], abs=0.01)


def test_a_teacher_teaches_all_heads(place: Path, tmp_path: Path) -> None:
    """By soft labels alone: what the pruned network knows again, the whole one has told it."""
    taught = ["compression.fine_tuning.teacher=uncompressed", "training.distillation.alpha=1"]
    pruned = ["method=channel_pruning", "compression.pruning.ratio=0.5", "measure=false"]
    for name, tuned in (("untuned", "lr=1e-9"), ("taught", "epochs=3")):
        given = [f"model={place / 'joint'}", *pruned, *taught, f"compression.fine_tuning.{tuned}"]
        assert main(["compress", *given, f"out={tmp_path / name}"]) == 0
    before = result(tmp_path / "untuned")["accuracy_by_head"]
    after = result(tmp_path / "taught")["accuracy_by_head"]
    assert after["digit"] > max(0.75, before["digit"] + 0.1)
    assert after["parity"] >= before["parity"] - 0.05


def test_quantization_aware_training_knows_the_heads(place: Path, tmp_path: Path) -> None:
    given = ["method=qat", "compression.fine_tuning.epochs=1", "measure=false"]
    assert main(["compress", f"model={place / 'joint'}", *given, f"out={tmp_path / 'qat'}"]) == 0
    found = result(tmp_path / "qat")
    assert found["accuracy_by_head"]["digit"] > 0.8
    assert read_metadata(tmp_path / "qat" / "model.onnx")["heads"] == HEADS
    again = [f"model={tmp_path / 'qat'}", "precision=int8", "measure=false"]
    assert main(["export", *again, f"out={tmp_path / 'int8'}"]) == 0
    assert result(tmp_path / "int8")["accuracy_by_head"] == found["accuracy_by_head"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "heads={digit: digits}"], "1 heads; expected at least two"),
        (["train", "heads={digit: digits, b: digit}"], "Unknown data 'digit'. Did you mean"),
        (["train", "heads={digit: digits, b: image_folder}"], "heads.b has no path; expected"),
        (
            ["train", "heads={digit: digits, b: {source: digits, limit: few}}"],
            "heads.b: data.limit='few'; expected a whole number",
        ),
        (["train", "heads=digits"], "expected a mapping"),
        (
            ["train", "heads={a: digits, b: digits}", "data.limit=100"],
            "'data.limit=100' is of one data set and heads= gives one to each head",
        ),
        (
            ["train", "heads={a: digits, b: digits}", "teacher=joint"],
            "teacher=joint has the heads digit, parity, and the data has the heads a, b; expected",
        ),
        (
            ["train", "teacher=joint"],
            "teacher=joint has the heads digit, parity, and the data has one head; expected",
        ),
        (
            ["compress", "model=joint", "heads={digit: digits, other: digits}"],
            "heads=digit, other, and joint has the heads digit, parity; expected",
        ),
        (
            ["compress", "model=joint", "heads={digit: parity.yaml, parity: parity.yaml}"],
            "the data of head digit has 2 classes (even, odd, ...), it was trained for 10",
        ),
        (["compress", "model=joint", "data.limit=100"], "joint has the heads digit, parity"),
        (["export", "model=joint", "data=digits"], "data= is of one data set and joint has"),
        (["export", "heads={a: joint, b: joint}"], "heads.a=joint has heads of its own"),
        (["run", "heads={a: digits, b: digits}"], "no option 'heads'. It is one of fbnas compress"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_heads_is_refused_in_a_line(
    arguments: list[str],
    words: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    if arguments[0] == "train":
        arguments = [*arguments, "architecture=a.yaml", "space=tiny.yaml"]
    assert main([*arguments, "out=x"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
