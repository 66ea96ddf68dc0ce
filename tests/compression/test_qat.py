"""QAT: rounding is its formula, the file computes what training saw, and is no worse than int8."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from digits_network import Trained
from torch import Tensor, nn
from torch.nn import functional

from fbnas.compression import (
    QAT,
    Rounded,
    StaticQuantization,
    compress_,
    describe,
    pack,
    quantize_file,
    unpack,
)
from fbnas.compression.equalisation import equalise_network_
from fbnas.compression.folding import fold_bn_
from fbnas.compression.holding import weighted
from fbnas.compression.method import Tools
from fbnas.errors import InputError
from fbnas.export import (
    TrainedInt8,
    accuracy_of_file,
    export_file,
    export_int8_onnx,
    export_onnx,
    scores_of_file,
)
from fbnas.latency.devices import Device
from fbnas.latency.fake_quantization import (
    Points,
    QuantizedForm,
    WeightGrids,
    as_deployed,
    observed_ranges,
    quantized_points,
    rounded_activation,
    rounding_weights,
)
from fbnas.latency.saturation import saturates
from fbnas.latency.session import open_session, run
from fbnas.space import load_network, save_network
from fbnas.space.depthwise import DepthwiseConv2d
from fbnas.training import Data, TrainingDiverged, TrainingSettings, evaluate, train

SETTINGS = TrainingSettings(epochs=2, lr=0.01, device="cpu")
SAME = 2  # images of 287 that integer kernels may answer differently, at a tie of rounding


def tools(data: Data, tune: Callable[[nn.Module], Any], shape: tuple = (1, 8, 8)) -> Tools:
    return Tools(shape, tune, data)


def nothing(_: nn.Module) -> None:
    """A training that leaves all as it is: what is left is int8 after training."""


MOST_BITS = 7 if saturates(Device()) else 8  # sums of more are cut off here


@pytest.fixture(scope="module", params=[MOST_BITS, 4], ids=["most bits", "4 bits"])
def made(trained: Trained, request: pytest.FixtureRequest) -> tuple[nn.Module, Rounded]:
    network = copy.deepcopy(trained.network)
    method = QAT(weight_bits=request.param)
    applied = method.apply_(
        network, tools(trained.data, lambda n: train(n, trained.data, settings=SETTINGS))
    )
    assert applied.trained.history
    return network, applied.changes[0]


def judge(path: Path, data: Data) -> float:
    return accuracy_of_file(path, data.validation, mean=data.mean, std=data.std)


def accuracy(network: nn.Module, data: Data) -> float:
    return evaluate(network, data.validation, mean=data.mean, std=data.std)[1]


def test_trained_is_no_worse_than_untrained(
    made: tuple[nn.Module, Rounded], trained: Trained
) -> None:
    network, rounded = made
    found = accuracy(as_deployed(network, rounded.form), trained.data)
    assert found == max(rounded.ptq_accuracy, rounded.qat_accuracy)
    if rounded.ptq_accuracy != rounded.qat_accuracy:  # or cross-entropy decides
        assert rounded.form.method == ("qat" if found == rounded.qat_accuracy else "ptq")
    assert found >= accuracy(trained.network, trained.data) - 0.02


def test_packed_it_takes_the_bits_that_it_was_trained_for(made: tuple[nn.Module, Rounded]) -> None:
    network, rounded = made
    data = pack(network)
    forms = {row.name: row for row in describe(data)}
    layers = {name: m for name, m in network.named_modules() if m in set(weighted(network))}
    for name, layer in layers.items():
        row = forms[f"{name}.weight"]
        assert row.form in ("grid", "shared", "sparse_shared"), name
        coded = 8 * row.index_bytes - 8 * row.clusters  # less the code's table
        assert coded <= rounded.form.weight_bits * layer.weight.numel() + 64, name
    found = unpack(data)
    assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())


def test_the_file_computes_what_training_saw(
    made: tuple[nn.Module, Rounded], trained: Trained, tmp_path: Path
) -> None:
    network, rounded = made
    report = export_int8_onnx(network, rounded.form, tmp_path / "q.onnx", card=trained.card)
    assert report.argmax_agreement is not None and report.argmax_agreement > 0.9
    found = judge(tmp_path / "q.onnx", trained.data)
    expected = accuracy(as_deployed(network, rounded.form), trained.data)
    assert abs(found - expected) <= SAME / len(trained.data.validation)


def test_the_file_holds_the_trained_grids_and_integers_of_few_bits(
    made: tuple[nn.Module, Rounded], tmp_path: Path
) -> None:
    network, rounded = made
    form = rounded.form
    export_int8_onnx(network, form, tmp_path / "q.onnx")
    graph = onnx.load(tmp_path / "q.onnx").graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    low, high = form.inputs["stem.0"]
    assert stored[first.input[1]] == pytest.approx((high - low) / 255, rel=1e-6)
    assert stored[first.input[2]] == round(-low * 255 / (high - low))
    integers = {name: value for name, value in stored.items() if name.endswith("_quantized")}
    weights = [value for value in integers.values() if value.dtype == np.int8]
    biases = [value for value in integers.values() if value.dtype == np.int32]
    assert len(weights) == len(biases) == len(weighted(network))
    assert max(abs(value).max() for value in weights) == 2 ** (form.weight_bits - 1) - 1
    grids = {n.input[1] for n in graph.node if n.op_type == "QuantizeLinear"}
    scales = {float(stored[name]) for name in grids}
    ranges = [*form.inputs.values(), *form.outputs.values()]
    wanted = [(max(high, 0) - min(low, 0)) / 255 for low, high in ranges]
    assert all(min(abs(scale / x - 1) for x in wanted) < 1e-5 for scale in scales)


def integer_layers(path: Path, folder: Path) -> tuple[int, int]:
    """How many convolutions and linear layers ONNX Runtime computes in int8, where all are."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]
    assert {"Conv", "Gemm", "Add", "Relu", "GlobalAveragePool"} & set(found) == set()
    return found.count("QLinearConv"), found.count("QGemm")


