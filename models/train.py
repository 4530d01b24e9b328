"""Trains the four models of this repository and writes everything that lies beside them.

    pip install -r models/requirements.txt && python models/train.py [iris|digits|risk|topics]...

Each model learns from data that the scikit-learn package ships, so nothing is downloaded. Every version gets
`model.onnx`, `samples.json` (requests with the answers of Python's onnxruntime) and `lineage.toml`. Runs are seeded:
the same packages on the same processor family give the same files.

The first dimension of every input and output is the named, free dimension `batch`.
"""

import hashlib
import json
import pathlib
import platform
import re
import sys
import zlib

import numpy as np
import onnx
import onnxruntime
import sklearn
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

HERE = pathlib.Path(__file__).resolve().parent
# Old enough for every engine in use.
OPSET, ML_OPSET, IR_VERSION = 17, 3, 8
OWNER = "Tidegate maintainers"
TOLERANCE = 1e-4
DATATYPES = {"float32": "FP32", "int64": "INT64"}


def sha256(*arrays):
    """One digest over the bytes of the arrays, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def graph_model(nodes, name, inputs, outputs, weights):
    """A checked ONNX model from nodes and named weights; `inputs` and `outputs` are (name, type, dims) rows."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*row) for row in inputs],
        [helper.make_tensor_value_info(*row) for row in outputs],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="tidegate-models"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def tensor_json(name, array):
    return {
        "name": name,
        "datatype": DATATYPES[array.dtype.name],
        "shape": list(array.shape),
        "data": array.ravel().tolist(),
    }


def write(name, version, model, batches, data, note):
    """Writes one version: the model, its samples and its lineage. `batches` are dicts of input arrays."""
    folder = HERE / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    samples = []
    for at, feed in enumerate(batches):
        answer = session.run(names, feed)
        samples.append(
            {
                "request": {"id": f"sample-{at}", "inputs": [tensor_json(k, v) for k, v in feed.items()]},
                "response": {"outputs": [tensor_json(k, v) for k, v in zip(names, answer)]},
                "tolerance": TOLERANCE,
            }
        )
    (folder / "samples.json").write_text(json.dumps({"samples": samples}, indent=1) + "\n")
    (folder / "lineage.toml").write_text(
        f'''owner = "{OWNER}"
# Empty: trained from the commit that added this file.
git_commit = ""
training_run = "models/train.py {name}, version {version}: {note}"

[data]
name = "{data["name"]}"
version = "scikit-learn {sklearn.__version__}"
sha256 = "{data["sha256"]}"

[frameworks]
python = "{platform.python_version()}"
scikit-learn = "{sklearn.__version__}"
numpy = "{np.__version__}"
onnx = "{onnx.__version__}"
onnxruntime = "{onnxruntime.__version__}"
'''
    )
    print(f"{name}/{version}: {note}; {path.stat().st_size} bytes, {len(samples)} samples")


def iris():
    """A multi-layer perceptron on four measurements of a flower; two versions of different size."""
    x, y = load_iris(return_X_y=True)
    data = {"name": "iris", "sha256": sha256(x, y)}
    x = x.astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=7, stratify=y)
    mean, scale = train_x.mean(axis=0), train_x.std(axis=0)
    for version, hidden in ((1, (8,)), (2, (16, 16))):
        net = MLPClassifier(hidden, max_iter=3000, random_state=7).fit((train_x - mean) / scale, train_y)
        accuracy = net.score((test_x - mean) / scale, test_y)
        weights = {"mean": mean, "scale": scale}
        nodes = [
            helper.make_node("Sub", ["features", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "scale"], ["layer0"]),
        ]
        last = len(net.coefs_) - 1
        for at, (coefficients, bias) in enumerate(zip(net.coefs_, net.intercepts_)):
            weights[f"w{at}"], weights[f"b{at}"] = coefficients.astype(np.float32), bias.astype(np.float32)
            out = "scores" if at == last else f"linear{at}"
            nodes.append(helper.make_node("Gemm", [f"layer{at}", f"w{at}", f"b{at}"], [out]))
            if at != last:
                nodes.append(helper.make_node("Relu", [out], [f"layer{at + 1}"]))
        nodes.append(helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1))
        model = graph_model(
            nodes,
            "iris",
            [("features", TensorProto.FLOAT, ["batch", 4])],
            [("probabilities", TensorProto.FLOAT, ["batch", 3])],
            weights,
        )
        batches = [{"features": test_x[:1]}, {"features": test_x[1:6]}]
        note = f"MLP with hidden layers {list(hidden)}, test accuracy {accuracy:.3f}"
        write("iris", version, model, batches, data, note)


