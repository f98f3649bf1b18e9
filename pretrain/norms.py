"""Batch normalisation over a stated number of images, however many processes share the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evalsuite import UsageError
from pretrain.blocks import world_size

__all__ = ["group_norms"]


def group_norms(module: nn.Module, groups: int, micro_size: int) -> None:
    """Let every batch normalisation in ``module`` take its statistics over the batch of all processes put into
    ``groups`` groups, in place; tensors keep their names.

    Row i of the whole batch belongs to group i mod ``groups``; a process holds every world-th row. One group is the
    whole batch: statistics are synchronised. Several emulate as many devices with statistics of their own, which
    is what keeps MoCo's queries and keys apart. Raises :class:`evalsuite.UsageError` where the groups do not divide
    the batch of ``micro_size`` images that each process sees.
    """
    world = world_size()
    if groups == 1:
        if world > 1:
            _replace(module, _synced)
        return
    local, rest = divmod(groups, world)
    if rest or micro_size % local or micro_size // local < 2:
        raise UsageError(
            f"a batch of {micro_size * world} in {world} processes cannot be normalised in {groups} groups",
            cause="each process holds as many whole groups as any other, of two images at least",
            fix="choose another batch size, or set the method's number of groups",
        )
    if local > 1:
        _replace(module, lambda norm: _grouped(norm, local))


PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FUSED = {"drop", "act"}  # what timm's BatchNormAct2d does after normalising


def _replace(module: nn.Module, change: Callable[[_BatchNorm], _BatchNorm]) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm) or isinstance(child, _Grouped | _Synced | _SyncedGpu):
                continue
            if type(child) not in PLAIN and {n for n, _ in child.named_children()} != FUSED:
                raise UsageError(
                    f"{type(child).__name__} cannot take its statistics over a stated number of images",
                    cause="it is a batch normalisation of its own kind",
                    fix="train in one process with one group, or choose another architecture",
                )
            setattr(parent, name, change(child))


def _synced(norm: _BatchNorm) -> _BatchNorm:
    if norm.running_mean is not None and norm.running_mean.device.type == "cuda":
        return _take(_SyncedGpu(norm.num_features, norm.eps, norm.momentum, norm.affine), norm)
    return _take(_Synced(norm.num_features, norm.eps, norm.momentum, norm.affine), norm)


def _grouped(norm: _BatchNorm, groups: int) -> _BatchNorm:
    new = _Grouped(norm.num_features, norm.eps, norm.momentum, norm.affine)
    new.groups = groups
    return _take(new, norm)


def _take(new: _BatchNorm, old: _BatchNorm) -> _BatchNorm:
    """Give a layer another's tensors themselves, so that optimisers and twins that hold them go on holding them."""
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in old.named_buffers(recurse=False):
        setattr(new, name, buffer)
    for name, child in old.named_children():
        setattr(new, name, child)
    return new.train(old.training)


def _fused(norm: nn.Module, x: Tensor) -> Tensor:
    for module in norm.children():
        x = module(x)
    return x


class _SyncedGpu(nn.SyncBatchNorm):
    """torch's own, with what a fused layer does after it."""

    def forward(self, x: Tensor) -> Tensor:
        return _fused(self, super().forward(x))


class _Grouped(_BatchNorm):
    """Statistics over each of ``groups`` interleaved parts of the batch; running ones are their mean."""

    groups: int

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None:
            return _fused(self, super().forward(x))
        rows, channels, *rest = x.shape
        groups = self.groups
        if rows % groups:
            raise ValueError(f"a batch of {rows} does not fall into {groups} groups")
        means, variances = self.running_mean.repeat(groups), self.running_var.repeat(groups)
        weight = None if self.weight is None else self.weight.repeat(groups)
        bias = None if self.bias is None else self.bias.repeat(groups)
        parted = x.reshape(rows // groups, groups * channels, *rest)
        out = F.batch_norm(parted, means, variances, weight, bias, True, self.momentum or 0.0, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(means.view(groups, channels).mean(0))
            self.running_var.copy_(variances.view(groups, channels).mean(0))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return _fused(self, out.reshape(x.shape))


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is that of all processes' losses, summed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class _Synced(_BatchNorm):
    """Statistics over the batch of all processes, on any device: torch's own SyncBatchNorm is for GPUs alone."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None:
            return _fused(self, super().forward(x))
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = x.numel() / x.shape[1] * world_size()
        mean = _Sum.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        normed: Tensor = out.to(x.dtype)
        return _fused(self, normed)
