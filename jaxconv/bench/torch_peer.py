"""Layers and networks by PyTorch, in its channels-last format, on all cores; and networks by the
engines that people export to.

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

CORES = os.cpu_count() or 1
OPSET = 20  # the first that has Gelu
torch.set_num_threads(CORES)


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

    def __init__(self, params: Any) -> None:
        self._params = iter(params)

    def conv(
        self, x: Any, channels: int, kernel: int, stride: int = 1, groups: int = 1, **_: bool
    ) -> torch.Tensor:
        weights, *biases = next(self._params)
        numbers = [[n] * (x.ndim - 2) for n in (stride, padding(kernel), 1)]
        bias, zeros = biases[0] if biases else None, [0] * (x.ndim - 2)
        return torch.convolution(x, weights, bias, *numbers, False, zeros, groups)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        weights, bias = next(self._params)
        return F.linear(x.mean((2, 3)), weights, bias)

    def max_pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, 2, 1)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


def layer(name: str, layer: Layer, direction: str, *operands: Any) -> Call | None:
    """A layer in one direction, with the same operands; None if PyTorch lacks it, as for int8, and
    for the other engines, which run networks."""
    if np.issubdtype(layer.spec.dtype, np.integer) or name != "torch":
        return None
    image, weights, cotangent = tensor(operands[0]), kernel(operands[1]), tensor(operands[2])
    stride, pad, up = layer.stride, layer.padding[0], layer.lhs_dilation > 1
    if up:
        stride, pad = layer.lhs_dilation, layer.rhs_shape[0] - 1 - pad
        weights = transposed(weights).contiguous()
    # A causal convolution is padded on both sides and its output cropped, as is common practice.
    cut = 0 if up else (layer.padding[0] - layer.padding[1]) // stride
    numbers = [[number] * layer.ndim for number in (stride, pad, layer.rhs_dilation)]
    zeros = [0] * layer.ndim

    def forward() -> torch.Tensor:
        out = torch.convolution(image, weights, None, *numbers, up, zeros, layer.groups)
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


def network(name: str, network: Network, direction: str, *args: Any) -> Call | None:
    """A network with the same arguments; None channels first, where PyTorch is slower, and for
    training by the other engines."""
    if network.first or (direction != "forward" and name != "torch"):
        return None
    params, x, *labels = args
    images = tensor(x)
    weights = [
        [kernel(x) if x.ndim > 2 else torch.tensor(np.array(x).T) for x in layer]
        for layer in params
    ]
    if labels:
        return _step(network, weights, images, torch.from_numpy(np.array(labels[0], np.int64)))
    if name == "torch":
        run = torch.no_grad()(lambda: _logits(network, weights, images))
        return Call(run, torch.Tensor.numpy)
    module = _Module(network, weights).eval()
    if name in ("onnxruntime", "openvino"):
        return Call(_exported(name, module, images))
    model = torch.no_grad()(torch.compile(module))
    with torch._inductor.config.patch(freezing=True):
        model(images)  # compiles
    return Call(lambda: model(images), torch.Tensor.numpy)


def _logits(network: Network, weights: Any, images: Any) -> torch.Tensor:
    net: Any = Torch(weights)
    return network.layers(net, images)


class _Module(torch.nn.Module):
    """A network with its parameters, which a compiler takes for constants in evaluation."""

    def __init__(self, network: Network, weights: Any) -> None:
        super().__init__()
        self.network = network
        self.weights = torch.nn.ParameterList([x for layer in weights for x in layer])
        self.lengths = [len(layer) for layer in weights]

    def forward(self, images: Any) -> torch.Tensor:
        flat = iter(self.weights)
        weights = [[next(flat) for _ in range(n)] for n in self.lengths]
        return _logits(self.network, weights, images)


def _step(network: Network, weights: Any, images: Any, targets: torch.Tensor) -> Call:
    """A training step that updates its parameters in place, as is common; the loss is compared.

    The learning rate is zero, which takes as long as any other and keeps the parameters unchanged
    over repeated steps.
    """
    leaves = [leaf.requires_grad_() for layer in weights for leaf in layer]
    optimizer = torch.optim.SGD(leaves, lr=0.0, foreach=True)

    def run() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(network, weights, images), targets)
        loss.backward()
        optimizer.step()
        return loss

    return Call(run, lambda loss: loss.detach().numpy(), lambda output: output[0])


def _exported(name: str, module: _Module, images: torch.Tensor) -> Callable[[], Any]:
    """The network's ONNX file, by an engine that runs such."""
    program: Any = torch.onnx.export(
        module, (images,), dynamo=True, opset_version=OPSET, verbose=False
    )
    file, pixels = program.model_proto.SerializeToString(), np.ascontiguousarray(images.numpy())
    if name == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = CORES
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: pixels}
        return lambda: session.run(None, inputs)[0]
    import openvino

    core = openvino.Core()
    # It computes in bfloat16 where a processor can, unless told otherwise.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    hints |= {"INFERENCE_NUM_THREADS": CORES}
    request = core.compile_model(core.read_model(file), "CPU", hints).create_infer_request()
    return lambda: request.infer({0: pixels})[0]
