"""Writes the models of the figures: a small multi-layer perceptron and one with the layers of ResNet-50.

    pip install -r models/requirements.txt && python loadtest/models.py [FOLDER] [mlp|resnet]...

Without a folder they go to target/loadtest-models. Weights are random and seeded: what is measured does not depend on
their values. The first dimension of every input and output is the free dimension `batch`.
"""

import pathlib
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 17, 8
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "target" / "loadtest-models"


class Graph:
    """Collects nodes and weights; each layer takes the name of its input and gives that of its output."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.nodes, self.weights = [], []

    def weight(self, *shape, scale):
        name = f"w{len(self.weights)}"
        value = self.random.standard_normal(shape).astype(np.float32) * np.float32(scale)
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op, *inputs, output=None, **attributes):
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def dense(self, x, fan_in, fan_out):
        weight = self.weight(fan_in, fan_out, scale=fan_in**-0.5)
        return self.node("Gemm", x, weight, self.weight(fan_out, scale=0.1))

    def conv(self, x, fan_in, fan_out, size, stride=1):
        # The variance of sums stays near 1 through all layers.
        weight = self.weight(fan_out, fan_in, size, size, scale=(2 / (fan_in * size * size)) ** 0.5)
        bias = self.weight(fan_out, scale=0.01)
        return self.node("Conv", x, weight, bias, kernel_shape=[size] * 2, strides=[stride] * 2, pads=[size // 2] * 4)

    def write(self, folder, name, x, y):
        rows = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *dims])] for n, dims in (x, y)]
        graph = helper.make_graph(self.nodes, name, *rows, self.weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="tidegate-loadtest"
        )
        onnx.checker.check_model(model, full_check=True)
        path = folder / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString())
        print(f"{path}: {path.stat().st_size} bytes")


def mlp(folder):
    """16 → 32 → 32 → 3: cheaper to run than to ask for."""
    graph = Graph(seed=1)
    x = graph.node("Relu", graph.dense("x", 16, 32))
    x = graph.node("Relu", graph.dense(x, 32, 32))
    graph.node("Softmax", graph.dense(x, 32, 3), output="y", axis=-1)
    graph.write(folder, "mlp", ("x", [16]), ("y", [3]))


def bottleneck(graph, x, fan_in, width, stride):
    """1x1, 3x3, 1x1, and around them the input, made to fit where it has to."""
    fan_out = 4 * width
    y = graph.node("Relu", graph.conv(x, fan_in, width, 1))
    y = graph.node("Relu", graph.conv(y, width, width, 3, stride))
    y = graph.conv(y, width, fan_out, 1)
    if fan_in != fan_out or stride != 1:
        x = graph.conv(x, fan_in, fan_out, 1, stride)
    return graph.node("Relu", graph.node("Add", x, y))


def resnet(folder):
    """The layers of ResNet-50 with batch normalisation folded into the convolutions, as it is served."""
    graph = Graph(seed=2)
    x = graph.node("Relu", graph.conv("x", 3, 64, 7, 2))
    x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            x = bottleneck(graph, x, channels, width, 2 if stage and not block else 1)
            channels = 4 * width
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x), axis=1)
    graph.node("Softmax", graph.dense(x, channels, 1000), output="y", axis=-1)
    graph.write(folder, "resnet", ("x", [3, 224, 224]), ("y", [1000]))


MODELS = {"mlp": mlp, "resnet": resnet}


def main(args):
    names = [arg for arg in args if arg in MODELS]
    folders = [pathlib.Path(arg) for arg in args if arg not in MODELS]
    if len(folders) > 1:
        raise SystemExit(f"expected one folder and names of {', '.join(MODELS)}, got {' '.join(args)}")
    for name in names or MODELS:
        MODELS[name](folders[0] if folders else FOLDER)


if __name__ == "__main__":
    main(sys.argv[1:])
