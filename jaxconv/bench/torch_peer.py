"""Layers and networks by PyTorch, channels last, on all cores; imported if torch is installed."""

import os
from functools import partial
from typing import Any, cast

import jax
import numpy as np
import torch
import torch.nn.functional as F

from jaxconv.bench.cases import Layer
from jaxconv.bench.networks import Network, padding
from jaxconv.planning.timing import Call

torch.set_num_threads(os.cpu_count() or 1)


def tensor(x: Any) -> torch.Tensor:
    """JAX's (N, spatial…, C) as (N, C, spatial…), in the same order in memory; not so signals, for
    which PyTorch has no channels-last format."""
    x = np.array(x)
    if x.dtype.name == "bfloat16":  # NumPy's is not PyTorch's
        return tensor(x.astype(np.float32)).bfloat16()
    moved = torch.from_numpy(x).movedim(-1, 1)
    return moved.contiguous() if moved.ndim == 3 else moved


def kernel(weights: Any) -> torch.Tensor:
    """JAX's (spatial…, in, out) as (out, in, spatial…), channels last."""
    return tensor(np.moveaxis(np.asarray(weights), -1, 0))


def transposed(weights: torch.Tensor) -> torch.Tensor:
    """A kernel as transposed convolutions have it, from lax's and back."""
    return weights.flip(tuple(range(2, weights.ndim))).transpose(0, 1)


def array(x: torch.Tensor) -> np.ndarray:
    """(N, C, spatial…) as JAX's (N, spatial…, C)."""
    x = x.detach().movedim(1, -1)
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


class Torch:
    """The operations of ``networks.Lax`` by PyTorch."""

    relu = staticmethod(F.relu)
    relu6 = staticmethod(F.relu6)
    gelu = staticmethod(partial(F.gelu, approximate="tanh"))
    leaky_relu = staticmethod(partial(F.leaky_relu, negative_slope=0.2))

    def __init__(self, params: Any) -> None:
        self._params = iter(params)

    def max_pool(self, x: torch.Tensor, size: int) -> torch.Tensor:
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
        return pool(x, size, 2, padding(size, 2))

    def enlarged(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.interpolate(x, scale_factor=2), other], 1)

    def conv(
        self, x: Any, channels: int, size: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> torch.Tensor:
        conv, pad = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3], padding(size, stride)
        return conv(x, *next(self._params), stride=stride, padding=pad, groups=groups)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.mean(tuple(range(2, x.ndim))), *next(self._params))


def layer(layer: Layer, direction: str, *operands: Any) -> Call | None:
    """A layer in one direction, with the same operands; None for integers, which it lacks."""
    spec = layer.spec
    if np.issubdtype(spec.dtype, np.integer):
        return None
    image, weights, cotangent = tensor(operands[0]), kernel(operands[1]), tensor(operands[2])
    strides, pads, up = spec.window_strides, [low for low, _ in spec.padding], False
    # A causal convolution is padded on both sides and its output cropped, as is common practice.
    cut = (spec.padding[0][0] - spec.padding[0][1]) // strides[0]
    if max(spec.lhs_dilation) > 1:
        strides, up, cut = spec.lhs_dilation, True, 0
        pads = [size - 1 - low for size, low in zip(spec.kernel_shape, pads, strict=True)]
        weights = transposed(weights).contiguous()
    numbers = strides, pads, spec.rhs_dilation, up, [0] * len(pads), spec.groups

    def forward() -> torch.Tensor:
        out = torch.convolution(image, weights, None, *numbers)
        return out[..., : out.shape[-1] - cut] if cut else out

    if direction == "forward":
        return Call(torch.no_grad()(forward), array)
    of = (image if direction == "input gradient" else weights).requires_grad_()
    out = forward()

    def as_jax(x: torch.Tensor) -> np.ndarray:
        if direction == "input gradient":
            return array(x)
        return np.moveaxis(array(transposed(x) if up else x), 0, -1)

    return Call(lambda: torch.autograd.grad(out, of, cotangent, retain_graph=True)[0], as_jax)


def network(network: Network, params: Any, x: Any, labels: Any = None) -> Call | None:
    """A network with the same arguments; None channels first, where PyTorch is slower. With labels
    a training step that updates its parameters in place, as is common; the loss is compared. Its
    learning rate is zero, which takes as long as any other and keeps the parameters."""
    if network.first:
        return None
    images, net = tensor(x), cast(Any, Torch)
    weights = jax.tree.map(
        lambda x: kernel(x) if x.ndim > 2 else torch.tensor(np.array(x).T), params
    )
    if labels is None:
        forward = torch.no_grad()(lambda: network.layers(net(weights), images))
        return Call(forward, torch.Tensor.numpy)
    targets = torch.from_numpy(np.array(labels, np.int64))
    leaves = [leaf.requires_grad_() for leaf in jax.tree.leaves(weights)]
    optimizer = torch.optim.SGD(leaves, lr=0.0, foreach=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network.layers(net(weights), images), targets)
        loss.backward()
        optimizer.step()
        return loss

    return Call(step, lambda loss: loss.detach().numpy())
