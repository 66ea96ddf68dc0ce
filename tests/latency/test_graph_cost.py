"""The cost of a graph: multiply-adds, bytes and peak memory as counted by hand."""

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.latency.graph_cost import GraphCost, graph_cost, module_cost
from fbnas.latency.lowering import compile_onnx, write_onnx
from fbnas.space import BLOCKS, build_block, count


def steps(cost: GraphCost) -> list[tuple[str, int, int]]:
    return [(step.op_type, step.macs, step.bytes) for step in cost.operators]


def totals(cost: GraphCost) -> tuple[int, ...]:
    """Everything that a cost says but the names of its operators."""
    return cost.macs, cost.bytes, cost.params, cost.weight_bytes, cost.peak_bytes


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


class Residual(nn.Module):
    """A narrow input, which stays alive while the wide middle is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(4, 8, 1, bias=False)
        self.narrow = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.narrow(self.widen(images).relu())


class Shuffle(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        n, c, h, w = images.shape
        return images.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.conv(images)
        return found.relu() + found


def test_a_small_net_by_hand() -> None:
    cost = module_cost(small_net(), (3, 8, 8))
    assert steps(cost) == [  # bytes: input + weights + biases + output, 4 each
        ("Conv", 8 * 64 * 3 * 9, 4 * (192 + 216 + 8 + 512)),  # normalised and activated within
        ("Conv", 8 * 64 * 2 * 9, 4 * (512 + 144 + 0 + 512)),  # 2 of 8 channels meet in a group
        ("GlobalAveragePool", 0, 4 * (512 + 8)),
        ("Gemm", 80, 4 * (8 + 80 + 10 + 10)),
    ]
    assert cost.macs == 13824 + 9216 + 80
    assert cost.params == 216 + 8 + 144 + 80 + 10
    assert cost.weight_bytes == 4 * cost.params
    assert cost.peak_bytes == 4 * (512 + 512)


def test_int8_moves_a_byte_for_each_value_and_four_for_a_bias() -> None:
    cost = module_cost(small_net(), (3, 8, 8), "int8")
    assert steps(cost) == [
        ("Conv", 13824, 192 + 216 + 4 * 8 + 512),
        ("Conv", 9216, 512 + 144 + 512),
        ("GlobalAveragePool", 0, 512 + 8),
        ("Gemm", 80, 8 + 80 + 4 * 10 + 10),
    ]
    assert cost.weight_bytes == 216 + 144 + 80 + 4 * (8 + 10)
    assert cost.peak_bytes == 512 + 512


def test_strides_and_kernels_count_by_the_output() -> None:
    conv = nn.Conv2d(4, 6, (5, 3), stride=2, padding=(2, 1), bias=False)
    assert steps(module_cost(conv, (4, 8, 8))) == [
        ("Conv", 6 * 16 * 4 * 15, 4 * (4 * 64 + 6 * 4 * 15 + 6 * 16))
    ]


def test_a_shuffle_moves_bytes_and_its_reshapes_do_not() -> None:
    cost = module_cost(Shuffle(), (4, 4, 4))
    assert steps(cost) == [("Transpose", 0, 4 * (64 + 64))]
    assert (cost.params, cost.peak_bytes) == (0, 4 * 128)


def test_a_residual_keeps_its_input_alive() -> None:
    cost = module_cost(Residual(), (4, 4, 4))
    assert steps(cost) == [
        ("Conv", 512, 4 * (64 + 32 + 128)),
        ("Conv", 512, 4 * (128 + 32 + 64)),
        ("Add", 0, 4 * (64 + 64 + 64)),
    ]
    assert cost.peak_bytes == 4 * (64 + 128 + 64)
    block = Residual()
    straight = module_cost(nn.Sequential(block.widen, nn.ReLU(), block.narrow), (4, 4, 4))
    assert straight.peak_bytes == 4 * (64 + 128)


def test_an_activation_is_free_only_where_nothing_else_reads_the_convolution() -> None:
    values = 2 * 2 * 2
    assert steps(module_cost(TwoReaders(), (2, 2, 2))) == [
        ("Conv", 16, 4 * (values + 4 + values)),
        ("Relu", 0, 4 * 2 * values),
        ("Add", 0, 4 * 3 * values),
    ]
    behind_a_pool = module_cost(nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), (2, 4, 4))
    assert steps(behind_a_pool) == [("MaxPool", 0, 4 * (32 + 8)), ("Relu", 0, 4 * (8 + 8))]


def test_an_unknown_operation_counts_its_bytes() -> None:
    assert steps(module_cost(nn.Softmax(dim=1), (4, 2, 2))) == [("Softmax", 0, 4 * (16 + 16))]


def test_what_does_nothing_costs_nothing_but_holds_its_input() -> None:
    cost = module_cost(nn.Identity(), (2, 4, 4))
    assert (cost.operators, cost.peak_bytes) == ((), 4 * 32)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_costs_the_same_from_any_of_its_files(name: str, tmp_path: Path) -> None:
    shape, block = (16, 9, 9), build_block(name, 16, 24, 2)
    noise = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    expected = module_cost(block, shape)
    assert expected.macs == count(block, shape).macs > 0
    write_onnx(block, shape, tmp_path / "any_batch.onnx", batch=None)
    open_batch = graph_cost(tmp_path / "any_batch.onnx")
    assert (steps(open_batch), totals(open_batch)) == (steps(expected), totals(expected))
    path = tmp_path / "int8.onnx"
    compile_onnx(block, shape, path, precision="int8", batch=1, calibration=[noise])
    quantized, planned = graph_cost(path), module_cost(block, shape, "int8")
    assert (steps(quantized), totals(quantized)) == (steps(planned), totals(planned))
    assert quantized.macs == expected.macs
    assert expected.bytes / 4 < quantized.bytes < expected.bytes / 3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_layers_in_sequence_add_up(precision: str) -> None:
    shapes = [(16, 12, 12), (16, 12, 12), (24, 6, 6)]
    blocks = [
        build_block("k3_e6", 16, 16, 1),
        build_block("k5_e1_g2", 16, 24, 2),
        build_block("k5_e3", 24, 24, 1),
    ]
    whole = module_cost(nn.Sequential(*blocks), shapes[0], precision)
    parts = [
        module_cost(block, shape, precision) for block, shape in zip(blocks, shapes, strict=True)
    ]
    assert steps(whole) == [step for part in parts for step in steps(part)]
    assert whole.params == sum(part.params for part in parts)
    assert whole.weight_bytes == sum(part.weight_bytes for part in parts)
    assert whole.peak_bytes == max(part.peak_bytes for part in parts)


def test_a_cost_does_not_depend_on_the_values_of_weights() -> None:
    assert totals(module_cost(small_net(), (3, 8, 8))) == totals(
        module_cost(small_net(), (3, 8, 8))
    )


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(InputError, match=r"net\.onnx: no such model file"):
        graph_cost(path)
    write_onnx(small_net(), (3, 8, 8), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"net\.onnx: not a whole ONNX file .*; expected"):
        graph_cost(path)
    path.write_text("a text")
    with pytest.raises(InputError, match=r"net\.onnx: not a whole ONNX file"):
        graph_cost(path)