def test_every_layer_runs_in_int8(made: tuple[nn.Module, Rounded], tmp_path: Path) -> None:
    network, rounded = made
    export_int8_onnx(network, rounded.form, tmp_path / "q.onnx")
    convolutions = sum(isinstance(m, nn.Conv2d) for m in network.modules())
    assert integer_layers(tmp_path / "q.onnx", tmp_path) == (convolutions, 1)


def roundings(path: Path) -> tuple[list[str], int]:
    """The layers whose weights are not dequantized, and how often activations are rounded."""
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    left = [node.name for node in layers if makers.get(node.input[1]) != "DequantizeLinear"]
    return left, sum(node.op_type == "QuantizeLinear" for node in graph.node)


def test_layers_in_float_round_nothing_between_them(
    made: tuple[nn.Module, Rounded], trained: Trained, tmp_path: Path
) -> None:
    network, rounded = made
    file = TrainedInt8(network, rounded.form, (1, 8, 8), trained.card)
    expand, depthwise = (f"/layers.0/{x}/{x}.0/Conv" for x in ("expand", "depthwise"))
    assert {expand, depthwise} <= set(file.layers)
    everything = roundings(file.write(tmp_path / "all.onnx"))
    assert everything[0] == []
    one = roundings(file.write(tmp_path / "one.onnx", [expand]))
    assert one == ([expand], everything[1])  # int8 before it and after it
    two = roundings(file.write(tmp_path / "two.onnx", [expand, depthwise]))
    assert two == ([expand, depthwise], everything[1] - 1)
    first = roundings(file.write(tmp_path / "first.onnx", file.layers[:1]))
    assert first == ([file.layers[0]], everything[1] - 1)  # images go in as they are
    last = roundings(file.write(tmp_path / "last.onnx", file.layers[-1:]))
    assert last == ([file.layers[-1]], everything[1] - 1)  # scores come out as they are
    none = roundings(file.write(tmp_path / "none.onnx", file.layers))
    assert none == (list(file.layers), 0)

    images = trained.data.validation

    def scores(name: str) -> np.ndarray:
        path = tmp_path / f"{name}.onnx"
        return scores_of_file(path, images, mean=trained.data.mean, std=trained.data.std).numpy()

    shown = (images.pixels.float() / 255 - trained.data.mean[0]) / trained.data.std[0]
    outputs = dict(rounded.form.outputs)
    del outputs["layers.0.expand.2"]  # which lies between the two
    between = as_deployed(network, replace(rounded.form, outputs=outputs))
    step = np.diff(rounded.form.outputs["classifier.linear"])[0] / 255
    with torch.no_grad():
        expected = {"two": between(shown).numpy(), "none": network(shown).numpy()}
    assert np.abs(scores("none") - expected["none"]).max() < 1e-3
    off = np.abs(scores("two") - expected["two"])  # integer kernels round sums elsewhere
    assert np.median(off) <= step
    assert off.mean() < np.abs(scores("all") - expected["two"]).mean()


