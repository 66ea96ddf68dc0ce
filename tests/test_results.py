"""The families of scripts/results have their published sizes, train, and become int8 files."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fbnas.compression import calibration_images
from fbnas.export import accuracy_of_file, export_file
from fbnas.latency import Device
from fbnas.space import Architecture, NetworkCard, SearchSpace, count
from fbnas.training import TrainingSettings, load_data, train

HERE = Path(__file__).parents[1] / "scripts" / "results"

# Width, all parameters, 1e6 multiply-adds at 224 and 1000 classes. Parameters: torchvision's and
# timm's own; MobileNetV1: Howard et al. 2017, tables 6 and 8 (in millions). Multiply-adds: the papers.
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
# Google's 407 counts more than convolutions: EfficientNet-B0's 390 has the same ones, and 385 are here.
MACS_TOLERANCE = {"EfficientNet-Lite": 0.06}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"results_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILIES = script("networks").FAMILIES


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
