"""Ten lines beside an exported file, which classify an image with nothing but the runtime.

They prepare the image as `training.images` does: turned as its camera says, grey or RGB, scaled to
cover the network's square and cropped at the centre. What they must know of the network stands in
them, the names of its classes in labels.txt beside them; the model file itself states both too.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from fbnas.export.metadata import LABELS, labels_text
from fbnas.files import atomic_write
from fbnas.space.heads import rows_of
from fbnas.space.network import NetworkCard

NEEDS = {
    "onnx": "onnxruntime, numpy and pillow",
    "openvino": "openvino, numpy and pillow",
    "tflite": "ai-edge-litert, numpy and pillow",
    "pte": "executorch, torch, numpy and pillow",
    "pt2": "torch, numpy and pillow",
}
_IMPORTS = {
    "onnx": "import onnxruntime",
    "openvino": "import openvino",
    "tflite": "from ai_edge_litert.interpreter import Interpreter",
    "pte": "import torch\nfrom executorch.runtime import Runtime",
    "pt2": "import torch",
}
_INT8_OPERATORS = "import torch.ao.quantization.fx._decomposed  # torch, and operators of int8"
_ARRAYS = ("images = np.float32([PIXELS])", "odds / odds.sum()")
_TENSORS = ("images = torch.tensor(np.float32([PIXELS]))", "scores.softmax(0).tolist()")
_FIRST_OUTPUT = 'network.run(None, {"images": images})[0][0]'
_ALL_OUTPUTS = 'np.concatenate(network.run(None, {"images": images}), axis=1)[0]'
_RUN = {
    "onnx": """\
network = onnxruntime.InferenceSession("MODEL")
odds = np.exp(network.run(None, {"images": images})[0][0].astype(float))
""",
    "openvino": """\
network = openvino.compile_model("MODEL", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
odds = np.exp(network(images)[0][0].astype(float))
""",
    "tflite": """\
network = Interpreter("MODEL").get_signature_runner()
odds = np.exp(network(args_0=images)["output_0"][0].astype(float))
""",
    "pte": """\
scores = Runtime.get().load_program("MODEL").load_method("forward").execute([images])[0][0]
""",
    "pt2": """\
network = torch.export.load("MODEL").module()
scores = network(images)[0]
""",
}


def write_example(
    folder: Path, format_name: str, models: list[str], card: NetworkCard, *, int8: bool
) -> Path:
    """Write `folder`/classify_FORMAT.py, and labels.txt beside it; return the former.

    Args:
        models: names of the files that it can run: the first, or another once it is edited.
        card: of the network that they hold.
        int8: whether there is one of int8 among them.
    """
    path = folder / f"classify_{format_name}.py"
    channels, side, _ = card.input_shape
    imports = _IMPORTS[format_name]
    if format_name == "pt2" and int8:
        imports = _INT8_OPERATORS
    prepare, probabilities = _TENSORS if "torch" in NEEDS[format_name] else _ARRAYS
    run = _RUN[format_name].replace("MODEL", models[0])
    if card.heads:
        run = run.replace(_FIRST_OUTPUT, _ALL_OUTPUTS)
    pixels = _pixels(card, channels_last=format_name == "tflite")
    others = "".join(f"\n{models[0]} may be {name} instead." for name in models[1:])
    atomic_write(folder / LABELS, labels_text(card.class_names))
    atomic_write(
        path,
        f'"""Classify an image of 8 bits a channel, in this folder: python {path.name} IMAGE\n\n'
        f'Needs {NEEDS[format_name]}.{others}\n"""\n\n'
        "import sys\n\n"
        f"import numpy as np\n{imports}\nfrom PIL import Image, ImageOps\n\n"
        "image = ImageOps.exif_transpose(Image.open(sys.argv[1]))"
        f'.convert("{"L" if channels == 1 else "RGB"}")\n'
        f"pixels = np.asarray(ImageOps.fit(image, ({side}, {side}), Image.Resampling.BILINEAR))"
        " / 255\n"
        f"{prepare.replace('PIXELS', pixels)}\n"
        f"{run}{_answer(card, probabilities)}",
    )
    return path


def _answer(card: NetworkCard, probabilities: str) -> str:
    """Write what prints the most probable class and its probability, or those of each head."""
    names = f'open("{LABELS}", encoding="utf-8").read().splitlines()'
    if not card.heads:
        return f"print(*max(zip({probabilities}, {names})))\n"
    places = [(name, rows.start, rows.stop) for name, rows in rows_of(card.heads).items()]
    for scores in ("odds", "scores"):
        probabilities = re.sub(rf"\b{scores}\b", f"{scores}[first:last]", probabilities)
    return (
        f"names = {names}\n"
        f"for head, first, last in {places}:\n"
        f"    print(head, *max(zip({probabilities}, names[first:last])))\n"
    )


def _pixels(card: NetworkCard, *, channels_last: bool) -> str:
    """Write how `pixels`, (h, w) or (h, w, 3), become an image as the file takes it."""
    if len(card.mean) > 1:
        scaled = f"(pixels - {_numbers(card.mean)}) / {_numbers(card.std)}"
        return scaled if channels_last else f"({scaled}).transpose(2, 0, 1)"
    scaled = f"(pixels - {card.mean[0]:.6g}) / {card.std[0]:.6g}"
    return f"({scaled})[..., None]" if channels_last else f"[{scaled}]"


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"
