"""Several heads on one backbone: trained apart, exported as one file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import write_space

from fbnas.commands import main
from fbnas.export import read_metadata
from fbnas.latency.session import open_session
from fbnas.space import load_network
from fbnas.training.data import load_data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for digits, and a head on its backbone that tells odd ones from even ones."""
    root = tmp_path_factory.mktemp("heads")
    (root / "a.yaml").write_text("space: tiny\nblocks: [k3_e3, k5_e1, k3_e3]\n")
    given = [f"architecture={root / 'a.yaml'}", f"space={write_space(root)}"]
    assert main(["train", *given, "training.epochs=15", f"out={root / 'digit'}"]) == 0
    images = load_data(source="digits").train
    for name in ("even", "odd"):
        (root / "photos" / name).mkdir(parents=True)
    for index, label in enumerate(images.labels[:600].tolist()):
        pixels = images.batch(torch.tensor([index]))[0, 0].numpy()
        Image.fromarray(pixels).save(root / "photos" / ("even", "odd")[label % 2] / f"{index}.png")
    assert main(["train", f"backbone={root / 'digit'}", *parity(root), f"out={root / 'b'}"]) == 0
    return root


def parity(root: Path) -> list[str]:
    photos = ["data=image_folder", f"data.path={root / 'photos'}", "data.channels=1"]
    return [*photos, "training.epochs=5"]


def test_the_backbone_stays_bit_for_bit_and_the_head_has_learned(place: Path) -> None:
    (first, card), (second, other) = (load_network(place / name) for name in ("digit", "b"))
    expected, found = first.state_dict(), second.state_dict()
    changed = {name for name in expected if not torch.equal(expected[name], found[name])}
    assert changed == {"classifier.linear.weight", "classifier.linear.bias"}
    assert other.class_names == ("even", "odd")
    assert (other.mean, other.std) == (card.mean, card.std)  # one file takes one input
    assert json.loads((place / "b" / "result.json").read_text())["accuracy_top1"] > 0.7


def test_one_file_answers_as_both_networks(place: Path, tmp_path: Path) -> None:
    heads = f"heads={{digit: {place / 'digit'}, parity: {place / 'b'}}}"
    assert main(["export", heads, "rounds=4", f"out={tmp_path / 'both'}"]) == 0
    file = tmp_path / "both" / "model.onnx"
    session = open_session(file)
    assert [output.name for output in session.get_outputs()] == ["digit", "parity"]
    images = torch.randn(5, 1, 8, 8)
    answers = session.run(None, {"images": images.numpy()})
    for name, scores in zip(("digit", "b"), answers, strict=True):
        with torch.no_grad():
            expected = load_network(place / name)[0](images)
        np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-3, atol=1e-4)
    stated = read_metadata(file)
    assert stated["heads"] == {
        "digit": [str(i) for i in range(10)],
        "parity": ["even", "odd"],
    }
    result = json.loads((tmp_path / "both" / "result.json").read_text())
    assert result["heads"] == stated["heads"]
    assert result["latency_ms"]["value"] > 0
    assert result["separate_latency_ms"] > 0
    size = sum((place / name / "weights.safetensors").stat().st_size for name in ("digit", "b"))
    assert result["model_bytes"] < 0.8 * size  # the backbone is there once


def test_the_file_is_judged_head_by_head_at_int8_too(place: Path, tmp_path: Path) -> None:
    heads = f"heads={{digit: {place / 'digit'}, parity: {place / 'b'}}}"
    given = ["precision=int8", "measure=false", f"out={tmp_path / 'int8'}"]
    assert main(["export", heads, *given]) == 0
    found = json.loads((tmp_path / "int8" / "result.json").read_text())
    for name, folder in (("digit", "digit"), ("parity", "b")):
        alone = json.loads((place / folder / "result.json").read_text())["accuracy_top1"]
        assert found["accuracy_by_head"][name] == pytest.approx(alone, abs=0.03)
    file = f"model={tmp_path / 'int8' / 'model.onnx'}"  # its folder tells the heads' data
    assert main(["evaluate", file, "rounds=4", f"out={tmp_path / 'judged'}"]) == 0
    judged = json.loads((tmp_path / "judged" / "result.json").read_text())
    assert judged["accuracy_by_head"] == found["accuracy_by_head"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "fbnas train needs architecture=...; a file, or fbnet_a"),
        (["train", "backbone=nowhere"], "backbone=nowhere: no network there"),
        (["train", "backbone=digit", "teacher=digit"], "expected no teacher beside it"),
        (["export"], "fbnas export needs model=..."),
        (["export", "heads={digit: digit}"], "1 heads; expected at least two"),
        (["export", "heads={a: digit, b: other}"], "a and b have different backbones"),
        (["export", "heads={a: digit, b: b}", "data=digits"], "expected one of the two"),
        (["export", "heads=digit"], "expected a mapping"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_heads_is_refused_in_a_line(
    arguments: list[str],
    words: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    if not Path("other").exists():
        other = ["architecture=a.yaml", "space=tiny.yaml", "training.epochs=1", "seed=1"]
        assert main(["train", *other, "data.limit=200", "out=other"]) == 0
    capsys.readouterr()
    assert main([*arguments, "out=x"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
