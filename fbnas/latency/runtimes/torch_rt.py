"""PyTorch itself: a program of torch.export, run eagerly, compiled by Inductor, or on a CUDA GPU.

compiled: torch.compile with frozen weights, which needs a C++ compiler; `feed` compiles, so the
timed part does not. cuda: the program is captured as a CUDA graph and replayed, timed by CUDA
events; fp32 is fp32: TF32 is off.

int8 is PT2E with the quantizer of x86 Inductor (from torchao, needed for the conversion alone).
Only the compiled provider executes it in int8 (FBNet-C here: 3.5 ms, fp32 6.7 ms); eager and cuda
would compute in float what they then round, so they refuse such a program.

Not called torch.py: beside runner.py on a device such a file would shadow the package.
"""

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import time
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NAME = "pytorch"
INSTALL = "pip install torch"
SUFFIX = ".pt2"
PRECISIONS = ("fp32", "int8")
PROVIDERS = {
    "eager": INSTALL,
    "compiled": "a C++ compiler (apt install g++, or the variable CXX)",
    "cuda": "an NVIDIA GPU and a CUDA build of torch (pytorch.org/get-started)",
}
TOLERANCE = {"fp32": 1e-3, "int8": 0.3}
CONVERTER: tuple[str, ...] = ()
CONVERTER_INT8 = ("torchao",)
MIXES = True


def available() -> bool:
    return importlib.util.find_spec("torch") is not None


def version() -> str:
    import torch

    return str(torch.__version__)


def providers() -> list[str]:
    import torch

    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    compiled = ["compiled"] if shutil.which(compiler) else []
    return ["eager", *compiled, *(["cuda"] if torch.cuda.is_available() else [])]


def compile(
    module: "torch.nn.Module",
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    precision: str,
    batch: int | None,
    calibration: Sequence[np.ndarray],
    float_layers: Sequence[bool] = (),
) -> None:
    """Write a .pt2 file.

    Args:
        module: in eval mode, on the CPU, or the module of an exported program.
        input_shape: (channels, height, width) of one image.
        precision: fp32 or int8.
        batch: images per run; None leaves it open in fp32 and is 1 in int8.
        calibration: arrays (batch, c, h, w) float32, from which int8 takes its ranges.
        float_layers: of every convolution and linear layer, in the order of computing, whether int8
            leaves it in float, with what follows it; () for none.

    Raises:
        ValueError: the module has another number of layers.
    """
    import torch

    is_open = batch is None and precision == "fp32"
    # A batch of 1 would be taken for a constant.
    images = (torch.zeros(2 if is_open else batch or 1, *input_shape),)
    sizes = ({0: torch.export.Dim.DYNAMIC},) if is_open else None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, images, dynamic_shapes=sizes, strict=False)
        if precision == "int8":
            quantized = _quantized(program.module(), calibration, float_layers)
            program = torch.export.export(quantized, images, strict=False)
        torch.export.save(program, path)


def _quantized(module: Any, calibration: Sequence[np.ndarray], float_layers: Sequence[bool]) -> Any:
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    from torchao.utils import should_reduce_range

    class Quantizer(x86.X86InductorQuantizer):
        def annotate(self, model: Any) -> Any:
            annotated = super().annotate(model)
            for node in _left_in_float(annotated.graph, float_layers):
                node.meta.pop("quantization_annotation", None)
            return annotated

    quantizer = Quantizer()
    # 7-bit weights on x86 without VNNI, whose sums of 8 bits saturate
    config = x86.get_default_x86_inductor_quantization_config(
        reduce_range=should_reduce_range(torch.device("cpu"))
    )
    quantizer.set_global(config)
    prepared = prepare_pt2e(module, quantizer)
    for images in calibration:
        prepared(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)))
    return convert_pt2e(prepared)


def _left_in_float(graph: Any, float_layers: Sequence[bool]) -> set[Any]:
    """Return the nodes of layers in float, each with those up to the next; before it, of the first.

    Raises:
        ValueError: it has another number of layers.
    """
    import torch

    if not float_layers:
        return set()

    aten = torch.ops.aten
    layers, left = 0, set[Any]()
    for node in graph.nodes:
        if node.op != "call_function":  # weights come before all layers, not before their own
            continue
        layers += getattr(node.target, "overloadpacket", None) in (aten.conv2d, aten.linear)
        if layers <= len(float_layers) and float_layers[max(layers, 1) - 1]:
            left.add(node)
    if layers != len(float_layers):
        raise ValueError(f"the network has {layers} layers, float_layers is of {len(float_layers)}")
    return left


