"""What moves the weights: optimizers by name, the schedule, and the running average."""

import contextlib
import copy
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils import choose, pick_precision

OPTIMIZERS = ("adam", "adamw", "sgd", "muon")
MOMENTUM = 0.9
# With Muon, norms, biases and the last layer are trained by SGD at a learning rate that is this multiple
# of Muon's: 0.4 beside 0.05 was the best of a few pairs for ResNet18.
SGD_LR_SCALE = 8


class Scheduler(Protocol):
    """One of PyTorch's schedulers, or whatever else is to be told that an update is done."""

    def step(self) -> None:
        """One update is done."""


def ema_copy(model: nn.Module) -> nn.Module:
    """A copy of a model to hold the average of its weights; integer buffers are shared."""
    counts = [x for x in model.buffers() if not x.is_floating_point() and not x.is_complex()]
    return copy_of(model, model, counts)


def copy_of(parts: Any, model: nn.Module, shared: Sequence[torch.Tensor] = ()) -> Any:
    """A copy of what belongs together, such as a model and its optimizer.

    Args:
        model: of the parts. Tensors that a module keeps of its last forward pass, as old weight norms
            do, cannot be copied: the copy has their values until its next forward pass.
        shared: tensors that the copy has in common with the original.

    Raises:
        ValueError: it cannot be copied.
    """
    memory = {id(x): x for x in shared}
    for module in model.modules():
        own = [x for x in vars(module).values() if isinstance(x, torch.Tensor)]
        memory |= {id(x): x.detach() for x in own if not x.is_leaf}
    try:
        return copy.deepcopy(parts, memory)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the model cannot be copied, as averages and range tests do ({reason})"
        ) from None


@contextlib.contextmanager
def averaging(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    ema_model: nn.Module,
    decay: float,
    steps_done: Callable[[], int],
) -> Iterator[None]:
    """Move `ema_model`, its buffers too, towards `model` after each update; put it into `model` at last.

    It runs as part of the optimizer's step, so nothing can come between the update and its average.
    After t earlier updates the decay is t / (t + 1), until that exceeds `decay`. The average starts
    as the mean of the weights after each update, without the initial weights.

    Args:
        decay: the share of the average that stays at each step; 0 does nothing.
        steps_done: a function that returns the number of updates before the one under way.
    """
    if not decay:
        yield
        return
    pairs = zip(ema_model.state_dict().values(), model.state_dict().values(), strict=True)
    moving = [pair for pair in pairs if pair[0].is_floating_point() or pair[0].is_complex()]
    # By their memory: weights that are tied have several names and move once.
    old, new = zip(*{pair[1].data_ptr(): pair for pair in moving}.values(), strict=True)

    def move(*_: object) -> None:
        t = steps_done()
        get_ema_multi_avg_fn(min(decay, t / (t + 1)))(old, new, None)

    handle = optimizer.register_step_post_hook(move)
    try:
        yield
    finally:
        handle.remove()
    model.load_state_dict(ema_model.state_dict())


