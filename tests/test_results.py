"""scripts/results: the families have their published sizes; the page says who won."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

from fbnas.compression import calibration_images
from fbnas.export import accuracy_of_file, export_file
from fbnas.latency import Device
from fbnas.space import Architecture, NetworkCard, SearchSpace, count
from fbnas.training import TrainingSettings, load_data, train

HERE = Path(__file__).parents[1] / "scripts" / "results"

# Width, all parameters, 1e6 multiply-adds at 224 and 1000 classes. Parameters: as torchvision and
# timm count them; MobileNetV1: Howard et al. 2017, tables 6 and 8. Multiply-adds: the papers.
PUBLISHED = (
    ("MobileNetV1", 1.0, 4.2e6, 569),
    ("MobileNetV1", 0.75, 2.6e6, 325),
    ("MobileNetV1", 0.5, 1.3e6, 149),
    ("MobileNetV1", 0.25, 0.5e6, 41),
    ("MobileNetV2", 1.0, 3_504_872, 300),
    ("MobileNetV2", 0.5, 1_968_680, 97),
    ("ShuffleNetV2", 0.5, 1_366_792, 41),
    ("ShuffleNetV2", 1.0, 2_278_604, 146),
    ("ShuffleNetV2", 1.5, 3_503_624, 299),
    ("ShuffleNetV2", 2.0, 7_393_996, 591),
    ("EfficientNet-Lite", 1.0, 4_652_008, 407),
)
# Google's 407 counts more than these layers: EfficientNet-B0 has the same ones and 390.
MACS_TOLERANCE = {"EfficientNet-Lite": 0.06}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"results_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILIES, COMPARE = script("networks").FAMILIES, script("compare")


@pytest.mark.parametrize(("family", "width", "params", "macs"), PUBLISHED)
def test_a_family_has_its_published_size(
    family: str, width: float, params: float, macs: float
) -> None:
    with torch.device("meta"):
        network = FAMILIES[family](width, 224, 1000)
        found = count(network, (3, 224, 224))
    own = sum(p.numel() for p in network.parameters())
    digit = 0.05e6 if params < 4.3e6 and params % 1e5 == 0 else 0  # of what is stated in millions
    assert abs(own - params) <= digit
    assert found.macs == pytest.approx(1e6 * macs, rel=MACS_TOLERANCE.get(family, 0.015))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("resolution", "last"), [(16, 4), (32, 4), (64, 4), (224, 7)])
def test_first_strides_are_dropped_for_small_images(
    family: str, resolution: int, last: int
) -> None:
    features = FAMILIES[family](0.25, resolution, 10)[:-3].eval()
    with torch.no_grad():
        assert features(torch.zeros(1, 3, resolution, resolution)).shape[2:] == (last, last)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_its_int8_file_answers(family: str, tmp_path: Path) -> None:
    space = SearchSpace.load(HERE.parent / "cross_device" / "space.yaml")
    data = load_data("digits", channels=3, resize=True, space=space, limit=128)
    settings = TrainingSettings(epochs=1, batch_size=32, device="cpu")
    found = train(FAMILIES[family](0.1, space.resolution, data.classes), data, settings=settings)
    device, path = Device(precision="int8"), tmp_path / "network.onnx"
    card = NetworkCard(space, Architecture((family,)), data.class_names, data.mean, data.std)
    export_file(found.network, path, device, card=card, calibration=calibration_images(data))
    right = accuracy_of_file(path, data.test, mean=data.mean, std=data.std, threads=1)
    assert 0 <= right <= 1


def made_result(own: tuple[float, float], random: float) -> pd.DataFrame:
    """Two seeds, one budget of 1 ms; `own`: the searched networks' accuracy by seed."""
    common = {"noise_floor": 0.01, "params": 1e5, "macs": 1e6, "fp32_accuracy": 0.5, "blocks": "x"}
    common["seconds"] = 900.0
    rows = []
    for seed, accuracy in enumerate(own):
        budget = {"fraction": 0.3, "budget_ms": 1.0}
        rows += [
            {"kind": "searched", "name": "searched 0.3", "ms": 1.0, "accuracy": accuracy, **budget},
            {"kind": "random", "name": "random 0.3 0", "ms": 0.98, "accuracy": random, **budget},
            {"kind": "uniform", "name": "k3_e1", "ms": 0.5, "accuracy": 0.40},
            {"kind": "uniform", "name": "k3_e3", "ms": 1.02, "accuracy": 0.45},
            {"kind": "uniform", "name": "k3_e6", "ms": 2.0, "accuracy": 0.99},
            {"kind": "family", "name": "MobileNetV1 0.1", "ms": 0.5, "accuracy": 0.3},
            {"kind": "family", "name": "MobileNetV1 0.2", "ms": 1.5, "accuracy": 0.5},
            {"kind": "family", "name": "MobileNetV2 0.1", "ms": 1.5, "accuracy": 0.9},
        ]
        for row in rows[-8:]:
            row |= {"seed": seed, "measured_ms": row.pop("ms"), **common}
    return pd.DataFrame(rows)