class _Model:
    """A program on a provider, its images and its last output (on cuda: those of the graph)."""

    def __init__(self, program: Any, provider: str) -> None:
        self.provider = provider
        self.shape = _input_sizes(program)
        self.module = program.module(check_guards=False)  # `feed` checks; guards cost 50 us a run
        self.call = self.module
        self.graph: Any = None
        self.images: Any = None
        self.output: Any = None


def load(path: Path, settings: Mapping[str, Any]) -> Any:
    """Return the program on the provider asked for.

    Raises:
        ValueError: not a program of torch.export, or the provider is not to be had.
    """
    import torch
    from torch.export.passes import move_to_device_pass

    provider = settings.get("provider") or "eager"
    if provider not in providers():
        way = f"; it needs {PROVIDERS[provider]}" if provider in PROVIDERS else ""
        raise ValueError(f"PyTorch has no {provider} here, only {', '.join(providers())}{way}")
    torch.set_num_threads(int(settings.get("threads", 1)))
    if not zipfile.is_zipfile(path):  # torch would log its traces before it raises
        raise ValueError(f"{path} is no program of torch.export")
    with contextlib.suppress(ImportError):  # registers the operators of int8 programs
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:  # JSON, unpickling and torch's own errors
        raise ValueError(f"no program of torch.export: {error}") from error
    quantized = any("quantized_decomposed" in str(node.target) for node in program.graph.nodes)
    if quantized and provider != "compiled":
        raise ValueError(f"{provider} would only imitate int8; provider=compiled executes it")
    if provider == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        program = move_to_device_pass(program, "cuda")
    model = _Model(program, provider)
    if provider == "compiled":
        _set_up_inductor()
        model.call = torch.compile(model.module, dynamic=False)
    return model


def _set_up_inductor() -> None:
    from torch._inductor import config

    config.freezing = True  # weights become constants, packed for the CPU: twice as fast
    config.compile_threads = 1  # no pool of processes that would live on beside the measurement


def feed(model: Any, images: np.ndarray) -> None:
    """Bind images (batch, c, h, w) float32; compile or capture for them.

    Raises:
        ValueError: images of another shape than the program takes, or it cannot be compiled.
    """
    import torch

    fits = len(images.shape) == len(model.shape) and all(
        want in (-1, size) for size, want in zip(images.shape, model.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"the model takes images of shape {model.shape}, these are {images.shape}")
    bound = torch.from_numpy(np.array(images, dtype=np.float32))
    if model.provider == "cuda":
        if model.graph is None or model.images.shape != bound.shape:
            _capture(model, bound.cuda())
        model.images.copy_(bound)
        return
    model.images = bound
    if model.provider == "compiled":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(model)


def _capture(model: _Model, images: Any) -> None:
    """Record the program as a CUDA graph that reads `images`, after a warm-up on its own stream."""
    import torch

    model.images = images
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    model.module(model.images)
            torch.cuda.current_stream().wait_stream(stream)
            model.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(model.graph):
                model.output = model.module(model.images)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def run(model: Any) -> None:
    import torch

    if model.graph is not None:
        model.graph.replay()
        torch.cuda.synchronize()
        return
    try:
        with torch.no_grad():
            model.output = model.call(model.images)
    except RuntimeError as error:  # Inductor's errors are such
        raise ValueError(str(error)) from error


def run_timed(model: Any, repeats: int) -> float:
    """Mean ms of a run: by events on a GPU, which see no launch by the host, else by its clock."""
    import torch

    if model.graph is None:
        start_ns = time.perf_counter_ns()
        for _ in range(repeats):
            run(model)
        return (time.perf_counter_ns() - start_ns) / repeats / 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        model.graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def result(model: Any) -> np.ndarray:
    return np.array(model.output.detach().cpu().numpy(), dtype=np.float32)


def input_shape(model: Any) -> tuple[int, ...]:
    return tuple(model.shape)


def _input_sizes(program: Any) -> tuple[int, ...]:
    name = program.graph_signature.user_inputs[0]
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    return tuple(size if isinstance(size, int) else -1 for size in value.shape)
