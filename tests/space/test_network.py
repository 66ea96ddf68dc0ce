"""Networks: the published counts, files, architectures."""

from pathlib import Path

import pytest
import torch

from fbnas.errors import InputError
from fbnas.shipped import shipped_names
from fbnas.space import (
    Architecture,
    NetworkCard,
    SearchSpace,
    block_params,
    build_network,
    count,
    load_network,
    save_network,
)

PUBLISHED = {  # fbnet.md: parameters in M, multiply-adds in M
    "fbnet_a": (4.287, 249.92),
    "fbnet_c": (5.528, 384.96),
    "fbnet_iphonex": (4.472, 321.80),
    "fbnet_s8": (4.432, 292.92),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_counts_are_the_published_ones(name: str) -> None:
    space = SearchSpace.load("fbnet")
    found = count(build_network(space, Architecture.load(name)), (3, 224, 224))
    params, macs = PUBLISHED[name]
    assert round(found.params / 1e6, 3) == params
    assert round(found.macs / 1e6, 2) == macs


def test_fbnet_b_and_c_without_their_classifier() -> None:
    space = SearchSpace.load("fbnet")
    for name, macs in (("fbnet_b", 294.63), ("fbnet_c", 382.98)):
        found = count(build_network(space, Architecture.load(name)), (3, 224, 224))
        assert round((found.macs - 1984 * 1000) / 1e6, 2) == macs


@pytest.mark.parametrize("name", ["quickstart", "fbnet_cifar"])
def test_the_parameters_of_blocks_add_up_to_those_of_networks(name: str) -> None:
    space = SearchSpace.load(name)
    params, base = block_params(space, 10)
    assert params.isnan().equal(~space.offered)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        path = torch.multinomial(space.offered.double(), 1, generator=generator)
        with torch.device("meta"):
            network = build_network(space, Architecture.from_path(space, path[:, 0].tolist()), 10)
        found = count(network, network.input_shape).params
        assert base + int(params.gather(1, path).sum()) == found


@pytest.mark.parametrize("name", shipped_names("architecture"))
def test_every_shipped_architecture_fits_its_space(name: str, tmp_path: Path) -> None:
    architecture = Architecture.load(name)
    architecture.path(SearchSpace.load(architecture.space))
    architecture.save(tmp_path / "copy.yaml")
    assert Architecture.load(tmp_path / "copy.yaml") == architecture


def test_a_network_reads_back_bit_for_bit(tmp_path: Path) -> None:
    space = SearchSpace.load("quickstart")
    architecture = Architecture.random(space, torch.Generator().manual_seed(1))
    network = build_network(space, architecture, classes=3).eval()
    card = NetworkCard(space, architecture, ("a", "b", "c"), (0.5,), (0.25,))
    save_network(tmp_path, network, card)
    again, card_again = load_network(tmp_path)
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(again(images), network(images))
    assert card_again == card


def test_damaged_network_files_are_refused_by_name(tmp_path: Path) -> None:
    space = SearchSpace.load("quickstart")
    architecture = Architecture(("skip",) * 7)
    network = build_network(space, architecture, classes=3)
    save_network(tmp_path, network, NetworkCard(space, architecture, ("a",) * 3, (0.5,), (0.2,)))
    weights = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="weights.safetensors: the weights are damaged"):
        load_network(tmp_path)
    (tmp_path / "network.yaml").write_text("blocks: [skip\n")
    with pytest.raises(InputError, match=r"network.yaml, line \d"):
        load_network(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blocks: [k3_e1, k3_e1]\n", "has 2 blocks, space quickstart has 7 layers"),
        ("space: quickstart\nblocks: [k3_e1]\n", "7 layers; expected a block for each layer"),
        ("space: tiny\nblocks: [k3_e1]\n", "7 layers; expected space=tiny, which it names"),
        ("blocks: [k3_e1, k3_e1, k3_e1, k3_e1, k3_e1, k3_e1, k9]\n", "Unknown block in layer 6"),
        ("blocks: 3\n", "expected a list of block names"),
        ("blocks: [k3_e1\n", "line 2"),
        ("- a\n", "expected `key: value` lines"),
    ],
)
def test_a_bad_architecture_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        build_network(SearchSpace.load("quickstart"), Architecture.load(tmp_path / "a.yaml"))
    assert words in str(error.value)
