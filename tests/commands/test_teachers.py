"""Teachers, and training for int8, through the real commands."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny_run import SPACE, write_space, write_table

from fbnas.commands import main
from fbnas.commands.teachers import Sources, largest_architecture, teacher_of
from fbnas.errors import InputError
from fbnas.space import Architecture, SearchSpace, load_network
from fbnas.training import Data, Ensemble, load_data

DATA = ["data=digits", "data.limit=320"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search, and a network trained without a teacher."""
    root = tmp_path_factory.mktemp("teachers")
    space, table = write_space(root), root / "table.csv"
    write_table(table)
    common = [f"space={space}", *DATA]
    searching = [f"table={table}", "target_ms=8", "search.epochs=2", f"out={root / 'search'}"]
    assert main(["search", *common, *searching]) == 0
    Architecture(("k3_e3", "k5_e1", "k3_e1"), "tiny").save(root / "search" / "a.yaml")
    assert train(root, "plain") == 0
    return root


def train(root: Path, out: str, *options: str) -> int:
    architecture = f"architecture={root / 'search' / 'a.yaml'}"
    where = [f"space={root / 'tiny.yaml'}", f"out={root / out}"]
    return main(["train", architecture, "training.epochs=2", *where, *DATA, *options])


def weights(folder: Path) -> torch.Tensor:
    return load_network(folder)[0].classifier[2].weight


@pytest.fixture
def digits() -> Data:
    return load_data("digits", resolution=8, limit=320)


@pytest.mark.parametrize("given", ["supernet", "[{root}/plain,{root}/search]"])
def test_train_learns_from_a_teacher(stand: Path, given: str) -> None:
    teacher = f"teacher={given.format(root=stand)}"
    assert train(stand, "taught", teacher, "overwrite=true") == 0
    assert not torch.equal(weights(stand / "taught"), weights(stand / "plain"))


def test_a_teacher_without_weight_changes_nothing(stand: Path) -> None:
    options = [f"teacher={stand / 'plain'}", "training.distillation.alpha=0"]
    assert train(stand, "untaught", *options) == 0
    assert torch.equal(weights(stand / "untaught"), weights(stand / "plain"))


