"""Networks, forward, by the engines that run ONNX files: ONNX Runtime and OpenVINO, on all cores.

The only module that imports them; imported only if they are installed.
"""

import dataclasses
import os
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jaxconv.bench.measure import Call
from jaxconv.bench.networks import Network, padding

CORES = os.cpu_count() or 1
# The first that has Gelu; and the file format of its time, which all engines read.
OPSET, FORMAT = 20, 10


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of a graph, of shape (N, C, spatial…)."""

    graph: "Onnx"
    name: str
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __add__(self, other: "Value") -> "Value":
        return self.graph.node("Add", self.shape, self, other)


class Onnx:
    """The operations of ``networks.Lax`` as nodes of an ONNX graph, channels first.

    Attributes:
      nodes, constants: of the graph so far.
    """

    def __init__(self, params: Any) -> None:
        self._params = iter(params)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, kind: str, shape: tuple[int, ...], *inputs: Value, **attributes: Any) -> Value:
        """The value of a new node."""
        value = Value(self, f"{kind}_{len(self.nodes)}", shape)
        self.nodes.append(
            helper.make_node(kind, [x.name for x in inputs], [value.name], **attributes)
        )
        return value

    def constant(self, array: Any) -> Value:
        value = Value(self, f"constant_{len(self.constants)}", np.shape(array))
        array = np.ascontiguousarray(array, np.float32)
        self.constants.append(numpy_helper.from_array(array, value.name))
        return value

    def relu(self, x: Value) -> Value:
        return self.node("Relu", x.shape, x)

    def relu6(self, x: Value) -> Value:
        return self.node("Clip", x.shape, x, self.constant(0), self.constant(6))

    def gelu(self, x: Value) -> Value:
        return self.node("Gelu", x.shape, x, approximate="tanh")

    def conv(
        self, x: Value, channels: int, kernel: int, stride: int = 1, groups: int = 1, **_: bool
    ) -> Value:
        weights, *biases = next(self._params)
        constants = (np.moveaxis(weights, (-1, -2), (0, 1)), *biases)
        pad = padding(kernel)
        shape = (x.shape[0], channels, *((n + 2 * pad - kernel) // stride + 1 for n in x.shape[2:]))
        ndim = x.ndim - 2
        facts = {"pads": [pad] * 2 * ndim, "strides": [stride] * ndim, "group": groups}
        return self.node("Conv", shape, x, *map(self.constant, constants), **facts)

    def up(self, x: Value, channels: int) -> Value:
        weights, bias = next(self._params)
        weights = np.flip(np.asarray(weights), range(x.ndim - 2))
        constants = np.moveaxis(weights, (-2, -1), (0, 1)), bias
        shape = (x.shape[0], channels, *(2 * n for n in x.shape[2:]))
        strides = [2] * (x.ndim - 2)
        return self.node("ConvTranspose", shape, x, *map(self.constant, constants), strides=strides)

    def concatenation(self, x: Value, y: Value) -> Value:
        shape = (x.shape[0], x.shape[1] + y.shape[1], *x.shape[2:])
        return self.node("Concat", shape, x, y, axis=1)

    def logits(self, x: Value) -> Value:
        weights, bias = next(self._params)
        pooled = self.node("GlobalAveragePool", (*x.shape[:2], *(1,) * (x.ndim - 2)), x)
        flat = self.node("Flatten", x.shape[:2], pooled)
        constants = map(self.constant, (weights, bias))
        return self.node("Gemm", (x.shape[0], len(bias)), flat, *constants)

    def logits_everywhere(self, x: Value, classes: int) -> Value:
        y = self.conv(x, classes, 1)
        order = (0, *range(2, y.ndim), 1)
        return self.node("Transpose", tuple(y.shape[i] for i in order), y, perm=order)

    def max_pool(self, x: Value) -> Value:
        shape = (*x.shape[:2], *((n - 1) // 2 + 1 for n in x.shape[2:]))
        ndim = x.ndim - 2
        facts = {"kernel_shape": [3] * ndim, "pads": [1] * 2 * ndim, "strides": [2] * ndim}
        return self.node("MaxPool", shape, x, **facts)


def model(network: Network, params: Any, shape: tuple[int, ...]) -> bytes:
    """The file of a network for images of ``shape`` (N, C, spatial…)."""
    graph = Onnx(params)
    y = network.layers(graph, Value(graph, "x", shape))  # pyright: ignore[reportArgumentType]
    ends = (
        [helper.make_tensor_value_info(value.name, TensorProto.FLOAT, value.shape)]
        for value in (Value(graph, "x", shape), y)
    )
    made = helper.make_model(
        helper.make_graph(graph.nodes, "network", *ends, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=FORMAT,
    )
    onnx.checker.check_model(made)
    return made.SerializeToString()


def network(
    name: str, network: Network, direction: str, params: Any, x: Any, *_: Any
) -> Call | None:
    """A network with the same arguments; None in training, and channels first, where it would be
    the same again."""
    if direction != "forward" or network.first:
        return None
    images = np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))
    file = model(network, params, images.shape)
    if name == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = CORES
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return Call(lambda: session.run(None, {"x": images})[0])
    import openvino

    core = openvino.Core()
    # It computes in bfloat16 where a processor can, unless told otherwise.
    options = {
        "INFERENCE_NUM_THREADS": CORES,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(file), "CPU", options).create_infer_request()
    return Call(lambda: request.infer({0: images})[0])