def make_optimizer(
    name: str, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0, head_lr_scale: float = 1.0
) -> torch.optim.Optimizer:
    """Adam, AdamW (betas 0.9, 0.999), SGD with Nesterov momentum 0.9, or Muon, by name; fused kernels.

    Args:
        lr: with Muon that of what it moves; norms, biases and the last layer have SGD_LR_SCALE times it.
        weight_decay: on the weights of convolutions and linear layers, not on norms and biases; with
            Muon not on the last linear layer either.
        head_lr_scale: learning rate of the last linear layer, as a multiple of the others'. Multiplying
            logits by s would multiply that layer's gradient by s, and again the effect of its update on
            the logits: s squared in all. So 1/64 acts like Page's logits times 1/8.
    """
    choose("optimizer", name, OPTIMIZERS)
    for what, value in {"lr": lr, "weight_decay": weight_decay}.items():
        if not value >= 0:  # nor NaN
            raise ValueError(f"{what} must be at least 0, not {value}")
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    head = [p for module in last for p in module.parameters() if head_lr_scale != 1 or name == "muon"]
    body = [p for p in model.parameters() if not any(p is other for other in head)]
    # Adam divides the gradient, and the L2 penalty in it, by its size: a lower rate does not lower the
    # penalty's weight against the gradient. In the others weights shrink by lr x weight_decay.
    coupled = name == "adam"
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in part if (p.dim() > 1) is matrix],
            "weight_decay": weight_decay / (1 if coupled else lr_scale) if matrix else 0.0,
            "lr_scale": lr_scale,
            "lr": lr * lr_scale,
        }
        for part, lr_scale in ((body, 1.0), (head, head_lr_scale))
        for matrix in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"params": groups, "lr": lr, "fused": True}
    if name == "muon":
        for group in groups[1:]:
            lr_scale = group["lr_scale"] * SGD_LR_SCALE
            group.update(lr_scale=lr_scale, lr=lr * lr_scale, weight_decay=0.0)
        groups[0]["orthogonal"] = True
        return Muon(groups, lr)
    if name == "sgd":
        return torch.optim.SGD(**common, momentum=MOMENTUM, nesterov=True)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(**common, betas=(0.9, 0.999))


def orthogonal_each(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`orthogonal` of each matrix."""
    return [orthogonal(matrix) for matrix in matrices]


class Muon(torch.optim.Optimizer):
    """Muon for the groups marked "orthogonal", SGD with Nesterov momentum for the others.

    Muon moves a matrix by its momentum made orthogonal, so that it learns all directions at one speed,
    not only those of large gradients: Keller Jordan, kellerjordan.github.io/posts/muon. A kernel is a
    matrix of (outputs, inputs x height x width). PyTorch's own Muon takes parameters of two dimensions
    only, hence no kernels. Gradients are left as they are.

    Args:
        params: parameters, or groups of them, each with settings of its own.
        lr: the learning rate.
        weight_decay: decoupled from the gradient where "orthogonal", else an L2 penalty.
        momentum: above 0.
        orthogonal: whether groups that do not say so move as Muon does.
    """

    _step_supports_amp_scaling = True  # a gradient scaler then sets grad_scale and found_inf on it
    # `training.shared_model` has one in which several processes divide the work; copies have this one.
    orthogonal_all: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]] = staticmethod(
        orthogonal_each
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = MOMENTUM,
        orthogonal: bool = False,
    ):
        if not momentum > 0:
            raise ValueError(f"momentum must be above 0, not {momentum}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "orthogonal": orthogonal,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(  # type: ignore[override]  # two overloads there, one for each kind of closure
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Make one update without waiting for the device; none if a gradient scaler set `found_inf`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            if scale is not None:
                grads = list(torch._foreach_div(grads, scale))
            common = params, grads, self._buffers(params), group, found_inf
            if group["orthogonal"]:
                muon_update(*common, self.orthogonal_all)
            else:
                sgd_update(*common)
        return loss

    def _buffers(self, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """The momentum of each parameter, 0 before its first update."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [self.state[p]["momentum_buffer"] for p in params]


def muon_update(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    buffers: list[torch.Tensor],
    group: dict,
    found_inf: torch.Tensor | None,
    orthogonal_all: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
) -> None:
    """Move `params` by their Nesterov momentum made orthogonal, and shrink them by lr x weight_decay.

    Args:
        buffers: momentum of each parameter, updated in place.
        group: "lr", "weight_decay" and "momentum" of the parameters.
        found_inf: above 0 where nothing may move; none: everything moves.
        orthogonal_all: makes each matrix in a list orthogonal.
    """
    moved = list(torch._foreach_mul(buffers, group["momentum"]))
    torch._foreach_add_(moved, grads)
    ahead = torch._foreach_mul(moved, group["momentum"])
    torch._foreach_add_(ahead, grads)
    # In each parameter's own number format and memory layout, which the fused kernel reads.
    matrices = orthogonal_all([matrix.flatten(1) for matrix in ahead])
    directions = [
        torch.empty_like(p).copy_(matrix.view_as(p)) for p, matrix in zip(params, matrices, strict=True)
    ]
    if found_inf is not None:
        skip = found_inf > 0
        moved = [torch.where(skip, old, new) for old, new in zip(buffers, moved, strict=True)]
    torch._foreach_copy_(buffers, moved)
    settings: dict[str, Any] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
    settings |= {name: group[name] for name in ("lr", "weight_decay")}
    sgd(params, directions, [], fused=True, found_inf=found_inf, **settings)


def sgd_update(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    buffers: list[torch.Tensor],
    group: dict,
    found_inf: torch.Tensor | None,
) -> None:
    """Move `params` by SGD with Nesterov momentum and an L2 penalty; arguments as in `muon_update`."""
    settings: dict[str, Any] = {"dampening": 0.0, "nesterov": True, "maximize": False}
    settings |= {name: group[name] for name in ("lr", "weight_decay", "momentum")}
    sgd(params, grads, [*buffers], fused=True, found_inf=found_inf, **settings)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrix, its singular values 0.7 to 1.2, by Newton-Schulz iteration.

    Five steps of the odd polynomial that Jordan chose, in the device's fastest number format.
    """
    x = (matrix / matrix.norm().clamp(min=1e-30)).to(pick_precision("auto", matrix.device))
    tall = len(x) > len(x.T)
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        even = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, even, x, beta=3.4445)
    return x.T if tall else x


def scale_rates(optimizer: torch.optim.Optimizer) -> None:
    """During a step, multiply each group's rate by its `lr_scale`; a range test sets one for all."""
    lr_scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]

    def multiply(by: Callable[[float, float], float]) -> None:
        for group, lr_scale in zip(optimizer.param_groups, lr_scales, strict=True):
            group["lr"] = by(group["lr"], lr_scale)

    optimizer.register_step_pre_hook(lambda *_: multiply(operator.mul))
    optimizer.register_step_post_hook(lambda *_: multiply(operator.truediv))


