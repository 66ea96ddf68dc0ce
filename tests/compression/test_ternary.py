"""Ternary weights: the paper's equations by hand, training on digits, two bits a weight."""

import copy
from pathlib import Path

import pytest
import torch
from digits_network import Trained, accuracy, fit
from torch import Tensor, nn

from fbnas.compression import ChannelPruning, Ternary, compress_, describe, pack, unpack
from fbnas.compression.dataflow import layer_calls
from fbnas.compression.method import Tools
from fbnas.compression.ternary import ternarized, ternary
from fbnas.errors import InputError
from fbnas.export import export_onnx
from fbnas.space import load_network, save_network
from fbnas.space.heads import join_heads, renew_classifier_
from fbnas.training.loop import train
from fbnas.training.settings import TrainingSettings


def test_values_and_gradients_are_those_of_the_equations() -> None:
    latent = torch.tensor([1.0, 0.3, 0.2, 0.0, -0.1, -0.21, -0.9], requires_grad=True)
    scales = torch.tensor([0.5, 2.0], requires_grad=True)
    gradient = torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6])
    weights = ternarized(latent, scales, 0.2)  # threshold 0.2 of 1: 0.2 itself is zero
    weights.backward(gradient)
    assert weights.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0, -2.0, -2.0]
    assert scales.grad.tolist() == [11.0, -1.1e6]
    assert latent.grad.tolist() == [0.5, 5.0, 100.0, 1e3, 1e4, 2e5, 2e6]


def test_the_gradient_of_the_scales_is_that_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(40, generator=generator, dtype=torch.float64)
    scales = torch.tensor([0.7, 0.4], dtype=torch.float64, requires_grad=True)

    def loss(scales: Tensor) -> Tensor:
        return (ternarized(latent, scales, 0.1).sin() * torch.arange(40)).sum()

    assert torch.autograd.gradcheck(loss, scales)


def test_training_starts_from_the_weights_divided_by_their_largest() -> None:
    layer = nn.Linear(3, 1)
    weight = torch.tensor([[4.0, -2.0, 0.1]])
    layer.weight.data.copy_(weight)
    with ternary([layer], 0.05):
        found = layer.parametrizations.weight
        torch.testing.assert_close(found.original, weight / 4)
        assert found[0].scales.tolist() == [4.0, 2.0]
        assert layer.weight.tolist() == [[4.0, -2.0, 0.0]]
    assert type(layer) is nn.Linear
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}


def steps_down(weights: Tensor, layer: nn.Linear, wanted: float) -> float:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(weights) - wanted).square().mean().backward()
        optimizer.step()
    return float((layer(weights) - wanted).detach().square().mean())


def test_both_scales_are_learned() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    with ternary([layer], 0.05):
        assert steps_down(torch.tensor([[0.0, 1.0]]), layer, -0.3) < 1e-3
        assert steps_down(torch.tensor([[1.0, 0.0]]), layer, 1.7) < 1e-3
    torch.testing.assert_close(layer.weight.data, torch.tensor([[1.7, -0.3]]), rtol=0.1, atol=0.1)


