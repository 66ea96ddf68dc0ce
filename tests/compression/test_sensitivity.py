"""What int8 of each layer does, and the fewest layers in float that mend it."""

import itertools
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from digits_network import Trained

from fbnas.compression import StaticQuantization, quantize_file, sensitivity
from fbnas.compression.sensitivity import fewest_float, sensitivity_of
from fbnas.errors import InputError
from fbnas.export import accuracy_of_file, export_onnx, scores_of_file
from fbnas.latency.lowering import layer_names
from fbnas.training.data import Images

LAYERS = tuple("abcdefgh")


@pytest.mark.parametrize("seed", range(20))
def test_the_fewest_layers_are_those_of_all_sets(seed: int) -> None:
    damage = dict(zip(LAYERS, np.random.default_rng(seed).exponential(1.0, 8), strict=True))
    allowed = 0.4 * sum(damage.values())

    def accurate(float_layers: Collection[str]) -> bool:
        return sum(ms for name, ms in damage.items() if name not in set(float_layers)) <= allowed

    misled = sorted(LAYERS, key=lambda name: -damage[name] * (1 + 0.3 * ord(name) % 2))
    for order in (sorted(LAYERS, key=lambda name: -damage[name]), misled):
        found = fewest_float(order, accurate)
        assert accurate(found)
        smaller = itertools.combinations(LAYERS, max(len(found) - 1, 0))
        assert len(found) == 0 or not any(accurate(layers) for layers in smaller)


def test_layers_that_only_help_together_are_found() -> None:
    found = fewest_float(LAYERS, lambda layers: {"b", "g"} <= set(layers))
    assert set(found) == {"b", "g"}


def test_nothing_is_left_in_float_without_need() -> None:
    asked: list[Collection[str]] = []
    assert fewest_float(LAYERS, lambda layers: asked.append(layers) or True) == ()
    assert asked == [()]


def test_one_layer_that_does_it_is_found_wherever_it_stands_in_the_order() -> None:
    for needed in LAYERS:
        assert fewest_float(LAYERS, lambda layers, x=needed: x in set(layers)) == (needed,)


def test_the_numbers_are_those_of_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50, 5, generator=generator)
    scores = reference + 0.1 * torch.randn(50, 5, generator=generator)
    labels = torch.randint(5, (50,), generator=generator)
    found = sensitivity_of("x", scores.numpy(), reference.numpy(), labels.numpy())
    noise = ((scores - reference) ** 2).sum()
    assert found.sqnr_db == pytest.approx(10 * float(torch.log10((reference**2).sum() / noise)))
    loss = torch.nn.functional.cross_entropy
    assert found.cross_entropy_rise == pytest.approx(
        float(loss(scores, labels) - loss(reference, labels)), abs=1e-6
    )
    hits = (reference.argmax(1) == labels).double() - (scores.argmax(1) == labels).double()
    assert found.accuracy_drop == pytest.approx(float(hits.mean()))
    same = sensitivity_of("x", reference.numpy(), reference.numpy(), labels.numpy())
    assert same.sqnr_db == pytest.approx(120)


@pytest.fixture(scope="module")
def fragile(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file that int8 per tensor breaks at one layer: it has huge weights for what is always 0."""
    path = tmp_path_factory.mktemp("fragile") / "fp32.onnx"
    export_onnx(trained.network, path, card=trained.card)
    model = onnx.load(path)
    nodes = {node.name: node for node in model.graph.node}
    stored = {weight.name: weight for weight in model.graph.initializer}
    before = next(name for name in nodes if name.startswith("/head/") and name.endswith("Conv"))
    victim = next(name for name in nodes if name.endswith("Gemm"))

    def change(name: str, where: tuple[slice | int, ...], value: float) -> None:
        array = onnx.numpy_helper.to_array(stored[name]).copy()
        array[where] = value
        stored[name].CopyFrom(onnx.numpy_helper.from_array(array, name))

    change(nodes[before].input[1], (5,), 0.0)
    change(nodes[before].input[2], (5,), -1.0)
    change(nodes[victim].input[1], (slice(None), 5), 1e4)
    onnx.save(model, path)
    return path, victim


def scores_with(trained: Trained):  # type: ignore[no-untyped-def]
    return partial(scores_of_file, mean=trained.data.mean, std=trained.data.std, threads=1)


PER_TENSOR = {"per_channel": False, "calibration_images": 64, "pays": False}


def test_the_layer_that_int8_breaks_is_the_most_sensitive_and_alone_stays_float(
    fragile: tuple[Path, str], trained: Trained, tmp_path: Path
) -> None:
    path, victim = fragile
    data, scores = trained.data, scores_with(trained)
    method = StaticQuantization(**PER_TENSOR, max_accuracy_drop=0.01)
    report = quantize_file(path, tmp_path / "int8.onnx", data, method, scores=scores)
    assert report.accurate_layers == report.float_layers == (victim,)
    assert [x.layer for x in report.sensitivities] == list(layer_names(onnx.load(path).graph))
    worst = min(report.sensitivities, key=lambda x: x.sqnr_db)
    assert worst.layer == victim
    assert worst.cross_entropy_rise > 0.1

    def judge(file: Path) -> float:
        return accuracy_of_file(file, data.validation, mean=data.mean, std=data.std)

    quantize_file(path, tmp_path / "plain.onnx", data, StaticQuantization(**PER_TENSOR))
    assert judge(tmp_path / "int8.onnx") >= judge(path) - 0.01 > judge(tmp_path / "plain.onnx")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["int8.onnx", "plain.onnx"]


def test_the_table_looks_at_validation_images_alone(
    fragile: tuple[Path, str], trained: Trained, tmp_path: Path
) -> None:
    seen: list[int] = []

    def scores(path: Path, images: Images) -> torch.Tensor:
        seen.append(len(images))
        return scores_with(trained)(path, images)

    method = StaticQuantization(**PER_TENSOR, sensitivity_images=50)
    found = sensitivity(fragile[0], trained.data, method, scores=scores, folder=tmp_path)
    assert seen == [50] * (len(found) + 1)
    assert min(found, key=lambda x: x.sqnr_db).layer == fragile[1]
    assert not list(tmp_path.iterdir())


def test_a_budget_without_scores_is_refused(
    fragile: tuple[Path, str], trained: Trained, tmp_path: Path
) -> None:
    method = StaticQuantization(max_accuracy_drop=0.01, calibration_images=8)
    with pytest.raises(InputError, match="expected scores="):
        quantize_file(fragile[0], tmp_path / "int8.onnx", trained.data, method)
    with pytest.raises(InputError, match="max_accuracy_drop is 2; expected 0 to 1"):
        StaticQuantization(max_accuracy_drop=2)