def test_any_layers_may_compute_in_float(
    made: tuple[nn.Module, Rounded], trained: Trained, tmp_path: Path
) -> None:
    """Before, behind and around sums, shuffles and pooling, in every version of the operators."""
    network, rounded = made
    data = trained.data
    images = (data.validation.pixels[:64].float() / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        expected = network(images)
    for seed, opset in enumerate((13, 17, 20, 17, 17, 17)):
        file = TrainedInt8(network, rounded.form, (1, 8, 8), trained.card, opset)
        drawn = torch.rand(len(file.layers), generator=torch.Generator().manual_seed(seed)) < 0.5
        left = [name for name, taken in zip(file.layers, drawn.tolist(), strict=True) if taken]
        path = file.write(tmp_path / f"{seed}.onnx", left)
        assert roundings(path)[0] == left
        found = run(open_session(path, whole_sums=True), images)
        assert ((found - expected).norm() / expected.norm()) < 0.25


def test_what_is_left_is_plain(made: tuple[nn.Module, Rounded]) -> None:
    network, rounded = made
    bits = rounded.form.weight_bits
    for layer in weighted(network):
        assert torch.allclose(WeightGrids(bits).rounded(layer.weight), layer.weight, rtol=1e-6)
        levels = {len(row.unique()) for row in layer.weight.flatten(1)}
        assert max(levels) <= 2**bits - 1
        assert type(layer) in (nn.Conv2d, nn.Linear, DepthwiseConv2d)
        assert layer.bias is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert {key.rpartition(".")[2] for key in network.state_dict()} == {"weight", "bias"}


def test_saved_and_read_it_is_the_same(
    made: tuple[nn.Module, Rounded], trained: Trained, tmp_path: Path
) -> None:
    network, rounded = made
    save_network(tmp_path, network, trained.card)
    rounded.form.save(tmp_path / "quantization.json")
    read, _ = load_network(tmp_path)
    assert QuantizedForm.load(tmp_path / "quantization.json") == rounded.form
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(read(images), network.eval()(images))
    for name, which in (("a", network), ("b", read)):
        export_int8_onnx(which, rounded.form, tmp_path / f"{name}.onnx", card=trained.card)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_weights_of_another_network_are_refused_still(trained: Trained, tmp_path: Path) -> None:
    save_network(tmp_path, trained.network, trained.card)
    folded = copy.deepcopy(trained.network)
    fold_bn_(folded, (1, 8, 8))
    tensors = folded.state_dict()
    del tensors["head.0.bias"]  # a normalisation is gone, and no bias has taken its place
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="belong to another network"):
        load_network(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_channel": False},
        {"ranges": "percentile", "percentile": 99.0},
        {"ranges": "entropy"},
        {"activations": "symmetric"},
        {"weights": "asymmetric", "per_channel": False},
        {"equalise": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "default",
)
def test_without_training_it_is_onnx_runtimes_own_int8(
    trained: Trained, tmp_path: Path, options: dict[str, Any]
) -> None:
    network = copy.deepcopy(trained.network)
    rounded = QAT(**options).apply_(network, tools(trained.data, nothing)).changes[0]
    assert rounded.ptq_accuracy == rounded.qat_accuracy
    export_int8_onnx(network, rounded.form, tmp_path / "ours.onnx", card=trained.card)
    export_onnx(trained.network, tmp_path / "fp32.onnx", card=trained.card)
    method = StaticQuantization(reduce_range=False, **options)
    quantize_file(tmp_path / "fp32.onnx", tmp_path / "theirs.onnx", trained.data, method)
    ours, theirs = (judge(tmp_path / f"{name}.onnx", trained.data) for name in ("ours", "theirs"))
    assert abs(ours - theirs) <= 2 * SAME / len(trained.data.validation)
    count = [
        sum(n.op_type == "QuantizeLinear" for n in onnx.load(tmp_path / f"{name}.onnx").graph.node)
        for name in ("ours", "theirs")
    ]
    assert count[0] == count[1]  # the same tensors are rounded
    ours, theirs = (activation_grids(tmp_path / f"{name}.onnx") for name in ("ours", "theirs"))
    # Weights were rounded before ranges were observed; entropy's thresholds go by eight bins.
    rough = options.get("ranges") == "entropy"
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0.2 if rough else 0.03)
    assert np.abs(ours[1] - theirs[1]).max() <= (12 if rough else 5)
    if options.get("activations") == "symmetric":
        assert set(ours[1]) == {0, 128}


