"""ONNX files compute what the module computes; their int8 form really is int8."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.latency.lowering import Scheme, quantize_onnx, write_onnx
from fbnas.space import BLOCKS, build_block

SHAPE = (16, 9, 9)


def run(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch normalisation statistics that differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.weight.data, part.bias.data, part.running_var):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return module


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("out_channels", "stride"), [(16, 1), (24, 2)])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_computes_the_same_at_any_batch(
    name: str, out_channels: int, stride: int, tmp_path: Path
) -> None:
    block = alive(build_block(name, 16, out_channels, stride)).eval()
    write_onnx(block, SHAPE, tmp_path / "block.onnx", batch=None)
    for count in (1, 7):
        with torch.no_grad():
            expected = block(images(count))
        torch.testing.assert_close(
            run(tmp_path / "block.onnx", images(count)), expected, rtol=1e-4, atol=1e-4
        )


def test_fixed_batch_is_in_the_file(tmp_path: Path) -> None:
    write_onnx(build_block("k3_e1_g2", 16, 16, 1), SHAPE, tmp_path / "block.onnx", batch=2)
    dimension = onnx.load(tmp_path / "block.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    assert dimension.dim_value == 2


def test_shuffle_leaves_no_shape_arithmetic_and_no_identities(tmp_path: Path) -> None:
    # Fresh batch normalisation is equal everywhere: the exporter shares those weights.
    block = nn.Sequential(build_block("k3_e1_g2", 16, 16, 1), build_block("skip", 16, 16, 1))
    write_onnx(block, SHAPE, tmp_path / "block.onnx", batch=None)
    kinds = {node.op_type for node in onnx.load(tmp_path / "block.onnx").graph.node}
    assert kinds == {"Conv", "Relu", "Constant", "Reshape", "Transpose", "Add"}


def test_batch_baked_into_a_trace_is_noticed(tmp_path: Path) -> None:
    class OwnReshape(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            batch, channels, height, width = images.shape
            return images.reshape(batch, channels * height, width)

    write_onnx(OwnReshape(), SHAPE, tmp_path / "own.onnx", batch=None)
    assert run(tmp_path / "own.onnx", images(7)).shape == (7, 144, 9)


def test_module_is_left_in_its_mode_and_with_its_weights(tmp_path: Path) -> None:
    block = build_block("k3_e3", 16, 16, 1).train()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    write_onnx(block, SHAPE, tmp_path / "block.onnx")
    assert all(part.training for part in block.modules())
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_operation_without_onnx_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ChannelShuffle has no ONNX form .*channel_shuffle"):
        write_onnx(nn.ChannelShuffle(2), SHAPE, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - {"skip"}))
def test_int8_block_is_close_and_keeps_metadata(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    block = alive(build_block(name, 16, 16, 1)).eval()
    write_onnx(block, SHAPE, tmp_path / "fp32.onnx", batch=None, metadata={"made by": "a test"})
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [images(8).numpy()])

    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "int8.onnx").metadata_props}
    assert stored == {"made by": "a test"}
    with torch.no_grad():
        expected = block(images(8))
    error = (run(tmp_path / "int8.onnx", images(8)) - expected).abs().mean()
    assert 0 < error < 0.02 * expected.abs().max()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_int8_convolutions_survive_the_runtimes_optimisation(tmp_path: Path) -> None:
    write_onnx(alive(build_block("k5_e6", 16, 24, 2)), SHAPE, tmp_path / "fp32.onnx")
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [images(1).numpy()])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # the runtime warns that the written file suits this CPU only
    onnxruntime.InferenceSession(
        tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"]
    )
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert "Conv" not in kinds


def test_percentile_cuts_an_outlier_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_onnx(build_block("k3_e1", 16, 16, 1), SHAPE, tmp_path / "fp32.onnx", batch=None)
    calibration = images(99)
    calibration[0, 0, 0, 0] = 1000.0
    scales = {}
    for ranges in ("minmax", "percentile"):
        path = tmp_path / f"{ranges}.onnx"
        quantize_onnx(
            tmp_path / "fp32.onnx", path, [calibration.numpy()], scheme=Scheme(ranges=ranges)
        )
        weights = {w.name: w for w in onnx.load(path).graph.initializer}
        scales[ranges] = onnx.numpy_helper.to_array(weights["images_scale"])
    assert scales["minmax"] > 100 * scales["percentile"]
    assert capfd.readouterr().out == ""


def test_weights_of_seven_bits_stay_in_range(tmp_path: Path) -> None:
    write_onnx(build_block("k3_e1", 16, 16, 1), SHAPE, tmp_path / "fp32.onnx")
    largest = {}
    for reduce_range in (False, True):
        path = tmp_path / f"{reduce_range}.onnx"
        quantize_onnx(
            tmp_path / "fp32.onnx",
            path,
            [images(1).numpy()],
            scheme=Scheme(reduce_range=reduce_range),
        )
        weights = [onnx.numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer]
        largest[reduce_range] = max(
            np.abs(w.astype(int)).max() for w in weights if w.dtype == np.int8
        )
    assert largest == {False: 127, True: 64}


def test_nothing_to_calibrate_on_and_unknown_ranges_are_refused(tmp_path: Path) -> None:
    write_onnx(build_block("k3_e1", 16, 16, 1), SHAPE, tmp_path / "fp32.onnx")
    with pytest.raises(ValueError, match="No calibration images"):
        quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [])
    with pytest.raises(InputError, match="Did you mean 'minmax'"):
        Scheme(ranges="min_max")
    assert not (tmp_path / "int8.onnx").exists()
