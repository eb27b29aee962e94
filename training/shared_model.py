"""A network whose training several processes share, by DistributedDataParallel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from training.criterion import images_in_mean
from training.distributed import all_rows, own_part, total
from training.optim import copy_of, orthogonal
from training.settings import TrainSettings
from utils import autocast, pick_precision

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def prepare_forward(
    forward: Callable | None, model: nn.Module, images: Tensor, count: int, settings: TrainSettings
) -> Callable:
    """The model as it is called in training: itself, compiled, or shared by several processes.

    Args:
        forward: what this returned before the step before; None at the first.
        images: this process's rows of the batch under way, which has `count` rows in all processes.

    Raises:
        ValueError: it cannot be shared.
    """
    world = own_part().world
    if world == 1:
        if forward is None:
            forward = compiled(model) if settings.compile else model
        return forward
    if count < world:
        raise ValueError(f"a batch of {count} images is too small for {world} processes")
    if forward is None:
        norms = any(isinstance(module, _BatchNorm) for module in model.modules())
        if settings.compile and settings.sync_norm and norms:
            raise ValueError(
                "norms over all processes cannot be compiled: --no-sync-norm, or no --compile"
            )
        forward = share(model, settings.sync_norm, images, count, settings.precision)
        forward = torch.compile(forward) if settings.compile else forward
    set_count(forward, count)
    return forward


def compiled(model: nn.Module) -> Callable:
    """The network's forward and backward pass in training, by `torch.compile`.

    On CUDA they are recorded as CUDA graphs, which take one launch each. A graph holds for one size of
    batch, so each size is compiled for itself: a last, smaller batch takes the time of compiling once.
    Where several processes share the network, it is compiled without graphs.
    """
    return torch.compile(model, mode="reduce-overhead", dynamic=False)


def loss_part(
    settings: TrainSettings, logits: Tensor, labels: Tensor, count: int
) -> tuple[Tensor, float, float]:
    """The loss from which this process computes its gradient, in a batch of `count` rows in all.

    Cross-entropy is a mean over rows, of which each process takes its own. A criterion may be a sum,
    give classes weights or compare rows: it gets the rows of all processes, and so is that of one
    process.

    Args:
        logits, labels: of this process's rows.

    Returns:
        The loss; what to multiply it by, as the gradient is the mean over the processes; and the number
        of images that it stands for.
    """
    world, rows = own_part().world, len(labels)
    if world == 1 or settings.criterion is None:
        loss = settings.loss(logits, labels)
        return loss, rows * world / count, images_in_mean(settings.criterion, rows)
    loss = settings.loss(all_rows(logits, count), all_rows(labels, count))
    return loss, world, images_in_mean(settings.criterion, count) / world


def share(
    model: nn.Module, sync_norm: bool, images: Tensor, count: int, precision: torch.dtype
) -> nn.Module:
    """A twin of the model that has the same tensors and trains as one with those of other processes.

    State dict, optimizer, average and evaluation go on with the plain model. Batch norms normalise over
    the rows of all processes, and dropout draws the mask of the whole batch.

    Args:
        sync_norm: False: each process normalises its own rows.
        images: this process's rows of a batch, for one forward and backward pass without effect.
        count: rows of the batch in all processes.

    Raises:
        ValueError: the model cannot be shared; one line that names the module or parameter.
    """
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy_of(model, model, tensors)
    on_gpu = images.device.type == "cuda"
    for name, module in list(twin.named_modules()):
        if sync_norm and isinstance(module, _BatchNorm) and type(module) is not nn.SyncBatchNorm:
            if type(module) not in NORMS:
                raise ValueError(
                    f"{name}, a {type(module).__name__}, normalises the rows of one process alone: "
                    "--no-sync-norm, or sync_norm=False, takes that"
                )
            if not on_gpu:
                module.__class__ = SharedNorm
        if type(module) in DROPOUTS:
            module.kind, module.__class__ = type(module), SharedDropout
    if sync_norm and on_gpu:
        twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    shared = DistributedDataParallel(twin)
    shared.broadcast_buffers = False  # they are the same in all processes after every step
    prime(shared, images[:2], count, precision)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise ValueError(
                f"{name} takes no part in the model's answer, which training on several processes "
                "needs: freeze it, by requires_grad_(False)"
            )
    shared.zero_grad(set_to_none=True)
    return shared


def prime(shared: nn.Module, images: Tensor, count: int, precision: torch.dtype) -> None:
    """Make one backward pass, whose gradients are not used, and put the buffers back.

    In its first one DistributedDataParallel notes in which order gradients come, then packs them anew,
    and so sums them in another order: without this a resumed run would differ in the last bits.
    """
    before = [(buffer, buffer.clone()) for buffer in shared.buffers()]
    device = images.device
    set_count(shared, count)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with autocast(device, precision):
            answer = shared(images)
        answer.float().sum().backward()
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def set_count(shared: Any, count: int) -> None:
    """Say how many rows the batch under way has in all processes."""
    for module in shared.modules():
        if isinstance(module, SharedDropout):
            module.count = count


def average_buffers(model: nn.Module) -> None:
    """Give every process the mean of all running statistics, where each has normalised its own rows."""
    if own_part().world == 1:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if buffers:
        mean = total(torch.cat([buffer.flatten() for buffer in buffers])) / own_part().world
        for buffer, value in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))


class SharedNorm(_BatchNorm):
    """Batch norm over the rows of all processes; nn.SyncBatchNorm takes no tensors of a CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape (N, C, ...) is taken."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same."""
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        answer, mean, variance, count = Normalize.apply(input, self.weight, self.bias, self.eps)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:  # the mean over all batches
                momentum = 1 / float(self.num_batches_tracked)
            self.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            self.running_var.mul_(1 - momentum).add_(variance * (count / (count - 1)), alpha=momentum)
        return answer


