"""fbnas compress writes packed weights where they pay, and such a folder is a network."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import SMALL, write_space, write_table

from fbnas.commands import main
from fbnas.commands.stages import Judge
from fbnas.compression import load_any
from fbnas.compression.packing import PACKED_FILE
from fbnas.space import load_network

BLOCKS = "space: tiny\nblocks: [k3_e1, k3_e3, k5_e1]\n"
QUICK = ["data.limit=320", "training.epochs=2", "compression.fine_tuning.epochs=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deep")
    (root / "blocks.yaml").write_text(BLOCKS)
    given = [f"architecture={root / 'blocks.yaml'}", f"space={write_space(root)}"]
    assert main(["train", *given, f"out={root / 'trained'}", "data.limit=320", QUICK[1]]) == 0
    return root / "trained"


def compress(trained: Path, out: Path, *more: str) -> dict:
    code = main(["compress", f"model={trained}", f"out={out}", "measure=false", *QUICK, *more])
    assert code == 0
    return json.loads((out / "result.json").read_text())


def test_a_folder_with_packed_weights_alone_is_exported_and_compressed_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shared"
    sharing = ["method=weight_sharing", "compression.weight_sharing.conv_bits=3"]
    result = compress(trained, out, *sharing)
    packed = out / PACKED_FILE
    assert result["packed_bytes"] == packed.stat().st_size
    assert result["steps"][0]["after"]["stored_bytes"] == result["packed_bytes"]
    assert result["packed_bytes"] < 0.9 * result["dense_bytes"]
    assert f"{packed}: {result['packed_bytes']:,} bytes" in capsys.readouterr().out
    whole = load_network(out)[0]
    (out / "weights.safetensors").unlink()
    for name, tensor in load_any(out)[0].state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])
    for model in (out, packed):
        assert main(["export", f"model={model}", f"out={tmp_path / 'e'}", "overwrite=true"]) == 0
    coder = "compression.packing.coder=arithmetic"
    again = compress(out, tmp_path / "again", *sharing, coder)
    assert again["packed_bytes"] < 0.9 * again["dense_bytes"]
    packed.write_bytes(packed.read_bytes()[:-5])
    assert main(["export", f"model={out}", f"out={tmp_path / 'f'}"]) == 2
    assert "the checksum is not that of the content" in capsys.readouterr().err


def test_a_run_compresses_deeply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "_ratio", lambda *stages: (1.0, 0.01))  # no clock decides
    table, out = write_table(tmp_path / "table.csv"), tmp_path / "r"
    chain = [f"space={write_space(tmp_path)}", f"table={table}", "target_ms=8", "networks=0"]
    short = ["candidates=2", "ranked=4", "compression.sparsity.steps=1", "max_accuracy_drop=1"]
    small = [option for option in SMALL if "methods" not in option]
    recipe = [*small, "compression=deep_compression"]
    assert main(["run", *chain, *short, *recipe, f"out={out}"]) in (0, 3)
    fp32, sparse, shared = json.loads((out / "result.json").read_text())["stages"]
    assert [x["name"] for x in (fp32, sparse, shared)] == ["fp32", "sparsity", "weight_sharing"]
    assert "packed_bytes" not in fp32
    tensors = load_any(out / "weight_sharing")[0].state_dict()
    layers = [x for name, x in tensors.items() if name.endswith("weight") and x.ndim > 1]
    zeros = sum(int((x == 0).sum()) for x in layers) / sum(x.numel() for x in layers)
    assert 0.5 < zeros < 0.8  # depthwise filters stay whole
    assert shared["packed_bytes"] < sparse["packed_bytes"]
    assert shared["packed_bytes"] == (out / "weight_sharing" / PACKED_FILE).stat().st_size
    for layer in layers:
        assert len(layer.unique()) <= 257


def test_packed_weights_that_do_not_pay_are_not_written(trained: Path, tmp_path: Path) -> None:
    result = compress(trained, tmp_path / "pruned", "method=channel_pruning")
    assert "packed_bytes" not in result
    assert not (tmp_path / "pruned" / PACKED_FILE).exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("packing.coder=huffmann", "Did you mean 'huffman'"),
        ("packing.codec=huffman", "packing"),
        ("weight_sharing.init=dense", "Did you mean 'density'"),
        ("weight_sharing.conv_bits=12", "conv_bits is 12; expected a whole number from 1 to 8"),
        ("weight_sharing.linear_bits=2.5", "expected a whole number"),
    ],
)
def test_wrong_options_are_refused_in_a_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    arguments = ["compress", f"model={trained}", f"compression.{option}", f"out={tmp_path / 'x'}"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