class Adam:
    """Plain Adam over a dict of arrays."""

    def __init__(self, weights, rate):
        self.weights, self.rate, self.steps = weights, rate, 0
        self.first = {key: np.zeros_like(value) for key, value in weights.items()}
        self.second = {key: np.zeros_like(value) for key, value in weights.items()}

    def step(self, gradients):
        self.steps += 1
        for key, gradient in gradients.items():
            self.first[key] = 0.9 * self.first[key] + 0.1 * gradient
            self.second[key] = 0.999 * self.second[key] + 0.001 * gradient**2
            first = self.first[key] / (1 - 0.9**self.steps)
            second = self.second[key] / (1 - 0.999**self.steps)
            self.weights[key] -= self.rate * first / (np.sqrt(second) + 1e-8)


def softmax_gradient(scores, labels):
    """The gradient of the mean cross entropy with respect to the scores."""
    scores = scores - scores.max(axis=1, keepdims=True)
    share = np.exp(scores)
    share /= share.sum(axis=1, keepdims=True)
    share[np.arange(len(labels)), labels] -= 1
    return share / len(labels)


def patches(x, stride):
    """The 3×3 patches of a padded image batch: [n, c, h, w] to [n, h', w', c·9]."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(len(x), windows.shape[2], windows.shape[3], -1)


def unpatch(gradient, shape, stride):
    """The gradient of `patches`: adds every patch back to where it was cut."""
    n, c, h, w = shape
    rows, columns = gradient.shape[1:3]
    cut = gradient.reshape(n, rows, columns, c, 3, 3)
    padded = np.zeros((n, c, h + 2, w + 2), gradient.dtype)
    for i in range(3):
        for j in range(3):
            padded[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride] += cut[
                :, :, :, :, i, j
            ].transpose(0, 3, 1, 2)
    return padded[:, :, 1:-1, 1:-1]


def digits():
    """A small convolutional network on 8×8 handwritten digits, trained here with numpy."""
    bunch = load_digits()
    data = {"name": "digits", "sha256": sha256(bunch.images, bunch.target)}
    x = bunch.images.astype(np.float32)[:, None]
    train_x, test_x, train_y, test_y = train_test_split(
        x, bunch.target, test_size=0.2, random_state=7, stratify=bunch.target
    )
    rng = np.random.default_rng(7)

    def start(fan_in, *shape):
        return (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    w = {
        "conv1": start(9, 16, 9),
        "bias1": np.zeros(16, np.float32),
        "conv2": start(144, 32, 144),
        "bias2": np.zeros(32, np.float32),
        "dense": start(512, 10, 512),
        "bias3": np.zeros(10, np.float32),
    }
    adam = Adam(w, 2e-3)

    def forward(images):
        p1 = patches(images / 16, 1)
        a1 = np.maximum(p1 @ w["conv1"].T + w["bias1"], 0).transpose(0, 3, 1, 2)
        p2 = patches(a1, 2)
        a2 = np.maximum(p2 @ w["conv2"].T + w["bias2"], 0).transpose(0, 3, 1, 2)
        flat = a2.reshape(len(images), -1)
        return p1, a1, p2, a2, flat, flat @ w["dense"].T + w["bias3"]

    for _ in range(25):
        order = rng.permutation(len(train_x))
        for at in range(0, len(order), 64):
            batch = order[at : at + 64]
            p1, a1, p2, a2, flat, scores = forward(train_x[batch])
            g3 = softmax_gradient(scores, train_y[batch])
            g2 = (g3 @ w["dense"]).reshape(a2.shape) * (a2 > 0)
            g2 = g2.transpose(0, 2, 3, 1)
            g1 = unpatch(g2 @ w["conv2"], a1.shape, 2) * (a1 > 0)
            g1 = g1.transpose(0, 2, 3, 1)
            adam.step(
                {
                    "conv1": np.tensordot(g1, p1, ((0, 1, 2), (0, 1, 2))),
                    "bias1": g1.sum(axis=(0, 1, 2)),
                    "conv2": np.tensordot(g2, p2, ((0, 1, 2), (0, 1, 2))),
                    "bias2": g2.sum(axis=(0, 1, 2)),
                    "dense": g3.T @ flat,
                    "bias3": g3.sum(axis=0),
                }
            )
    accuracy = (forward(test_x)[-1].argmax(axis=1) == test_y).mean()
    weights = {
        "sixteen": np.array(16, np.float32),
        "conv1": w["conv1"].reshape(16, 1, 3, 3),
        "conv2": w["conv2"].reshape(32, 16, 3, 3),
        **{key: w[key] for key in ("bias1", "bias2", "bias3", "dense")},
    }
    model = graph_model(
        [
            helper.make_node("Div", ["image", "sixteen"], ["scaled"]),
            helper.make_node("Conv", ["scaled", "conv1", "bias1"], ["c1"], kernel_shape=[3, 3], pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["a1"]),
            helper.make_node(
                "Conv", ["a1", "conv2", "bias2"], ["c2"], kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]
            ),
            helper.make_node("Relu", ["c2"], ["a2"]),
            helper.make_node("Flatten", ["a2"], ["flat"], axis=1),
            helper.make_node("Gemm", ["flat", "dense", "bias3"], ["logits"], transB=1),
        ],
        "digits",
        [("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [("logits", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    batches = [{"image": test_x[:1]}, {"image": test_x[1:4]}]
    write("digits", 1, model, batches, data, f"CNN of two convolutions, test accuracy {accuracy:.3f}")


def risk():
    """Gradient-boosted trees on 30 measurements of a tumour. Tree operators: ONNX Runtime only, tract has none."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    x, y = load_breast_cancer(return_X_y=True)
    data = {"name": "breast_cancer", "sha256": sha256(x, y)}
    x = x.astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=7, stratify=y)
    trees = GradientBoostingClassifier(n_estimators=60, max_depth=3, random_state=7).fit(train_x, train_y)
    accuracy = trees.score(test_x, test_y)
    model = to_onnx(
        trees,
        initial_types=[("features", FloatTensorType([None, 30]))],
        options={"zipmap": False},
        target_opset={"": OPSET, "ai.onnx.ml": ML_OPSET},
    )
    model.ir_version = IR_VERSION
    # The converter names the graph at random.
    model.graph.name = "risk"
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(model)
    batches = [{"features": test_x[:1]}, {"features": test_x[1:5]}]
    write("risk", 1, model, batches, data, f"60 boosted trees of depth 3, test accuracy {accuracy:.3f}")


