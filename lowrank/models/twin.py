"""A second tree of modules over the same tensors: what is put on one is not on the other.

Several runs of one base need one copy of its weights, and each of them modules of its own: for its adapters, its
``forward`` on instances, its hooks, its modes, its configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)
LINE = 64  # bytes of a cache line: kernels may round otherwise where a tensor begins elsewhere in one


def twin(model: Model, own: Collection[str] = ()) -> Model:
    """A fresh module tree whose parameters and buffers are ``model``'s, the very tensors; tied ones stay tied.

    What is on instances comes along, turned to the twin: a ``forward`` that is a bound method (fast.linear.fuse), hooks
    that are, attributes, the configuration with its attention. A function that holds a module of ``model`` in its
    closure still calls that one.

    ``own`` names parameters that are to train: of these the twin has copies, which start with the same values. Raises
    ConfigError where one of them is not the model's.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in own if name not in known]
    if missing:
        raise ConfigError(f"{missing[0]}: not a parameter of this model.")
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): tensor for tensor in held} | {id(known[name]): copied(known[name]) for name in own}
    return copy.deepcopy(model, memo)


def copied(parameter: nn.Parameter) -> nn.Parameter:
    """The same values in memory of their own, that begins at the same place of a cache line."""
    source = parameter.detach()
    if source.device.type != "cpu" or not source.is_contiguous():
        return nn.Parameter(source.clone(), parameter.requires_grad)
    size = source.numel() * source.element_size()
    room = np.empty(size + LINE, dtype=np.uint8)  # of a part of a torch tensor the memory would be shared, not its own
    start = (source.data_ptr() - room.ctypes.data) % LINE
    place = torch.from_numpy(room[start : start + size]).view(source.dtype).view(source.shape)
    return nn.Parameter(place.copy_(source), parameter.requires_grad)
