"""Devices that cut sums of int8 products off are found by trying."""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fbnas.errors import InputError
from fbnas.latency import Device, saturation
from fbnas.latency.roofline import Roofline
from fbnas.latency.saturation import saturates


def test_it_is_what_the_cpu_is_known_for(tmp_path: Path) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.is_file():
        pytest.skip("what CPUs bear is read from Linux on x86")
    flags = next(x for x in cpuinfo.read_text().splitlines() if x.startswith("flags")).split()
    expected = not {"avx512_vnni", "avx_vnni"} & set(flags)
    assert saturates(Device()) == expected
    (tmp_path / "x.onnx").write_bytes(saturation._largest_sums())
    images = np.ones((1, 32, 8, 8), np.float32)
    found = Device().scores(tmp_path / "x.onnx", images, there=True)
    assert found == pytest.approx(32 * 32767 / (2 * 255 * 127) if expected else 32, rel=0.01)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(1.0, False), (32767 / (2 * 255 * 127), True), (None, False)],
    ids=["whole", "cut off", "no answer"],
)
def test_the_answer_to_the_largest_sums_tells(
    answer: float | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[dict[str, Any]] = []

    def scores(_: Device, path: Path, images: np.ndarray, **options: Any) -> np.ndarray:
        onnx.checker.check_model(onnx.load(path))
        asked.append(options)
        if answer is None:
            raise InputError("no such host")
        return np.full((1, 32), 32 * answer, np.float32)

    monkeypatch.setattr(Device, "scores", scores)
    saturation._saturates.cache_clear()
    assert saturates(Device(host="board")) == expected
    assert asked == [{"there": True}]  # not on this machine, whatever runtime is here
    assert ("could not be tried (no such host)" in caplog.text) == (answer is None)
    assert saturates(Device(host="board", name="other", threads=2)) == expected
    assert len(asked) == (2 if answer is None else 1)  # what was not answered is asked again
    assert not saturates(Roofline())
    assert not saturates(Device(runtime="pytorch"))
    saturation._saturates.cache_clear()


def test_the_answer_is_exact_where_nothing_is_cut_off(tmp_path: Path) -> None:
    """With whole numbers in float arithmetic the file says 32: it is cut off by kernels alone."""
    import onnxruntime

    (tmp_path / "x.onnx").write_bytes(saturation._largest_sums())
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        tmp_path / "x.onnx", options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"images": np.ones((1, 32, 8, 8), np.float32)})
    assert found == pytest.approx(32.0, rel=1e-4)