def test_a_module_called_twice_has_the_range_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(3 * x) - 2 * self.act(x).amax())

    images = np.linspace(-1, 2, 12, dtype=np.float32).reshape(1, 1, 3, 4)
    model = Twice()
    model.weight = nn.Parameter(torch.zeros(()))  # a device to run on
    _, outputs = observed_ranges(model, Points((), ("act",)), [images])
    assert outputs == {"act": (0.0, 6.0)}  # the last call alone: 0 to 2


def activation_grids(path: Path) -> np.ndarray:
    """Scales of what is quantized and, apart from them, zero points: (2, n), each ascending."""
    graph = onnx.load(path).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    found = np.array([[stored[name].item() for name in node.input[1:]] for node in nodes])
    return np.sort(found.T)


@pytest.mark.parametrize("activations", ["asymmetric", "symmetric"])
def test_training_pays_where_few_bits_hurt_on_grids_of_the_kind_asked_for(
    trained: Trained, activations: str
) -> None:
    """With weights of 3 bits: 0.74 of the validation digits before, 0.94 after training."""
    network = copy.deepcopy(trained.network)
    method = QAT(weight_bits=3, activations=activations, momentum=0.1)
    gently = replace(SETTINGS, lr=0.005)
    tune = tools(trained.data, lambda n: train(n, trained.data, settings=gently))
    before = method.apply_(copy.deepcopy(trained.network), tools(trained.data, nothing))
    rounded = method.apply_(network, tune).changes[0]
    form = rounded.form
    assert rounded.qat_accuracy > rounded.ptq_accuracy + 0.05
    moved = [form.outputs[name] != ends for name, ends in before.changes[0].form.outputs.items()]
    assert any(moved)
    zeros = [-low / (high - low) * 255 for low, high in (*form.inputs.values(),
                                                          *form.outputs.values())]  # fmt: skip
    middle = [z == pytest.approx(128, abs=1e-3) or z <= 0 for z in zeros]
    assert all(middle) if activations == "symmetric" else not all(middle)


def harm(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(-1)


def diverge(network: nn.Module) -> None:
    harm(network)
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    raise TrainingDiverged("The loss is not a finite number.")


@pytest.mark.parametrize("tune", [harm, diverge])
def test_a_training_that_harms_is_taken_back(
    trained: Trained, tune: Callable[[nn.Module], None]
) -> None:
    harmed, untouched = copy.deepcopy(trained.network), copy.deepcopy(trained.network)
    (bad,) = QAT().apply_(harmed, tools(trained.data, tune)).changes
    (good,) = QAT().apply_(untouched, tools(trained.data, nothing)).changes
    assert bad.form == replace(good.form, method="ptq")
    assert bad.qat_accuracy < bad.ptq_accuracy == good.ptq_accuracy
    for name, value in untouched.state_dict().items():
        assert torch.equal(harmed.state_dict()[name], value), name


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_to_their_grid(bits: int, per_channel: bool) -> None:
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    highest = 2 ** (bits - 1) - 1
    found = WeightGrids(bits, per_channel).rounded(weight).numpy()
    array = weight.numpy().astype(np.float64)
    largest = np.abs(array).max((1, 2, 3), keepdims=True) if per_channel else np.abs(array).max()
    scale = np.where(largest > 0, largest / highest, 1.0)
    expected = scale * np.clip(np.rint(array / scale), -highest, highest)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[2].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [-0.5, 0.0, 7.0])
