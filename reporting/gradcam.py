"""Grad-CAM: where a layer of a network sees evidence for a class, and how that is drawn on an image."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from training.inputs import count_classes
from training.optim import copy_of
from utils import inner_model, nearest

SMALLEST_MAP = 5  # pixels a side: a smaller map is too coarse to show where something is
COLOURS = "plasma"  # from blue to yellow, without a grey, so that it stands out from the grey image


def cam_layers(model: nn.Module, image_size: int = 32) -> dict[str, int]:
    """The stages of a network whose maps are large enough for Grad-CAM: name and side in pixels."""
    return large_stages(map_shapes(model, image_size))


def large_stages(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Those of a network's maps that belong to a stage and are large enough: name and side.

    Its stages are its children; where none of them has such maps, as where one child holds all
    convolutions, they are the children's children, and so on.
    """
    sides = {name: min(shape[2:]) for name, shape in shapes.items() if min(shape[2:]) >= SMALLEST_MAP}
    outermost = min((name.count(".") for name in sides), default=0)
    return {name: side for name, side in sides.items() if name.count(".") == outermost}


def name_of_layer(model: nn.Module, layer: Any, image_size: int = 32) -> str:
    """The name of a layer, from its name, the end of it, the module itself, or a list of one of these.

    None is the last stage whose maps are large enough for an image of `image_size` pixels.

    A name that the model lacks is returned as it is.

    Raises:
        ValueError: the module is none of the model's, or there are several, or none can be used.
    """
    if layer is None:
        stages = cam_layers(model, image_size)
        if not stages:
            raise ValueError(
                "no stage of this model has maps of 5 x 5 or more: name a layer inside of it"
            )
        return list(stages)[-1]
    if isinstance(layer, list | tuple):
        if len(layer) != 1:
            raise ValueError(
                f"Grad-CAM is of one layer, not {len(layer)}: plot_gradcam_layers shows several"
            )
        layer = layer[0]
    names = {name: module for name, module in inner_model(model).named_modules() if name}
    if isinstance(layer, nn.Module):
        for name, module in names.items():
            if module is layer:
                return name
        raise ValueError(
            f"the layer, a {type(layer).__name__}, is no part of this model: take it from the model "
            f"itself, or give a name, such as {next(iter(names), 'none')}"
        )
    ends = [name for name in names if name.endswith(f".{layer}")]
    return ends[0] if layer not in names and len(ends) == 1 else layer


def map_shapes(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """Output shape (1, C, H, W) of every named layer that makes a map, for one image."""
    model = inner_copy(model).eval()
    shapes = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                shapes[name] = tuple(output.shape)

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(note(name))
    with torch.inference_mode(False), torch.no_grad():
        weight = next(model.parameters())
        model(torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype))
    return shapes


def inner_copy(model: nn.Module) -> nn.Module:
    """A copy of a model; of a compiled or parallel one, a copy of the model inside it.

    Only the model inside has the names by which its layers are known.

    Raises:
        ValueError: it cannot be copied.
    """
    inner = inner_model(model)
    with torch.inference_mode(False):
        return copy_of(inner, inner)