def test_words_and_folders_stand_for_networks(stand: Path, digits: Data) -> None:
    space = SearchSpace.from_dict(dict(SPACE))
    assert largest_architecture(space).blocks == ("k3_e3",) * 3
    sources = Sources(stand / "search", load_network(stand / "plain")[0])
    largest = teacher_of("supernet", digits, sources)
    assert largest is not None
    same = teacher_of(str(stand / "search"), digits, Sources())
    assert same is not None
    for ours, theirs in zip(largest.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    given = teacher_of("uncompressed", digits, sources)
    assert given is not sources.uncompressed
    both = teacher_of(["supernet", str(stand / "plain")], digits, sources)
    assert isinstance(both, Ensemble) and len(both.members) == 2
    with pytest.raises(InputError, match="stands for nothing here"):
        teacher_of("uncompressed", digits, Sources())


def test_a_teacher_sees_images_as_it_was_trained(stand: Path, digits: Data) -> None:
    """Of data with another mean and std its answers are those to its own normalisation."""
    from dataclasses import replace

    network, card = load_network(stand / "plain")
    other = replace(digits, mean=(0.1,), std=(0.7,))
    teacher = teacher_of(str(stand / "plain"), other, Sources())
    assert teacher is not None
    pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (card.mean, card.std))
    with torch.no_grad():
        expected, found = network((pixels - mean) / std), teacher((pixels - 0.1) / 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def compress(root: Path, out: str, *options: str, model: str = "plain") -> int:
    where = [f"model={root / model}", f"out={root / out}", "measure=false"]
    return main(["compress", *where, *DATA, "compression.fine_tuning.epochs=1", *options])


def test_fine_tuning_learns_from_the_uncompressed_network(stand: Path) -> None:
    for out, teacher in (("alone", "null"), ("taught_small", "uncompressed")):
        options = ["method=channel_pruning", "compression.pruning.round_to=2"]
        assert compress(stand, out, *options, f"compression.fine_tuning.teacher={teacher}") == 0
    assert not torch.equal(weights(stand / "alone"), weights(stand / "taught_small"))


@pytest.mark.parametrize("method", ["qat", "[channel_pruning,qat,int8]"])
def test_qat_ends_in_an_int8_file(stand: Path, method: str) -> None:
    out = stand / f"rounded{len(method)}"
    bits = "compression.qat.weight_bits=4"
    assert compress(stand, out.name, f"method={method}", bits) == 0
    result, form = read(out / "result.json"), read(out / "quantization.json")
    assert (result["weight_bits"], result["quantization"]) == (4, form["method"])
    kept = max(result["validation_accuracy_ptq"], result["validation_accuracy_qat"])
    assert kept == result[f"validation_accuracy_{form['method']}"]
    model = out / "model.onnx"
    assert result["model_bytes"] == model.stat().st_size
    operators = [node.op_type for node in onnx.load(model).graph.node]
    assert operators.count("QuantizeLinear") > 5

    again = stand / f"again{len(method)}"
    assert compress(stand, again.name, "method=int8", model=out.name) == 0
    assert (again / "model.onnx").read_bytes() == model.read_bytes()
    exported = stand / f"exported{len(method)}"
    assert main(["export", f"model={out}", "precision=int8", f"out={exported}"]) == 0
    assert (exported / "model.onnx").read_bytes() == model.read_bytes()
    assert main(["evaluate", f"model={model}", *DATA, f"out={exported}2", "rounds=2"]) == 0
    assert read(Path(f"{exported}2") / "result.json")["accuracy_top1"] == result["accuracy_top1"]


def test_what_comes_after_qat_makes_its_ranges_void(stand: Path) -> None:
    assert compress(stand, "void", "method=[qat,channel_pruning]") == 0
    assert not (stand / "void" / "quantization.json").exists()
    assert "model_bytes" not in read(stand / "void" / "result.json")


def test_a_run_takes_qat_as_a_stage_and_teachers_for_all(stand: Path) -> None:
    options = ["compression.methods=[channel_pruning,qat,int8]", "teacher=supernet"]
    options += ["compression.fine_tuning.teacher=uncompressed", "max_accuracy_drop=1"]
    small = ["search.epochs=2", "training.epochs=1", "compression.fine_tuning.epochs=1"]
    table = [f"table={stand / 'table.csv'}", "target_ms=8", "networks=0", "candidates=2"]
    space = f"space={stand / 'tiny.yaml'}"
    shutil.rmtree(stand / "run", ignore_errors=True)
    assert main(["run", space, *DATA, *small, *table, *options, f"out={stand / 'run'}"]) in (0, 3)
    stages = {stage["name"]: stage for stage in read(stand / "run" / "result.json")["stages"]}
    assert list(stages)[:3] == ["fp32", "pruned", "qat"]
    graph = onnx.load(stand / "run" / stages["qat"]["file"]).graph
    assert "QuantizeLinear" in {node.op_type for node in graph.node}
    assert ("int8" in stages) != stages["qat"]["accepted"]  # its file is int8 already
    assert [stages[name]["precision"] for name in list(stages)[:3]] == ["fp32", "fp32", "int8"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1
        return shown.err

    return run


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train teacher=nowhere", "teacher=nowhere: no such folder; expected that of a trained"),
        ("train teacher=[]", "teacher=[]; expected null for none"),
        ("train training.distillation.alpha=2", "distillation.alpha is 2"),
        ("train training.distillation.layers=head", "expected a list, as in [a, b]"),
        ("compress compression.fine_tuning.teacher=nowhere", "no such folder; expected that"),
        ("compress compression.qat.weight_bits=9", "weight_bits is 9; expected a whole number"),
        ("compress compression.qat.momentun=0", "'compression.qat.momentum'"),
    ],
    ids=lambda value: value,
)
def test_what_makes_no_sense_is_refused(
    stand: Path, tmp_path: Path, refused: Callable[..., str], line: str, words: str
) -> None:
    command, option = line.split()
    given = {
        "train": [f"architecture={stand / 'search' / 'a.yaml'}", f"space={stand / 'tiny.yaml'}"],
        "compress": [f"model={stand / 'plain'}"],
    }[command]
    assert words in refused(command, option, *given, *DATA, f"out={tmp_path / 'out'}")
