"""A stem that sees the image's low- and high-frequency halves."""

from pathlib import Path

import pytest
import torch

from fbnas.compression import ChannelPruning, compress_
from fbnas.export import export_onnx
from fbnas.files import write_yaml
from fbnas.latency.devices import device_from
from fbnas.latency.profiling import profile
from fbnas.search import Supernet
from fbnas.space import (
    Architecture,
    NetworkCard,
    SearchSpace,
    build_network,
    load_network,
    save_network,
)
from fbnas.space.blocks import WaveletSplit

CONTENT = {
    "name": "halves",
    "resolution": 16,
    "stem": {"channels": 8, "stride": 2, "wavelet": True},
    "stages": [
        {"channels": 8, "layers": 1, "stride": 1},
        {"channels": 16, "layers": 2, "stride": 2},
    ],
    "head": 32,
    "blocks": ["k3_e1", "k3_e3", "skip"],
}
BLOCKS = ("k3_e3", "k3_e1", "skip")


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace.from_dict(CONTENT)


def test_the_split_is_haar_s_and_loses_nothing() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 6)
    halves = WaveletSplit(3)(images)
    assert halves.shape == (2, 12, 4, 3)
    assert torch.allclose(halves.square().sum(), images.square().sum(), rtol=1e-5)
    low, columns, rows, diagonals = halves.view(2, 3, 4, 4, 3).unbind(2)
    a, b = images[..., ::2, ::2], images[..., ::2, 1::2]
    c, d = images[..., 1::2, ::2], images[..., 1::2, 1::2]
    torch.testing.assert_close(low, (a + b + c + d) / 2)
    torch.testing.assert_close(columns, (a - b + c - d) / 2)
    torch.testing.assert_close(rows, (a + b - c - d) / 2)
    torch.testing.assert_close((low + columns + rows + diagonals) / 2, a)
    flat = WaveletSplit(1)(torch.full((1, 1, 4, 4), 3.0))
    assert torch.equal(flat[0, :, 0, 0], torch.tensor([6.0, 0, 0, 0]))


def test_the_layers_behind_it_are_those_of_a_plain_stem(space: SearchSpace, tmp_path: Path) -> None:
    plain = SearchSpace.from_dict({**CONTENT, "stem": {"channels": 8, "stride": 2}})
    assert space.layers == plain.layers
    assert "wavelet" not in plain.to_dict()["stem"]
    assert SearchSpace.from_dict(space.to_dict()) == space
    write_yaml(tmp_path / "s.yaml", CONTENT)
    assert SearchSpace.load(tmp_path / "s.yaml").stem.wavelet


def test_search_files_export_and_pruning_take_it(space: SearchSpace, tmp_path: Path) -> None:
    torch.manual_seed(0)
    supernet = Supernet(space, classes=4)
    architecture = Architecture(BLOCKS, "halves")
    network = supernet.network(architecture).eval()
    images = torch.randn(2, 3, 16, 16)
    path = architecture.path(space)
    torch.testing.assert_close(network(images), supernet.eval()(images, path))
    card = NetworkCard(space, architecture, tuple("abcd"), (0.5,) * 3, (0.25,) * 3)
    before = network(images)
    save_network(tmp_path, network, card)
    read, _ = load_network(tmp_path)
    assert torch.equal(read(images), before)
    export_onnx(read, tmp_path / "n.onnx", card=card, images=images)
    report = compress_(read, ChannelPruning(ratio=0.5, round_to=4))
    assert report.after.params < report.before.params
    assert read(images).shape == (2, 4)
    assert build_network(space, architecture, 4).stem.convolution[0].in_channels == 12


def test_one_table_holds_both_stems(space: SearchSpace, tmp_path: Path) -> None:
    content = {**CONTENT, "name": "plain", "stem": {"channels": 8, "stride": 2}}
    plain = SearchSpace.from_dict(content)
    device = device_from({"kind": "roofline", "name": "chip", **CHIP})
    profile(plain, device, tmp_path / "t.csv", classes=4)
    table = profile(space, device, tmp_path / "t.csv", classes=4)
    stems = [entry for entry in table.entries if "stem" in entry.shape.block]
    assert [entry.shape.block for entry in stems] == ["stem", "wavelet_stem"]
    base_ms = [table.tensor(each, classes=4)[1] for each in (plain, space)]
    assert base_ms[1] - base_ms[0] == pytest.approx(stems[1].latency_ms - stems[0].latency_ms)
    assert base_ms[1] > base_ms[0]


CHIP = {
    "gmacs_per_s": 1.0,
    "gmacs_per_s_int8": 4.0,
    "bandwidth_gb_per_s": 0.5,
    "overhead_us": 2.0,
    "pj_per_mac": 3.0,
    "pj_per_mac_int8": 0.5,
    "pj_per_dram_access": 640.0,
}
