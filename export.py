"""Writes a trained network as a file that runs without this package and answers the same."""

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from files import write_whole
from transforms import normalize
from utils import choose, six_views

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 2)  # sizes to try; a third batch holds the rest of the images
# Of the largest logit. Another order of sums moves float32 by about 1e-6, a wrong layer by much more.
TOLERANCE = 1e-4


class PixelsToLogits(nn.Module):
    """A network with its normalisation inside, so that whoever runs it cannot get that wrong.

    Args:
        model: takes normalised images; is put into evaluation mode.
        mean, std: of the normalisation, for pixels from 0 to 1.
        tta: answer with the mean logits of six views of each image, as in `utils.six_views`.

    Shape:
        uint8 (N, H, W, 3), RGB, as decoders return it -> logits float32 (N, K).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], tta: bool = False):
        super().__init__()
        self.model, self.tta = model, tta
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scale to 0..1, normalise, classify."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        inputs = (pixels - self.mean) / self.std
        return mean_logits(self.model, inputs, self.tta)


def export_model(
    path: str | Path, model: nn.Module, card: dict, format: str, images: np.ndarray
) -> float:
    """Write a network as ONNX or as a `torch.export` program, for batches of any size.

    What is written is loaded and run on `images` first, in batches of 1, 2 and the rest; if it does not
    answer as the model does, nothing is written. `metadata_of` goes with it.

    Args:
        path: of the file; a previous one stays whole until the new one is.
        model: in float32 on the CPU; is put into evaluation mode.
        card: as in `weights_file.save_weights`.
        format: "onnx", which needs requirements-export.txt, or "torch".
        images: real ones, uint8 (N, H, W, 3), more than three, of the card's `image_size`.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: unknown format, or packages that are missing.
        FloatingPointError: the exported network answers something else.
        OSError: the file could not be written.
    """
    choose("format", format, FORMATS)
    tta = bool(card.get("config", {}).get("tta"))
    network = PixelsToLogits(model, card["mean"], card["std"], tta)
    to_bytes, to_function = (onnx_bytes, run_onnx) if format == "onnx" else (torch_bytes, run_torch)
    example = torch.zeros(2, *images.shape[1:], dtype=torch.uint8)
    content = to_bytes(network, example, metadata_of(card))
    answer = to_function(content)
    with torch.inference_mode():
        inputs = normalize(images, card["mean"], card["std"])
        expected = mean_logits(model, inputs, tta).numpy()
    batches = np.split(images, np.cumsum(BATCHES))
    logits = np.concatenate([answer(batch) for batch in batches])
    difference = float(np.abs(logits - expected).max())
    if not difference <= TOLERANCE * np.abs(expected).max():
        raise FloatingPointError(
            f"the exported network's logits differ by up to {difference:.2g}; nothing was written"
        )
    write_whole(path, content)
    return difference


def mean_logits(model: nn.Module, inputs: torch.Tensor, tta: bool) -> torch.Tensor:
    """Logits of images, with `tta` the mean over six views of each."""
    views = six_views(inputs) if tta else [(1.0, inputs)]
    return torch.stack([share * model(view) for share, view in views]).sum(0)


def metadata_of(card: dict) -> dict[str, str]:
    """What the user of an exported network needs to know; lists are JSON."""
    size = card["image_size"]
    return {
        "model": card["model"],
        "classes": json.dumps(card["classes"]),
        "input": f"images: uint8 (N, {size}, {size}, 3), RGB; the normalisation is inside",
        "six views": "averaged inside" if card.get("config", {}).get("tta") else "not used",
        "output": f"logits: float32 (N, {len(card['classes'])}); softmax makes them probabilities",
    }


def torch_bytes(network: nn.Module, images: torch.Tensor, metadata: dict[str, str]) -> bytes:
    """A `torch.export` program; each entry of the metadata is one of its extra files."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(network, (images,), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=metadata)
    return buffer.getvalue()


def run_torch(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """The function that an exported program is: images to logits, both NumPy arrays."""
    module = torch.export.load(io.BytesIO(content)).module()

    def answer(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return answer


def onnx_bytes(network: nn.Module, images: torch.Tensor, metadata: dict[str, str]) -> bytes:
    """An ONNX model whose metadata_props are the metadata."""
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}: pip install -r requirements-export.txt, "
            "or use --format torch"
        )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter's own workings; the answers are checked
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            dynamic_shapes={"images": {0: "batch"}},
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None  # as only the exporter before `dynamo` returns
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def run_onnx(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """The function that an ONNX model is in ONNX Runtime: images to logits, both NumPy arrays."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]