def test_asymmetric_weights_take_all_levels_of_their_range(bits: int, shift: float) -> None:
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + shift
    grids = WeightGrids(bits, per_channel=False, symmetric=False)
    found = grids.rounded(weight)
    array = weight.numpy().astype(np.float64)
    low, high = min(array.min(), 0), max(array.max(), 0)
    step, lowest = (high - low) / (2**bits - 1), -(2 ** (bits - 1))
    zero = np.rint(lowest - low / step)
    levels = np.clip(np.rint(array / step) + zero, lowest, -lowest - 1)
    np.testing.assert_allclose(found.numpy(), step * (levels - zero), rtol=1e-5, atol=1e-6)
    assert torch.allclose(grids.rounded(found), found, rtol=1e-5)  # what is rounded stays
    if low < 0 < high:
        assert (levels.min(), levels.max()) == (lowest, -lowest - 1)
    assert not WeightGrids(bits, False, False).rounded(torch.zeros(2, 3)).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_asymmetric_weights_run_in_int8_as_they_were_trained(
    bits: int, trained: Trained, tmp_path: Path
) -> None:
    network = copy.deepcopy(trained.network)
    method = QAT(weight_bits=bits, per_channel=False, weights="asymmetric", equalise=True)
    applied = method.apply_(
        network, tools(trained.data, lambda n: train(n, trained.data, settings=SETTINGS))
    )
    (rounded,) = applied.changes
    rounded.form.save(tmp_path / "form.json")
    assert QuantizedForm.load(tmp_path / "form.json") == rounded.form
    path = tmp_path / "q.onnx"
    export_int8_onnx(network, rounded.form, path, card=trained.card)
    found = judge(path, trained.data)
    expected = accuracy(as_deployed(network, rounded.form), trained.data)
    assert abs(found - expected) <= SAME / len(trained.data.validation)
    assert expected == max(rounded.ptq_accuracy, rounded.qat_accuracy)
    graph = onnx.load(path).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    zeros = [
        stored[node.input[2]]
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in stored
        and stored[node.input[0]].dtype == np.int8
    ]
    assert len(zeros) == len(weighted(network))
    assert all(zero.shape in ((), (1,)) or not zero.any() for zero in zeros)
    assert any(zero.any() for zero in zeros)
    assert integer_layers(path, tmp_path) == (len(weighted(network)) - 1, 1)