def gradcam(
    model: nn.Module, images: Tensor, layer: Any, targets: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Grad-CAM (Selvaraju et al., arXiv:1610.02391): where a layer sees evidence for a class.

    A value estimates, by the gradient at the layer, how much the place adds to the class's score, which
    is its logit. Maps are not scaled one by one, so that those of two classes can be compared. Evidence
    against the class has values under 0, which become 0 as in the paper. A copy of the model in float32
    is used, so that mode, gradients and hooks of the model itself stay as they are.

    Args:
        images: normalised float (N, 3, H, W); or one of them.
        layer: name of a layer as in `model.named_modules()`, such as "layer2" or "layer2.0.conv1"; or
            the layer itself, such as `model.layer2`, or a list of it; None: the last that can be used.
        targets: the class to explain for each image, (N,).

    Returns:
        float32 (N, H, W), 0 or more, enlarged to the size of the images. Where a map is 0 everywhere,
        the layer sees no evidence for the class.

    Raises:
        ValueError: the layer is unknown, its map is under 5 x 5, or the targets do not fit the images.
    """
    from pytorch_grad_cam import GradCAM  # two seconds of imports
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    images = check_images(images)
    layer = name_of_layer(model, layer, images.shape[-1])
    check_layer(model, layer, images.shape[-1])
    targets = [operator.index(target) for target in np.atleast_1d(targets)]
    if len(targets) != len(images):
        raise ValueError(f"{len(targets)} targets for {len(images)} images")
    if not targets:
        return np.zeros((0, *images.shape[2:]), np.float32)
    model = inner_copy(model).float().eval().requires_grad_()
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.no_grad():
        images = images.clone()  # a tensor made in inference mode allows no gradient, its clone does
        classes = count_classes(model, images, device, torch.float32)
    if not all(0 <= target < classes for target in targets):
        raise ValueError(f"targets must be 0 to {classes - 1}, not {min(targets)} to {max(targets)}")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        # Not as a context manager, which would hide an IndexError. Its hooks are on the copy alone.
        module = model.get_submodule(layer)
        cam = GradCAM(model, [module])
        wanted = [ClassifierOutputTarget(target) for target in targets]
        cam(images.to(device), wanted)  # forward and backward; its maps are each scaled from 0 to 1
        values = (cam.activations_and_grads.activations[0], cam.activations_and_grads.gradients[0])
        maps = cam.get_cam_image(images, module, wanted, *(x.float().cpu().numpy() for x in values))
    side = images.shape[:1:-1]
    return np.stack([cv2.resize(one, side) for one in np.maximum(maps, 0).astype(np.float32)])


def check_images(images: Any) -> Tensor:
    """Images as a batch (N, 3, H, W).

    Raises:
        ValueError: they are pictures, or something else.
    """
    images = images if isinstance(images, Tensor) else torch.as_tensor(np.asarray(images))
    images = images[None] if images.dim() == 3 else images
    if not images.is_floating_point():
        raise ValueError(
            f"Grad-CAM takes what the network takes, not {images.dtype} pictures: give "
            "normalize(images), from transforms"
        )
    if images.dim() != 4:
        raise ValueError(f"images must be (N, 3, H, W), not {tuple(images.shape)}")
    return images


def check_layer(model: nn.Module, layer: str, image_size: int) -> tuple[int, int]:
    """The height and width of a layer's maps, in pixels.

    Raises:
        ValueError: Grad-CAM cannot use the layer; the message names the layers that it can use.
    """
    shapes = map_shapes(model, image_size)
    allowed = ", ".join(f"{name} ({side} px)" for name, side in large_stages(shapes).items())
    if layer not in shapes:
        raise ValueError(f"unknown layer {layer!r}; choose from {allowed}{nearest(layer, shapes)}")
    height, width = shapes[layer][2:]
    if min(height, width) < SMALLEST_MAP:
        raise ValueError(
            f"layer {layer} has maps of {height} x {width}, under {SMALLEST_MAP} x {SMALLEST_MAP}; "
            f"choose from {allowed}"
        )
    return height, width


def overlay(
    image: np.ndarray, heat: np.ndarray, opacity: float = 0.75, top: float | None = None
) -> np.ndarray:
    """Lay a map in colour over its image in grey; the more evidence, the less of the image is seen.

    Args:
        image: uint8 (H, W, 3).
        heat: the map, float (h, w), 0 or more; it is resized to the image.
        opacity: of the colour where the evidence is greatest, 0 to 1.
        top: the value that gets the brightest colour; none: the greatest of this map. Maps that are to
            be compared need the same.

    Returns:
        uint8 (H, W, 3).
    """
    top = float(heat.max() if top is None else top) or 1.0
    heat = np.clip(cv2.resize(heat, image.shape[1::-1]) / top, 0, 1)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    cover = opacity * heat[..., None]
    colors = 255 * matplotlib.colormaps[COLOURS](heat)[..., :3]
    return (grey * (1 - cover) + colors * cover).round().astype(np.uint8)