VOCABULARY, WIDTH, WINDOW = 4096, 24, 20


def tokens(text):
    """Words to ids by hash, so that no vocabulary file is needed; 0 is padding."""
    return [zlib.crc32(word.encode()) % (VOCABULARY - 1) + 1 for word in re.findall(r"[a-z]+", text.lower())]


def topics():
    """Which data set a sentence describes, learnt from the descriptions that scikit-learn ships."""
    folder = pathlib.Path(sklearn.__file__).parent / "datasets" / "descr"
    files = sorted(folder.glob("*.rst"))
    data = {
        "name": "scikit-learn data set descriptions",
        "sha256": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
    }
    rng = np.random.default_rng(7)
    rows, labels, held_rows, held_labels = [], [], [], []
    for label, file in enumerate(files):
        ids = tokens(file.read_text(encoding="utf-8"))
        for number, at in enumerate(range(0, len(ids) - WINDOW, WINDOW // 2)):
            # Neighbouring windows overlap: those beside a held-out one are left out.
            if number % 8 in (6, 0):
                continue
            kept = (held_rows, held_labels) if number % 8 == 7 else (rows, labels)
            kept[0].append(ids[at : at + WINDOW])
            kept[1].append(label)
    x, y = np.array(rows), np.array(labels)
    w = {
        "embedding": (rng.standard_normal((VOCABULARY, WIDTH)) * 0.1).astype(np.float32),
        "dense": (rng.standard_normal((len(files), WIDTH)) * 0.1).astype(np.float32),
        "bias": np.zeros(len(files), np.float32),
    }
    adam = Adam(w, 1e-2)
    for _ in range(40):
        order = rng.permutation(len(x))
        for at in range(0, len(order), 64):
            batch = order[at : at + 64]
            # Windows of every length, so that the mean pooling is trained for short sentences too.
            ids = x[batch][:, : rng.integers(4, WINDOW + 1)]
            pooled = w["embedding"][ids].mean(axis=1)
            g = softmax_gradient(pooled @ w["dense"].T + w["bias"], y[batch])
            ge = np.zeros_like(w["embedding"])
            spread = np.repeat((g @ w["dense"] / ids.shape[1])[:, None], ids.shape[1], axis=1)
            np.add.at(ge, ids, spread)
            adam.step({"embedding": ge, "dense": g.T @ pooled, "bias": g.sum(axis=0)})
    guess = (w["embedding"][np.array(held_rows)].mean(axis=1) @ w["dense"].T + w["bias"]).argmax(axis=1)
    accuracy = (guess == np.array(held_labels)).mean()
    (HERE / "topics").mkdir(exist_ok=True)
    (HERE / "topics" / "labels.txt").write_text("".join(f"{file.stem}\n" for file in files))
    weights = {
        **w,
        "axis1": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
        "one": np.array(1, np.float32),
    }
    model = graph_model(
        [
            helper.make_node("Gather", ["embedding", "input_ids"], ["vectors"], axis=0),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "axis2"], ["mask3"]),
            helper.make_node("Mul", ["vectors", "mask3"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "axis1"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["mask", "axis1"], ["length"], keepdims=1),
            # A row of padding alone has length 0: its mean is zero, not NaN.
            helper.make_node("Max", ["length", "one"], ["divisor"]),
            helper.make_node("Div", ["sum", "divisor"], ["pooled"]),
            helper.make_node("Gemm", ["pooled", "dense", "bias"], ["logits"], transB=1),
        ],
        "topics",
        [
            ("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            ("attention_mask", TensorProto.INT64, ["batch", "sequence"]),
        ],
        [("logits", TensorProto.FLOAT, ["batch", len(files)])],
        weights,
    )

    def feed(*sentences):
        ids = [tokens(sentence) for sentence in sentences]
        longest = max(map(len, ids))
        return {
            "input_ids": np.array([row + [0] * (longest - len(row)) for row in ids], np.int64),
            "attention_mask": np.array([[1] * len(row) + [0] * (longest - len(row)) for row in ids], np.int64),
        }

    batches = [
        feed("the width of the petals and sepals of three species of flower"),
        feed("alcohol and malic acid in italian wines", "faces of people", "median house value in a block of california"),
    ]
    write("topics", 1, model, batches, data, f"mean of embeddings, accuracy {accuracy:.3f} on held-out windows")


if __name__ == "__main__":
    known = {"iris": iris, "digits": digits, "risk": risk, "topics": topics}
    for wanted in sys.argv[1:] or known:
        known[wanted]()