def test_a_dead_channel_takes_nothing_from_the_others(tmp_path: Path) -> None:
    """Its step, which may be any where weights are symmetric, is that of all where they are not."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.bias[1] = 0
        layer.weight.copy_(WeightGrids(8, False, False).rounded(layer.weight + 0.02))
        layer.weight[1] = 0
    network = nn.Sequential(layer, nn.ReLU()).eval()
    form = QuantizedForm(8, False, {"0": (-4.0, 4.0)}, {"1": (0.0, 4.0)}, weights="asymmetric")
    TrainedInt8(network, form, (3, 8, 8)).write(tmp_path / "x.onnx")
    images = torch.randn(1, 3, 8, 8).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images})
    with torch.no_grad():
        expected = as_deployed(network, form)(torch.from_numpy(images)).numpy()
    assert np.abs(found - expected).max() < 2 * 4 / 255
    assert expected.max() > 0.5


def test_equalised_a_network_computes_the_same(trained: Trained) -> None:
    network = copy.deepcopy(trained.network).eval()
    fold_bn_(network, (1, 8, 8))
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(images)
        pairs = equalise_network_(network, (1, 8, 8))
        assert torch.allclose(network(images), before, rtol=1e-4, atol=1e-4)
    layers = dict(network.named_modules())
    assert ("layers.0.expand.0", "layers.0.depthwise.0") in pairs
    first, second = (layers[name].weight.detach() for name in pairs[0])
    reach = first.flatten(1).abs().amax(1), second.flatten(1).abs().amax(1)
    assert torch.allclose(*reach, rtol=0.05)  # a depthwise layer has the channels of the first


def test_gradients_pass_straight_through_but_for_what_is_cut_off() -> None:
    weight = torch.randn(4, 8, requires_grad=True, generator=torch.Generator().manual_seed(0))
    (WeightGrids(4).rounded(weight) * torch.arange(8.0)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(8.0).expand(4, 8))
    values = torch.tensor([-2.0, -0.91, 0.01, 1.91, 2.5], requires_grad=True)
    rounded = rounded_activation(values, torch.tensor([-1.0, 2.0]))
    rounded.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 0]
    steps = np.clip(np.rint(np.array(values.tolist()) * 85) + 85, 0, 255)
    np.testing.assert_allclose(rounded.detach(), (steps - 85) / 85, rtol=1e-5)


def test_a_range_is_widened_to_hold_zero() -> None:
    values = torch.tensor([1.0, 3.0, 5.1])
    found = rounded_activation(values, torch.tensor([2.0, 5.1]))
    assert torch.allclose(found, (values / 0.02).round() * 0.02, atol=1e-6)


def test_pruned_weights_stay_and_rounded_ones_may_come_back() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[1.0, 0.001, 0.0]]))
    kept = {layer: torch.tensor([[1.0, 1.0, 0.0]])}
    with rounding_weights(layer, WeightGrids(8), kept=kept):
        assert layer.weight.tolist() == [[1.0, 0.0, 0.0]]
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        (-layer(torch.ones(1, 3))).sum().backward()
        optimizer.step()
    assert layer.weight[0, 1].item() == pytest.approx(0.501, abs=0.007)
    assert layer.weight[0, 2] == 0


def test_zeros_of_pruning_are_zeros_of_the_file(trained: Trained) -> None:
    network = copy.deepcopy(trained.network)
    with torch.no_grad():
        for layer in weighted(network):
            layer.weight[:, ::2] = 0 if layer.weight.shape[1] > 1 else layer.weight[:, ::2]
    masks = [layer.weight == 0 for layer in weighted(network)]
    QAT().apply_(network, tools(trained.data, lambda n: train(n, trained.data, settings=SETTINGS)))
    for layer, mask in zip(weighted(network), masks, strict=True):
        assert not layer.weight[mask].any()


def test_training_is_told_the_rate_that_folded_layers_bear(trained: Trained) -> None:
    told: list[float | None] = []

    def tune(_: nn.Module, lr: float | None = None) -> None:
        told.append(lr)

    for lr in (None, 0.003):
        QAT(lr=lr).apply_(copy.deepcopy(trained.network), tools(trained.data, tune))
    assert told == [None, 0.003]


class Shared(nn.Module):
    """Uses what a convolution returns twice: in a normalisation and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return self.linear(functional.relu(self.norm(maps) + maps).mean((2, 3)))


