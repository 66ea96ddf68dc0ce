"""Exported files: the same scores, any batch, everything needed to use them; bad files refused."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from fbnas import __version__
from fbnas.errors import InputError
from fbnas.export import accuracy_of_file, export_onnx, read_metadata
from fbnas.latency.session import open_session, run
from fbnas.space import Architecture, NetworkCard, SearchSpace, Stage, Stem, build_network
from fbnas.training.data import TensorImages, batches

SPACE = SearchSpace(
    name="exported",
    resolution=12,
    stem=Stem(8, 1),
    stages=(Stage(8, 1, 1), Stage(16, 8, 2)),
    head=32,
)
ARCHITECTURE = Architecture(("k3_e1_g2", *SPACE.blocks[:7], "skip"), SPACE.name)
CARD = NetworkCard(SPACE, ARCHITECTURE, ("ant", "bee", "wäsp"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def network() -> nn.Module:
    torch.manual_seed(0)
    built = build_network(SPACE, ARCHITECTURE, classes=3)
    built(torch.randn(32, 3, 12, 12))  # BN statistics that differ by channel
    nn.init.normal_(built.classifier.linear.weight)
    return built.eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "network.onnx"
    export_onnx(network(), path, card=CARD)
    return path


@pytest.mark.parametrize("count", [1, 7])
def test_scores_agree_with_torch_at_any_batch(exported: Path, count: int) -> None:
    with torch.no_grad():
        expected = network()(images(count))
    torch.testing.assert_close(
        run(open_session(exported), images(count)), expected, rtol=1e-4, atol=1e-5
    )


def test_report_says_how_well_file_and_torch_agree(tmp_path: Path) -> None:
    report = export_onnx(network(), tmp_path / "x.onnx", card=CARD, images=images(5))
    assert report.path == tmp_path / "x.onnx"
    assert report.bytes == report.path.stat().st_size
    assert 0 <= report.max_error < 1e-4
    assert report.argmax_agreement == 1


def test_names_and_metadata(exported: Path) -> None:
    graph = onnx.load(exported).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "scores"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert read_metadata(exported) == {
        "version": __version__,
        "space": "exported",
        "architecture": list(ARCHITECTURE.blocks),
        "preprocessing": {
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "resolution": 12,
            "channels": 3,
        },
        "class_names": ["ant", "bee", "wäsp"],
    }


def test_without_a_card_there_are_no_metadata(tmp_path: Path) -> None:
    export_onnx(network(), tmp_path / "x.onnx", input_shape=(3, 12, 12))
    assert read_metadata(tmp_path / "x.onnx") == {}
    with pytest.raises(InputError, match="neither card nor input_shape"):
        export_onnx(nn.Sequential(nn.Flatten()), tmp_path / "y.onnx")


class DependsOnTraining(nn.Module):
    """Traced with zeros, it takes the wrong branch for real images."""

    def forward(self, images: Tensor) -> Tensor:
        scores = images.mean((2, 3))
        return scores if images.abs().sum() == 0 else scores + 1


def test_disagreement_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"the former file")
    with pytest.raises(RuntimeError, match=r"x\.onnx was not written: its scores differ"):
        export_onnx(DependsOnTraining(), path, input_shape=(3, 12, 12))
    assert path.read_bytes() == b"the former file"
    assert list(tmp_path.iterdir()) == [path]


def test_scores_that_are_not_numbers_are_no_agreement(tmp_path: Path) -> None:
    broken = network()
    nn.init.constant_(broken.classifier.linear.weight, float("nan"))
    with pytest.raises(RuntimeError, match="differ from torch's by nan"):
        export_onnx(broken, tmp_path / "x.onnx", card=CARD)


def pictures(count: int = 50) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.randint(0, 3, (count,), generator=generator))


@pytest.mark.parametrize("batch_size", [1, 16, 256])
def test_accuracy_is_that_of_torch(exported: Path, batch_size: int) -> None:
    with torch.no_grad():
        correct = sum(
            int((network()(inputs).argmax(1) == labels).sum())
            for inputs, labels in batches(pictures(), 50, mean=CARD.mean, std=CARD.std)
        )
    assert 0 < correct < 50
    found = accuracy_of_file(
        exported, pictures(), mean=CARD.mean, std=CARD.std, batch_size=batch_size, threads=1
    )
    assert found == correct / 50


def test_accuracy_of_a_file_with_a_fixed_batch_is_the_same(exported: Path, tmp_path: Path) -> None:
    from fbnas.latency.lowering import write_onnx

    write_onnx(network(), (3, 12, 12), tmp_path / "fixed.onnx", batch=4)
    found, expected = (
        accuracy_of_file(path, pictures(), mean=CARD.mean, std=CARD.std)
        for path in (tmp_path / "fixed.onnx", exported)
    )
    assert found == expected


def test_damaged_and_missing_files_are_refused_in_one_line(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    path = tmp_path / "x.onnx"
    for content in (b"", b"weights: none\n", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        for read in (read_metadata, lambda p: accuracy_of_file(p, pictures(), mean=[0], std=[1])):
            with pytest.raises(InputError, match=r"x\.onnx: not a whole ONNX file") as refused:
                read(path)
            assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"none\.onnx: no such file"):
        read_metadata(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="no such file"):
        read_metadata(tmp_path)


def test_edited_metadata_are_refused(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    helper.set_model_props(model, {"fbnas.architecture": "k3_e1 k3_e3"})
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(InputError, match="its metadata are edited"):
        read_metadata(tmp_path / "x.onnx")


def foreign(path: Path, shapes: list[list], output: list) -> Path:
    """Write a valid ONNX file that is not of fbnas: the first input, passed on or summed up."""
    inputs = [
        helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, shape)
        for i, shape in enumerate(shapes)
    ]
    node = helper.make_node("ReduceMean", ["in0"], ["out"], axes=[2, 3], keepdims=0)
    value = helper.make_tensor_value_info("out", TensorProto.FLOAT, output)
    graph = helper.make_graph([node], "foreign", inputs, [value])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def test_a_foreign_file_that_fits_is_judged(tmp_path: Path) -> None:
    path = foreign(tmp_path / "x.onnx", [["n", 3, "h", "w"]], ["n", 3])
    expected = pictures().pixels.float().mean((2, 3)).argmax(1) == pictures().labels
    found = accuracy_of_file(path, pictures(), mean=[0, 0, 0], std=[1, 1, 1])
    assert found == pytest.approx(float(expected.float().mean()))
    assert read_metadata(path) == {}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([["n", 3, 32, 32]], r"\(n, 3, 12, 12\) float: expected a file and data of one shape"),
        ([["n", 3, 12, 12], ["n", 3]], "takes in0 .* in1 "),
    ],
)
def test_a_file_for_other_images_is_refused(tmp_path: Path, shapes: list, words: str) -> None:
    path = foreign(tmp_path / "x.onnx", shapes, ["n", 3])
    with pytest.raises(InputError, match=words):
        accuracy_of_file(path, pictures(), mean=[0, 0, 0], std=[1, 1, 1])


def test_a_file_with_too_few_classes_or_no_images_is_refused(exported: Path) -> None:
    many = TensorImages(pictures().pixels, torch.full((50,), 7))
    with pytest.raises(InputError, match="the data has label 7"):
        accuracy_of_file(exported, many, mean=CARD.mean, std=CARD.std)
    none = TensorImages(pictures().pixels[:0], pictures().labels[:0])
    with pytest.raises(InputError, match="no images to judge"):
        accuracy_of_file(exported, none, mean=CARD.mean, std=CARD.std)


def test_metadata_are_plain_json_for_other_readers(exported: Path) -> None:
    stored = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert json.loads(stored["fbnas.class_names"]) == ["ant", "bee", "wäsp"]
