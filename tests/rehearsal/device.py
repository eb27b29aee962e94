"""A pretend accelerator: tensors on device "rehearsal" hold CPU tensors, and count what a GPU would do.

It stands in for CUDA where there is none. Its tensors refuse to meet those of the CPU, as a GPU's do,
and the CPU's own kernels compute every operation, so that its results are the CPU's to the bit. It is no
model of a GPU's kernels, of its memory, or of its generator of random numbers.

Importing this file registers the device for the rest of the process, in which PyTorch must not have
computed a gradient before. So these tests have a process of their own: `pytest tests/rehearsal`.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _foreach_utils, _pytree
from torch.utils import backend_registration as backend

NAME = "rehearsal"
ROOT = Path(__file__).parent.parent.parent
aten = torch.ops.aten

# Kernels whose result has a size that depends on values: a GPU is waited for to learn it.
OF_UNKNOWN_SIZE = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
# Those that only make room, and launch nothing.
ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# What autocast computes in the lower precision and in float32, of what this package calls.
LOWER_PRECISION = ("conv2d", "linear", "matmul", "mm", "addmm", "bmm")
FULL_PRECISION = ("cross_entropy_loss",)


@dataclass
class Counts:
    """What was asked of the device, in its order."""

    kernels: list[str] = field(default_factory=list)  # operations that compute, by name
    copies: list[str] = field(
        default_factory=list
    )  # between host and device, with the place in the code
    waits: list[str] = field(default_factory=list)  # of the host for the device


counts = Counts()


@contextmanager
def counted() -> Iterator[Counts]:
    """Count anew what is asked of the device within this block."""
    global counts
    before, counts = counts, Counts()
    try:
        yield counts
    finally:
        counts = before


def note(what: str, *lists: list[str]) -> None:
    """Add an event to some lists, with the innermost line of this package that it came from."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = ROOT in path.parents and ".venv" not in path.parts and "tests" not in path.parts
        if ours:
            break
        frame = frame.f_back
    place = f" in {path.name}, {frame.f_code.co_name}" if frame is not None else ""
    for events in lists:
        events.append(what + place)


class Far(torch.Tensor):
    """A tensor on the device: its sizes and strides, and a CPU tensor `near` with the values."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        # A view of a normal tensor is a normal tensor in inference mode, too.
        with torch.inference_mode(near.is_inference()):
            return torch.Tensor._make_wrapper_subclass(
                cls,
                near.size(),
                strides=near.stride(),
                storage_offset=near.storage_offset(),
                dtype=near.dtype,
                device=f"{NAME}:0",
            )

    def __init__(self, near):
        self.near = near

    def __repr__(self):
        return f"Far({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, *args, **(kwargs or {}))

    def tolist(self):
        note("tolist", counts.copies, counts.waits)
        return self.near.tolist()

    def data_ptr(self):
        return self.near.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Far(self.near.detach().clone()).requires_grad_(self.requires_grad)
            vars(copy).update({name: x for name, x in vars(self).items() if name != "near"})
            memo[id(self)] = copy
            copy.grad = None if self.grad is None else self.grad.__deepcopy__(memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        """As `torch.load(..., map_location="cpu")` reads what a GPU's tensor was saved as."""
        note("save", counts.copies, counts.waits)
        return self.near.detach().__reduce_ex__(protocol)


def call(func, *args, **kwargs):
    """Compute an operation on the CPU, and put what belongs on the device there."""
    tensors = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    device = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    count(func, args, kwargs, device)
    refuse_to_mix(func, tensors, far)
    near_args, near_kwargs = _pytree.tree_map(
        lambda x: x.near if isinstance(x, Far) else x, (args, kwargs)
    )
    if device is not None:
        near_kwargs["device"] = torch.device("cpu")
    with torch._C._DisableAutocast():
        out = func(*near_args, **near_kwargs)
    returns = func._schema.returns
    if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        changed = kwargs["out"] if "out" in kwargs else args[0]
        if isinstance(changed, Far):
            assert layout(changed) == layout(changed.near), f"{func} changes a tensor's layout"
        return changed
    if device == "cpu" or not (far or device == NAME):
        return out
    return _pytree.tree_map(lambda x: Far(x) if isinstance(x, torch.Tensor) else x, out)


def layout(tensor) -> list[tuple[int, int]]:
    """Size and stride of each dimension, but for those of size 1, whose stride says nothing."""
    return [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if pair[0] != 1]


def count(func, args, kwargs, device) -> None:
    """Note what an operation would be on a GPU: a kernel, a copy, a wait, or nothing of these."""
    name, returns = func._schema.name.removeprefix("aten::"), func._schema.returns
    if name == "copy_" and isinstance(args[0], Far) is not isinstance(args[1], Far):
        blocking = not (isinstance(args[0], Far) and (*args, *kwargs.values(), False)[2])
        direction = "to the device" if isinstance(args[0], Far) else "to the host"
        note(direction, counts.copies, *[counts.waits] * blocking)
    elif name == "_to_copy" and device == "cpu":
        note("to the host", counts.copies, counts.waits)
    elif name in ("_local_scalar_dense", "equal"):
        note("item", counts.copies, counts.waits)
    elif name not in ROOM and (not returns or is_new(returns[0])):
        counts.kernels.append(name)
        if name in OF_UNKNOWN_SIZE:
            note(name, counts.waits)


def is_new(result) -> bool:
    """Whether a result is computed or written into; else it is a view, and nothing is launched."""
    return result.alias_info is None or result.alias_info.is_write


def refuse_to_mix(func, tensors, far) -> None:
    """Raise where tensors of the device and of the CPU meet, but for what CUDA allows, too.

    It takes numbers (tensors without a dimension) from the CPU, and copies.
    """
    if not far or func in (aten._to_copy.default, aten.copy_.default):
        return
    foreign = [tuple(x.shape) for x in tensors if not isinstance(x, Far) and x.dim()]
    if foreign:
        raise RuntimeError(f"{func}: a tensor on the CPU {foreign} meets one on the device {NAME}")


def autocasting(func):
    """The operation `func` within autocast: its arguments get the number format of its list first."""
    full = func._schema.name.removeprefix("aten::") in FULL_PRECISION

    def cast(x):
        floating = isinstance(x, Far) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.float32 if full else torch.get_autocast_dtype(NAME)) if floating else x

    def run(*args, **kwargs):
        with torch.autocast(NAME, enabled=False):
            return func(*_pytree.tree_map(cast, args), **_pytree.tree_map(cast, kwargs))

    return run


class Module(backend._DummyBackendModule):
    """What PyTorch asks of `torch.rehearsal`."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


backend._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
# As on a GPU, a parameter that moves to the device stays the object that its optimizer holds.
torch.__future__.set_swap_module_params_on_conversion(True)
_foreach_utils._foreach_supported_types.append(Far)
LIBRARIES = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
LIBRARIES[0].fallback(call, "PrivateUse1")
LIBRARIES[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
# By name, what PyTorch calls below Python, and what it would make by changing the size of a tensor.
for function in (aten.copy_.default, aten.arange.default, aten.arange.start, aten.arange.start_step):
    LIBRARIES[1].impl(function, functools.partial(call, function), "PrivateUse1")
for name in (*LOWER_PRECISION, *FULL_PRECISION):
    LIBRARIES[1].impl(name, autocasting(getattr(aten, name).default), "AutocastPrivateUse1")
