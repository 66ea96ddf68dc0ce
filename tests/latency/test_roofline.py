"""A planned device: latency and energy by hand, the same interface as one that measures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.files import read_yaml
from fbnas.latency.devices import device_from
from fbnas.latency.graph_cost import GraphCost, Operator, module_cost
from fbnas.latency.roofline import Roofline
from fbnas.latency.timing import Timing

CONFIG = Path(__file__).parents[2] / "configs" / "device" / "roofline.yaml"
SHAPE = (3, 8, 8)
CHIP = Roofline(
    gmacs_per_s=1.0,
    gmacs_per_s_int8=4.0,
    bandwidth_gb_per_s=0.5,
    overhead_us=2.0,
    pj_per_mac=3.0,
    pj_per_mac_int8=0.5,
    pj_per_dram_access=640.0,
)


def cost_of(*operators: tuple[int, int]) -> GraphCost:
    steps = tuple(Operator("", "Conv", macs, moved) for macs, moved in operators)
    return GraphCost(steps, params=0, weight_bytes=0, peak_bytes=0)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(*layers)


def compiled(folder: Path, device: Roofline = CHIP) -> list[Path]:
    """Files of two models, the first the larger."""
    files = [folder / "large.onnx", folder / "small.onnx"]
    for module, path in zip((network(), nn.Conv2d(3, 4, 1)), files, strict=True):
        device.compile(module, SHAPE, path)
    return files


def test_an_operator_takes_the_longer_of_arithmetic_and_memory_and_an_overhead() -> None:
    arithmetic, memory = (5000, 1000), (1000, 4000)  # 5 against 2 us, 1 against 8 us
    assert CHIP.latency_ms(cost_of(arithmetic)) == pytest.approx(0.005 + 0.002)
    assert CHIP.latency_ms(cost_of(memory)) == pytest.approx(0.008 + 0.002)
    assert CHIP.latency_ms(cost_of(arithmetic, memory)) == pytest.approx(0.007 + 0.010)
    assert CHIP.latency_ms(cost_of()) == 0.0


def test_twice_the_chip_takes_half_the_time() -> None:
    cost = module_cost(network(), SHAPE)
    twice = replace(CHIP, gmacs_per_s=2.0, bandwidth_gb_per_s=1.0, overhead_us=1.0)
    assert twice.latency_ms(cost) == pytest.approx(CHIP.latency_ms(cost) / 2)


def test_energy_by_hand() -> None:
    # 6000 multiply-adds of 3 pJ and 5000 bytes, which are 1250 accesses of 640 pJ.
    assert CHIP.energy_mj(cost_of((5000, 1000), (1000, 4000))) == pytest.approx(818000e-9)
    # A network of 1e9 connections at 20 images per second: 12.8 W for DRAM alone.
    assert 20 * Roofline().energy_mj(cost_of((0, 4 * 10**9))) == pytest.approx(12.8e3)


def test_int8_has_numbers_of_its_own(tmp_path: Path) -> None:
    conv, device = nn.Conv2d(3, 4, 1, bias=False), replace(CHIP, precision="int8")
    macs, moved = 4 * 64 * 3, 192 + 12 + 256
    cost = module_cost(conv, SHAPE, "int8")
    assert device.latency_ms(cost) == pytest.approx(max(macs / 4e9, moved / 0.5e9) * 1e3 + 0.002)
    bound = replace(device, bandwidth_gb_per_s=1000.0)  # by arithmetic
    assert bound.latency_ms(cost) == pytest.approx(macs / 4e9 * 1e3 + 0.002)
    assert device.energy_mj(cost) == pytest.approx((macs * 0.5 + moved / 4 * 640) * 1e-9)
    device.compile(conv, SHAPE, tmp_path / "conv.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "conv.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} < kinds
    (timing,) = device.measure([tmp_path / "conv.onnx"]).whole
    assert timing.latency_ms == device.latency_ms(cost)


def test_a_measurement_is_exact_and_always_the_same(tmp_path: Path) -> None:
    files, advanced = compiled(tmp_path), []
    found = CHIP.measure(files, rounds=7, progress=advanced.append)
    large, small = (CHIP.latency_ms(module_cost(m, SHAPE)) for m in (network(), nn.Conv2d(3, 4, 1)))
    assert found.timings == (Timing(large, large, large, 1), Timing(small, small, small, 1))
    assert large > small > 0
    assert (found.noise_floor, found.drift, found.unstable, found.failures) == (0.0, 0.0, 0, {})
    assert found.quiet
    np.testing.assert_array_equal(found.samples_ms, [[large, small]])
    assert sum(advanced) == 7
    assert CHIP.measure(files, rounds=2, seed=5, work=tmp_path).timings == found.timings
    assert CHIP.measure_quietly(files, "Measuring", rounds=3, seed=9).timings == found.timings
    assert CHIP.measure(files[::-1]).timings == found.timings[::-1]


def test_files_that_cannot_be_read_are_refused_or_named(tmp_path: Path) -> None:
    large, small = compiled(tmp_path)
    missing, damaged = tmp_path / "missing.onnx", tmp_path / "damaged.onnx"
    damaged.write_bytes(large.read_bytes()[:500])
    for path, words in ((missing, "no such model file"), (damaged, "not a whole ONNX file")):
        with pytest.raises(InputError, match=f"{path.name}: {words}"):
            CHIP.measure([large, path])
    found = CHIP.measure([missing, large, damaged, small], keep_failures=True)
    assert [timing is None for timing in found.timings] == [True, False, True, False]
    assert sorted(found.failures) == [0, 2]
    assert "missing.onnx: no such model file" in found.failures[0]
    assert np.isnan(found.samples_ms).tolist() == [[True, False, True, False]]
    assert found.timings[1::2] == CHIP.measure([large, small]).timings
    with pytest.raises(InputError, match="not a whole ONNX file"):
        CHIP.measure([missing, damaged], keep_failures=True)


def test_scores_are_those_of_the_network(tmp_path: Path) -> None:
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    CHIP.compile(network(), SHAPE, tmp_path / "net.onnx")
    found = CHIP.scores(tmp_path / "net.onnx", images.numpy(), batch=2)
    with torch.no_grad():
        expected = network().eval()(images).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_table_says_what_it_was_computed_from() -> None:
    found = CHIP.fingerprint()
    assert all(isinstance(value, str) for value in found.values())
    expected = {"device": "planned", "machine": "planned", "cpu": "planned", "os": "none"}
    expected |= {"runtime": "roofline", "precision": "fp32", "cores": "1", "threads": "1"}
    expected |= {"bandwidth_gb_per_s": "0.5", "pj_per_dram_access": "640", "provider": ""}
    assert found.items() >= expected.items()
    assert CHIP.fingerprint() == found
    version = found["runtime_version"]
    assert replace(CHIP, name="other").fingerprint()["runtime_version"] == version
    for key in ("gmacs_per_s", "gmacs_per_s_int8", "bandwidth_gb_per_s", "overhead_us"):
        assert replace(CHIP, **{key: 3.5}).fingerprint()["runtime_version"] != version
    for key in ("pj_per_mac", "pj_per_mac_int8", "pj_per_dram_access"):
        assert replace(CHIP, **{key: 3.5}).fingerprint()["runtime_version"] != version


def test_the_config_states_the_defaults() -> None:
    values = read_yaml(CONFIG)
    assert next(iter(values)) == "kind"
    assert device_from(values) == Roofline.from_dict(values) == Roofline()
    assert {"kind", *Roofline.__dataclass_fields__} == set(values)
    device = device_from({**values, "precision": "int8", "gmacs_per_s_int8": 100})
    assert device == Roofline(precision="int8", gmacs_per_s_int8=100)
    assert (device.kind, device.runtime, device.suffix) == ("roofline", "roofline", ".onnx")
    assert (device.provider, device.threads) == ("", 1)


@pytest.mark.parametrize("value", [-1, "fast", None, True, float("nan"), float("inf")])
def test_numbers_that_no_data_sheet_has_are_refused(value: Any) -> None:
    words = r"device\.gmacs_per_s is .*; expected a number above 0: it stands on the data sheet"
    with pytest.raises(InputError, match=words) as refused:
        Roofline.from_dict({"kind": "roofline", "gmacs_per_s": value})
    assert "\n" not in str(refused.value)


def test_rates_are_above_zero_and_costs_may_be_zero() -> None:
    for key in ("gmacs_per_s", "gmacs_per_s_int8", "bandwidth_gb_per_s"):
        with pytest.raises(InputError, match=rf"device\.{key} is 0; expected a number above 0"):
            Roofline.from_dict({key: 0})
    for key in ("overhead_us", "pj_per_mac", "pj_per_mac_int8", "pj_per_dram_access"):
        assert getattr(Roofline.from_dict({key: 0}), key) == 0
        with pytest.raises(InputError, match=rf"device\.{key} is -1; .* of at least 0"):
            Roofline.from_dict({key: -1})


def test_what_makes_no_device_is_refused() -> None:
    with pytest.raises(InputError, match="Unknown device option 'gmac_per_s'. Did you mean 'gmacs"):
        Roofline.from_dict({"kind": "roofline", "gmac_per_s": 1.0})
    with pytest.raises(InputError, match="Unknown precision 'int4'"):
        Roofline.from_dict({"precision": "int4"})
    with pytest.raises(InputError, match=r"device\.name is ''; expected a name"):
        Roofline.from_dict({"name": ""})