def lively(network: nn.Module) -> nn.Module:
    """Give its normalisations statistics that are not those of the beginning."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data.copy_(torch.rand(len(tensor), generator=generator) + 0.5)
    return network.eval()


def test_folding_keeps_the_scores(trained: Trained) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        DepthwiseConv2d(8, 8, 5, padding=2, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 3, 1, bias=False),
    )
    for network, shape, left in ((trained.network, (1, 8, 8), 0), (plain, (4, 9, 9), 1)):
        folded = lively(copy.deepcopy(network))
        images = torch.randn(2, *shape)
        expected = folded(images)
        fold_bn_(folded, shape)
        assert torch.allclose(folded(images), expected, rtol=1e-4, atol=1e-4)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == left


def test_a_convolution_that_something_else_reads_is_not_folded() -> None:
    network = lively(Shared())
    assert fold_bn_(network, (1, 8, 8)) == ()
    assert isinstance(network.norm, nn.BatchNorm2d)


def test_each_new_tensor_is_rounded_once(trained: Trained) -> None:
    folded = copy.deepcopy(trained.network)
    fold_bn_(folded, (1, 8, 8))
    points = quantized_points(folded, (1, 8, 8))
    assert points.inputs == ("stem.0",)
    assert points.outputs[:6] == (
        *("stem.2", "layers.0.expand.2", "layers.0.depthwise.2"),
        *("layers.0.project.0", "layers.0", "layers.1.expand.2"),
    )
    assert points.outputs[-3:] == ("head.2", "classifier.pool", "classifier.linear")
    assert not any("shuffle" in name for name in points.outputs)


def test_any_module_goes_through(trained: Trained, tmp_path: Path) -> None:
    """Functional activations, an input that no module makes, a layer without a bias."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(1, 8, 3, padding=1)
            self.two = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
            self.last = nn.Linear(128, 10)

        def forward(self, images: Tensor) -> Tensor:
            maps = functional.relu(self.one(images))
            maps = functional.max_pool2d(functional.relu(self.two(maps)) + maps, 2)
            return self.last(maps.flatten(1))

    torch.manual_seed(0)
    network = Own()
    short = replace(SETTINGS, epochs=3, lr=0.05)
    train(network, trained.data, settings=short)
    (rounded,) = (
        QAT(weight_bits=4)
        .apply_(network, tools(trained.data, lambda n: train(n, trained.data, settings=SETTINGS)))
        .changes
    )
    assert rounded.form.inputs.keys() == {"one", "two", "last"}
    export_int8_onnx(network, rounded.form, tmp_path / "q.onnx", input_shape=(1, 8, 8))
    expected = accuracy(as_deployed(network, rounded.form), trained.data)
    assert expected > 0.8
    assert abs(judge(tmp_path / "q.onnx", trained.data) - expected) <= SAME / 287


def test_it_is_a_method_of_compress_(trained: Trained) -> None:
    network = copy.deepcopy(trained.network)
    report = compress_(network, QAT(), train=nothing, data=trained.data)
    assert isinstance(report.changes[0], Rounded)
    assert report.after.params == sum(
        layer.weight.numel() + len(layer.bias) for layer in weighted(network)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_bits": 1}, "weight_bits is 1; expected a whole number from 2 to 8"),
        ({"weight_bits": 16}, "weight_bits is 16"),
        ({"momentum": 1.0}, "momentum is 1.0; expected 0 "),
        ({"lr": 0.0}, "lr is 0.0; expected a positive number"),
        ({"ranges": "percentil"}, "Did you mean 'percentile'"),
        ({"percentile": 20.0}, "percentile is 20; expected above 50"),
        ({"calibration_images": 0}, "calibration_images is 0; expected at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        QAT(**options)


def test_it_refuses_to_go_without_images_or_training(trained: Trained) -> None:
    network = copy.deepcopy(trained.network)
    with pytest.raises(InputError, match="no data"):
        compress_(network, QAT(), train=nothing)
    with pytest.raises(InputError, match="nothing that trains"):
        compress_(network, QAT(), data=trained.data)


def test_a_form_of_another_network_or_file_is_refused(trained: Trained, tmp_path: Path) -> None:
    form = QuantizedForm(8, True, {"steam.0": (0.0, 1.0)}, {})
    with pytest.raises(InputError, match=r"names steam\.0, which the network has not"):
        as_deployed(trained.network, form)
    device, path = Device(runtime="pytorch", precision="int8"), tmp_path / "x.pt2"
    with pytest.raises(InputError, match=r"x\.pt2 at int8 has no place for the grids of form="):
        export_file(trained.network, path, device, card=trained.card, form=form)
    (tmp_path / "f.json").write_text('{"weight_bits": 8}')
    with pytest.raises(InputError, match=r"f\.json: .*missing or of the wrong kind"):
        QuantizedForm.load(tmp_path / "f.json")
