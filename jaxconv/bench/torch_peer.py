"""Layers and networks by PyTorch, in its channels-last format, on all cores.

The only module that imports torch; imported only if it is installed.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jaxconv.bench.cases import Layer
from jaxconv.bench.measure import Call
from jaxconv.bench.networks import Network, padding

torch.set_num_threads(os.cpu_count() or 1)


def tensor(x: Any) -> torch.Tensor:
    """JAX's (N, spatial…, C) as (N, C, spatial…), with the same order in memory.

    Signals are the exception: PyTorch has no channels-last format for them.
    """
    x = np.array(x)
    if x.dtype.name == "bfloat16":  # NumPy's is not PyTorch's
        return tensor(x.astype(np.float32)).bfloat16()
    moved = torch.from_numpy(x).movedim(-1, 1)
    return moved.contiguous() if moved.ndim == 3 else moved


def kernel(weights: Any) -> torch.Tensor:
    """JAX's (spatial…, in, out) as (out, in, spatial…), channels last."""
    return tensor(np.moveaxis(np.asarray(weights), -1, 0))


def array(x: torch.Tensor) -> np.ndarray:
    """(N, C, spatial…) as JAX's (N, spatial…, C)."""
    x = x.detach().movedim(1, -1)
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


class Torch:
    """The operations of ``networks.Lax`` by PyTorch."""

    relu = staticmethod(F.relu)
    relu6 = staticmethod(F.relu6)

    def __init__(self, params: list[tuple[torch.Tensor, ...]]) -> None:
        self._params = iter(params)

    def conv(
        self, x: Any, channels: int, kernel: int, stride: int = 1, groups: int = 1, **_: bool
    ) -> torch.Tensor:
        weights, *biases = next(self._params)
        bias = biases[0] if biases else None
        strides, pads, ones, zeros = (
            [number] * (x.ndim - 2) for number in (stride, padding(kernel), 1, 0)
        )
        return torch.convolution(x, weights, bias, strides, pads, ones, False, zeros, groups)

    def up(self, x: torch.Tensor, channels: int) -> torch.Tensor:
        weights, bias = next(self._params)
        weights = weights.flip(tuple(range(2, x.ndim))).transpose(0, 1)
        return F.conv_transpose3d(x, weights, bias, 2)

    def concatenation(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y], 1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        weights, bias = next(self._params)
        return F.linear(x.mean((2, 3)), weights, bias)

    def logits_everywhere(self, x: torch.Tensor, classes: int) -> torch.Tensor:
        return self.conv(x, classes, 1).movedim(1, -1)

    def max_pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, 2, 1)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


def layer(name: str, layer: Layer, direction: str, *operands: Any) -> Call | None:
    """A layer in one direction, with the same operands; None if PyTorch lacks it, as for int8, and
    for torch.compile, which is for networks."""
    if np.issubdtype(layer.spec.dtype, np.integer) or name == "torch.compile":
        return None
    image, cotangent = tensor(operands[0]), tensor(operands[2])
    transposed, stride, dilation = layer.lhs_dilation > 1, layer.stride, layer.rhs_dilation
    pad = layer.padding[0]
    weights = kernel(operands[1])
    if transposed:
        stride, pad = layer.lhs_dilation, layer.rhs_shape[0] - 1 - pad
        weights = weights.flip(tuple(range(2, weights.ndim))).transpose(0, 1).contiguous()
    # A causal convolution is padded on both sides and its output cropped, as is common practice.
    cut = 0 if transposed else (layer.padding[0] - layer.padding[1]) // stride
    numbers = [[number] * layer.ndim for number in (stride, pad, dilation)]

    def forward() -> torch.Tensor:
        out = torch.convolution(
            image, weights, None, *numbers, transposed, [0] * layer.ndim, layer.groups
        )
        return out[..., : out.shape[-1] - cut] if cut else out

    run: Callable[[], torch.Tensor] = torch.no_grad()(forward)
    if direction != "forward":
        of = (image if direction == "input gradient" else weights).requires_grad_()
        out = forward()

        def run() -> torch.Tensor:
            return torch.autograd.grad(out, of, cotangent, retain_graph=True)[0]

    def as_jax(x: torch.Tensor) -> np.ndarray:
        if direction != "weight gradient":
            return array(x)
        if transposed:
            x = x.transpose(0, 1).flip(tuple(range(2, x.ndim)))
        return np.moveaxis(array(x), 0, -1)

    return Call(run, as_jax)


def network(name: str, network: Network, direction: str, *args: Any) -> Call | None:
    """A network with the same arguments; None if PyTorch doesn't run it, channels first (it is
    slower so) and training by torch.compile."""
    if network.first:
        return None
    if direction == "forward":
        return _forward(name, network, *args)
    return _step(network, *args) if name == "torch" else None


def _forward(name: str, network: Network, params: Any, x: Any) -> Call:
    weights, images = _parameters(params), tensor(x)

    def logits(weights: Any, images: Any) -> torch.Tensor:
        return network.layers(Torch(weights), images)

    if name == "torch.compile":
        model = torch.compile(_Module(logits, weights).eval())
        with torch._inductor.config.patch(freezing=True), torch.no_grad():
            model(images)  # compiles
        return Call(torch.no_grad()(lambda: model(images)), torch.Tensor.numpy)
    return Call(torch.no_grad()(lambda: logits(weights, images)), torch.Tensor.numpy)


class _Module(torch.nn.Module):
    """A function with its parameters, which torch.compile takes for constants in evaluation."""

    def __init__(self, function: Callable[..., Any], weights: Any) -> None:
        super().__init__()
        self.function = function
        self.weights = torch.nn.ParameterList([x for layer in weights for x in layer])
        self.lengths = [len(layer) for layer in weights]

    def forward(self, images: Any) -> torch.Tensor:
        flat = iter(self.weights)
        return self.function([[next(flat) for _ in range(n)] for n in self.lengths], images)


def _step(network: Network, params: Any, x: Any, labels: Any) -> Call:
    """A training step that updates its parameters in place, as is common; the loss is compared.

    The learning rate is zero, which takes as long as any other and keeps the parameters unchanged
    over repeated steps.
    """
    weights, images = _parameters(params), tensor(x)
    leaves = [leaf.requires_grad_() for layer in weights for leaf in layer]
    targets = torch.from_numpy(np.array(labels, np.int64))

    def run() -> torch.Tensor:
        logits = network.layers(Torch(weights), images)
        loss = F.cross_entropy(logits.movedim(-1, 1), targets)
        loss.backward()
        with torch.no_grad():
            torch._foreach_add_(leaves, [leaf.grad for leaf in leaves], alpha=0.0)
        for leaf in leaves:
            leaf.grad = None
        return loss

    return Call(run, lambda loss: loss.detach().numpy(), lambda output: output[0])


def _parameters(params: Any) -> list[tuple[torch.Tensor, ...]]:
    """Kernels, matrices of linear layers, and biases."""
    return [
        tuple(kernel(x) if x.ndim > 2 else torch.tensor(np.array(x).T) for x in layer)
        for layer in params
    ]