def test_others_are_taken_at_the_searched_network_s_latency() -> None:
    (found,) = COMPARE.compared(made_result((0.6, 0.6), random=0.5))
    assert found.uniform_name == "k3_e3"  # k3_e6 is better, and too slow
    assert found.frontier.tolist() == pytest.approx([0.4, 0.4])  # MobileNetV2 has none as fast
    assert found.random_off == pytest.approx((-0.02, -0.02))


@pytest.mark.parametrize(
    ("own", "random", "said"),
    [
        ((0.60, 0.62), 0.50, "better"),
        ((0.40, 0.42), 0.50, "worse"),
        ((0.45, 0.56), 0.50, "not told apart"),
    ],
)
def test_the_verdict_says_who_won(own: tuple[float, float], random: float, said: str) -> None:
    everything = COMPARE.compared(made_result(own, random))
    line = COMPARE.verdicts(everything)[0]
    assert f"Against random networks: {said} at 1 of 1 budgets" in line
    assert ("search lost" in line) == (said == "worse")


def test_a_seed_without_families_is_compared_with_the_others() -> None:
    result = made_result((0.6, 0.7), random=0.5)
    some = result[(result.kind != "family") | (result.seed == 0)]
    (found,) = COMPARE.compared(some)
    assert found.frontier.dropna().tolist() == pytest.approx([0.4])
    assert "one seed, no spread to judge by" in COMPARE.verdicts([found])[2]
    (none,) = COMPARE.compared(result[result.kind != "family"])
    assert "nothing to compare" in COMPARE.verdicts([none])[2]
    assert COMPARE.compared(result[result.kind != "searched"]) == []


def test_a_part_of_the_families_of_a_seed_is_not_compared_with() -> None:
    networks = made_result((0.6, 0.7), random=0.5)
    result = networks[(networks.name != "MobileNetV2 0.1") | (networks.seed == 0)]
    kept = COMPARE.without_incomplete_families(networks, result)
    assert set(kept[kept.kind == "family"].seed) == {0}
    assert len(kept) == len(networks) - 3
    assert COMPARE.without_incomplete_families(networks, networks).equals(networks)
    (line,) = COMPARE.absent(networks, kept)[1:]
    assert line == "**Not trained or not measured yet: 3 of kind family (seeds 1).**"


def test_the_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra studies is not installed")
    monkeypatch.syspath_prepend(HERE)
    parts = {"step": ["search", "search", "train"], "part": ["0/2", "1/2", "0/1"]}
    seconds = pd.DataFrame({**parts, "seconds": [3600.0, 1800.0, 5.0]})
    script("page").write_page(made_result((0.6, 0.7), 0.5), seconds, ["About."], tmp_path)
    page = (tmp_path / "result.md").read_text()
    assert "| search | 1.50 |" in page
    assert "| train | 4.00 |" in page  # of the 16 networks; what was stopped left no hours
    assert "| +15.00 ± 7.07 |" in page  # against random ones
    assert capsys.readouterr().out.strip() == page.strip()
    assert len(pd.read_csv(tmp_path / "result.csv")) == 16
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("latency_ms", "places"),
    [
        ((0.1, 0.3, 0.9, 1.0, 2.9, 3.5), (1, 3, 5)),
        ((1.2, 1.3, 5.0, 6.0), (0, 1, 2)),  # none is below the smallest budget
        ((0.1, 0.2, 0.3, 0.4), (1, 2, 3)),  # none is above the smallest
    ],
)
def test_widths_bracket_the_budgets(
    latency_ms: tuple[float, ...], places: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra studies is not installed")
    monkeypatch.syspath_prepend(HERE)
    measure = script("measure")
    widths = [measure.Contender("family", str(i)) for i in range(len(latency_ms))]
    chosen = measure.bracket(widths, latency_ms, [0.5, 1.1, 3.0])
    assert tuple(int(one.name) for one in chosen) == places