def one_cycle(
    optimizer: torch.optim.Optimizer,
    max_lr: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    peak_epoch: float = 5.0,
    min_lr: float | None = None,
) -> OneCycleLR:
    """OneCycleLR with a linear rise to the end of `peak_epoch` and a linear fall to almost nothing.

    Two phases, no annihilation phase, momentum left alone. A run too short to reach `peak_epoch`
    peaks at 0.3 of its length.

    Args:
        max_lr: the rate at the peak; a parameter group with an "lr_scale" peaks at that multiple of it.
        epochs, steps_per_epoch: how often it will be stepped, once after each batch.
        peak_epoch: epochs until the peak; the last batch of that epoch uses `max_lr`.
        min_lr: the first rate; the line ends at a hundredth of it, one step after the last. None:
            max_lr / 25, PyTorch's own.

    Raises:
        ValueError: a rate is not positive and finite, min_lr is over max_lr, or peak_epoch is under 0.
    """
    min_lr = max_lr / 25 if min_lr is None else min_lr
    if not 0 < min_lr <= max_lr < math.inf:
        raise ValueError(f"rates must be 0 < min_lr <= max_lr, finite, not {min_lr} and {max_lr}")
    if not peak_epoch >= 0:  # nor NaN
        raise ValueError(f"peak_epoch must be at least 0, not {peak_epoch}")
    steps = epochs * steps_per_epoch
    if steps < 1:
        raise ValueError(f"a schedule needs a step: {epochs} epochs of {steps_per_epoch} is none")
    reach = peak_epoch if peak_epoch < epochs else 0.3 * epochs
    peak = min(max(reach * steps_per_epoch - 1, 0.5), steps - 0.5)  # index of the step at the peak
    # One step more than are taken: OneCycleLR's rate after its last step would be negative.
    return OneCycleLR(
        optimizer,
        max_lr=[max_lr * group.get("lr_scale", 1.0) for group in optimizer.param_groups],
        total_steps=steps + 1,
        pct_start=(peak + 1) / (steps + 1),
        anneal_strategy="linear",
        div_factor=max_lr / min_lr,
        final_div_factor=100,
        three_phase=False,
        cycle_momentum=False,
    )
