"""A short program beside an exported file, which classifies an image with nothing but the runtime.

It reads what it needs to know from the file itself, and prepares the image as `training.images`
does: turned as its camera says, 16 bits scaled to 8, grey or RGB, scaled to cover the network's
square and cropped at the centre.
"""

from pathlib import Path

from fbnas.files import atomic_write

NEEDS = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tflite": "ai-edge-litert",
    "pte": "executorch and torch",
    "pt2": "torch",
}
_IMPORTS = {
    "onnx": "import onnxruntime",
    "openvino": "import openvino",
    "tflite": "from ai_edge_litert.interpreter import Interpreter",
    "pte": "import torch\nfrom executorch.runtime import Runtime",
    "pt2": "import torch",
}
_FROM_PILLOW = "from PIL import Image, ImageOps"
_INT8_OPERATORS = "import torch.ao.quantization.fx._decomposed  # the operators of int8 files"
_LOAD = {
    "onnx": """\
network = onnxruntime.InferenceSession(model)
stated = network.get_modelmeta().custom_metadata_map
about = {key: json.loads(stated[f"fbnas.{key}"]) for key in ("preprocessing", "class_names")}
""",
    "openvino": """\
network, f32 = openvino.Core().read_model(model), {"INFERENCE_PRECISION_HINT": "f32"}
stated = {key: network.get_rt_info(["fbnas", key]) for key in ("preprocessing", "class_names")}
about = {key: json.loads(value.astype(str)) for key, value in stated.items()}
""",
    "tflite": """\
network = Interpreter(str(model))
network.allocate_tensors()
about = json.loads(zipfile.ZipFile(model).read("fbnas.json"))
""",
    "pte": """\
program = Runtime.get().load_program(model)
network, stated = (program.load_method(name) for name in ("forward", "fbnas"))
about = json.loads(stated.execute([])[0])
""",
    "pt2": """\
stated = {"fbnas.json": ""}
network = torch.export.load(model, extra_files=stated).module()
about = json.loads(stated["fbnas.json"])
""",
}
_PREPARE = """\
prepare = about["preprocessing"]
image = ImageOps.exif_transpose(Image.open(sys.argv[1]))
if image.mode.startswith("I"):  # 16 bits
    image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
image = image.convert("L" if prepare["channels"] == 1 else "RGB")
image = ImageOps.fit(image, 2 * (prepare["resolution"],), Image.Resampling.BILINEAR)
pixels = np.asarray(image).reshape(1, image.height, image.width, prepare["channels"])
images = ((pixels / 255 - prepare["mean"]) / prepare["std"]).astype(np.float32)
"""
_CHANNELS_FIRST = "images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))\n"
_RUN = {
    "onnx": f"""\
{_CHANNELS_FIRST}scores = network.run(None, {{"images": images}})[0][0]
""",
    "openvino": f"""\
{_CHANNELS_FIRST}scores = openvino.compile_model(network, "CPU", f32)(images)[0][0]
""",
    "tflite": """\
network.set_tensor(network.get_input_details()[0]["index"], images)
network.invoke()
scores = network.get_tensor(network.get_output_details()[0]["index"])[0]
""",
    "pte": f"""\
{_CHANNELS_FIRST}scores = network.execute([torch.from_numpy(images)])[0][0].numpy()
""",
    "pt2": f"""\
{_CHANNELS_FIRST}scores = network(torch.from_numpy(images))[0].detach().numpy()
""",
}
_PRINT = """\
probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
print(f"{about['class_names'][scores.argmax()]} {probabilities.max():.4f}")
"""


def write_example(folder: Path, format_name: str, models: list[str], *, int8: bool) -> Path:
    """Write `folder`/classify_FORMAT.py and return it.

    Args:
        models: names of the files that it can run; it takes the first unless told otherwise.
        int8: whether there is one of int8 among them.
    """
    path = folder / f"classify_{format_name}.py"
    others = f" [{' | '.join(models)}]" if len(models) > 1 else ""
    needs = NEEDS[format_name]
    standard = ["json", "sys", *(["zipfile"] if format_name == "tflite" else [])]
    imports = ["import numpy as np", *_IMPORTS[format_name].split("\n")]
    if format_name == "pt2" and int8:
        imports.append(_INT8_OPERATORS)
    ordered = sorted([*imports, _FROM_PILLOW], key=_place)
    text = (
        f'"""Classify an image: python {path.name} IMAGE{others}\n\n'
        f'Needs {needs}, numpy and pillow.\n"""\n\n'
        + "".join(f"import {name}\n" for name in standard)
        + "from pathlib import Path\n\n"
        + "".join(f"{line}\n" for line in ordered)
        + f'\nmodel = Path(__file__).with_name([*sys.argv, "{models[0]}"][2])\n'
        + _LOAD[format_name]
        + _PREPARE
        + _RUN[format_name]
        + _PRINT
    )
    atomic_write(path, text)
    return path


def _place(line: str) -> tuple[bool, str]:
    """Where a line stands among sorted imports."""
    return line.startswith("from"), line.casefold()