def few_values(network: nn.Module) -> dict[str, int]:
    return {
        name: len(module.weight.unique())
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def test_a_trained_network_is_ternary_but_for_its_ends(trained: Trained, tmp_path: Path) -> None:
    network = copy.deepcopy(trained.network)
    report = compress_(
        network,
        Ternary(),
        data=trained.data,
        train=lambda model: train(
            model, trained.data, settings=TrainingSettings(epochs=6, lr=0.05, device="cpu")
        ),
    )
    counts = few_values(network)
    assert all(n <= 3 for name, n in counts.items() if name not in ("stem.0", "classifier.linear"))
    assert counts["stem.0"] > 3
    assert counts["classifier.linear"] > 3
    assert report.after.accuracy == pytest.approx(report.trained.validation_accuracy)
    assert report.after.accuracy > report.before.accuracy - 0.04
    assert len(report.changes) == len(counts) - 2
    for change in report.changes:
        weight = network.get_submodule(change.layer).weight
        assert float(weight.max()) == pytest.approx(change.positive)
        assert float(weight.min()) == pytest.approx(-change.negative)
        assert float((weight == 0).float().mean()) == pytest.approx(change.zeros)
    save_network(tmp_path, network, trained.card)
    loaded, _ = load_network(tmp_path)
    assert few_values(loaded) == counts
    exported = export_onnx(loaded, tmp_path / "model.onnx", card=trained.card)
    assert exported.argmax_agreement == 1


def test_the_classifier_of_every_head_stays_in_float(trained: Trained) -> None:
    other = copy.deepcopy(trained.network)
    renew_classifier_(other, 2)
    joined = join_heads({"digit": trained.network, "parity": other})
    compress_(joined, Ternary(), data=trained.data)
    names = {name for name, count in few_values(joined).items() if count > 3}
    classifiers = {f"classifier.classifiers.{i}.linear" for i in range(2)}
    assert names == {"stem.0", *classifiers}
    compress_(joined, Ternary(ends=True), data=trained.data)
    assert max(few_values(joined).values()) <= 3


def test_training_changes_which_weights_are_zero(trained: Trained) -> None:
    learned, plain = copy.deepcopy(trained.network), copy.deepcopy(trained.network)
    compress_(plain, Ternary(), data=trained.data)
    compress_(
        learned,
        Ternary(),
        data=trained.data,
        train=lambda model: fit(model, trained.data, epochs=2, rate=0.02),
    )
    assert accuracy(learned, trained.data) > accuracy(plain, trained.data)
    before, after = (n.get_submodule("head.0").weight == 0 for n in (plain, learned))
    assert (before != after).any()


def test_what_was_pruned_stays_zero_in_every_layer(trained: Trained) -> None:
    network = copy.deepcopy(trained.network)
    pruned = {}
    for call in layer_calls(network, trained.card.input_shape):
        mask = torch.rand(call.layer.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        call.layer.weight.data[mask] = 0
        pruned[call.name] = mask
    compress_(
        network,
        Ternary(threshold=0.02),
        data=trained.data,
        train=lambda model: fit(model, trained.data, epochs=1, rate=0.02),
    )
    for name, mask in pruned.items():
        assert (network.get_submodule(name).weight[mask] == 0).all()


def test_the_ends_too_if_asked_and_channels_can_still_be_pruned(trained: Trained) -> None:
    network = copy.deepcopy(trained.network)
    compress_(network, [Ternary(ends=True), ChannelPruning(round_to=4)], data=trained.data)
    assert all(n <= 3 for n in few_values(network).values())


def test_packed_in_fixed_bits_it_takes_two_a_weight(trained: Trained) -> None:
    network = copy.deepcopy(trained.network)
    Ternary().apply_(network, Tools((1, 8, 8), lambda _: None, trained.data))
    data = pack(network, "fixed")
    ternary = {name for name, n in few_values(network).items() if n == 3}
    rows = {row.name: row for row in describe(data) if row.name.removesuffix(".weight") in ternary}
    assert len(rows) > 10
    for row in rows.values():  # codes of two bits, or places of what is not zero and its signs
        assert row.clusters == (2 if row.form == "sparse_shared" else 3)
        assert row.position_bytes + row.index_bytes <= -(-2 * row.numel // 8)
    assert all(torch.equal(unpack(data)[key], x) for key, x in network.state_dict().items())


def test_wrong_options_are_refused() -> None:
    for threshold in (-0.1, 1.0):
        with pytest.raises(InputError, match=rf"threshold is {threshold}; expected a fraction"):
            Ternary(threshold=threshold)
    with pytest.raises(InputError, match=r"The network has 1 convolutions .* or ends=true"):
        compress_(nn.Sequential(nn.Conv2d(1, 2, 1)), Ternary(), input_shape=(1, 4, 4))