class Normalize(torch.autograd.Function):
    """x less its mean, divided by its standard deviation, both over the rows of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        """The answer in x's number format, and mean, variance and number of values of a channel."""
        axes = [0, *range(2, x.dim())]
        exact = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(exact, axes, correction=0)
        mine = torch.cat([mean, variance, mean.new_tensor([x.numel() / len(mean)])])
        every = [torch.empty_like(mine) for _ in range(own_part().world)]
        distributed.all_gather(every, mine)
        means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], 1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean) ** 2) * counts).sum(0) / count
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        answer = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, variance, count)
        return answer, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradients of x, over all processes, and of weight and bias, of this process's rows."""
        x, weight, mean, scale, count = ctx.saved_tensors
        axes, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        gradient, centred = gradients[0].to(mean.dtype), x.to(mean.dtype) - mean.view(shape)
        bias_part = gradient.sum(axes)
        weight_part = (gradient * centred).sum(axes) * scale
        mean_bias, mean_weight = (total(torch.cat([bias_part, weight_part])) / count).chunk(2)
        slope = scale if weight is None else weight * scale
        result = (gradient - mean_bias.view(shape)).sub_(centred * (mean_weight * scale).view(shape))
        result = result.mul_(slope.view(shape)).to(x.dtype)
        _, weighted, biased, _ = ctx.needs_input_grad
        return result, weight_part if weighted else None, bias_part if biased else None, None


class SharedDropout(_DropoutNd):
    """Dropout that draws the mask of the whole batch, of which this process uses its rows.

    Where the first dimension of its input is not the batch, it draws a mask for what it is given.
    """

    kind: type[_DropoutNd]  # what it was
    count: int  # rows of the batch in all processes

    def forward(self, input: Tensor) -> Tensor:
        """(N, ...) -> the same."""
        rows = own_part().rows(self.count)
        if not self.training or not self.p or len(input) != rows.stop - rows.start:
            return self.kind.forward(self, input)
        ones = input.new_ones(self.count, *input.shape[1:])
        if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
            ones = ones.to(memory_format=torch.channels_last)  # draws come in the order of memory
        return input * self.kind.forward(self, ones)[rows]


def orthogonal_shared(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of each matrix, computed by one process for all.

    The largest goes first, to the process that has the least to do. Each writes its results among zeros,
    and the sum of all is what each would have computed.
    """
    work, owner = [0] * own_part().world, {}
    for index in sorted(range(len(matrices)), key=lambda k: -matrices[k].numel()):
        owner[index] = work.index(min(work))
        side = min(matrices[index].shape)
        work[owner[index]] += matrices[index].numel() * side
    mine = {k: orthogonal(m) for k, m in enumerate(matrices) if owner[k] == own_part().rank}
    device, sizes = matrices[0].device, [m.numel() for m in matrices]
    flat = torch.zeros(sum(sizes), dtype=pick_precision("auto", device), device=device)
    for k, place in enumerate(flat.split(sizes)):
        if k in mine:
            place.copy_(mine[k].flatten())
    return [x.view_as(m) for x, m in zip(total(flat).split(sizes), matrices, strict=True)]
