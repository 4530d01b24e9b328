"""Registers models of `y = x + k` with the MLflow server of the environment; run in MLflow's own environment.

`python mlflow_models.py NAME=K,K... NAME=K...` logs one run and one version for each `K` and prints the versions by
name as JSON. `K` may be `K:large`, for weights of 20 MiB in a file beside the model, or `K:sklearn`, for a model that is none of ours.
"""

import json
import sys

import mlflow
import numpy as np
from mlflow.models import infer_signature
from onnx import TensorProto, helper, numpy_helper

LARGE = 5 * 1024 * 1024
# Said, so that the client does not load each model in a process of its own to find out.
NEEDS = {"pip_requirements": ["onnx"]}


def adding(k, large):
    """`y = x + k`; a large one adds the sum of many zeros too."""
    value = numpy_helper.from_array(np.full((4,), k, np.float32), "k")
    nodes, weights = [helper.make_node("Add", ["x", "k"], ["y"])], [value]
    if large:
        weights.append(numpy_helper.from_array(np.zeros((LARGE,), np.float32), "zeros"))
        nodes = [
            helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
            helper.make_node("Add", ["k", "zero"], ["sum"]),
            helper.make_node("Add", ["x", "sum"], ["y"]),
        ]
    shape = ["batch", 4]
    graph = helper.make_graph(
        nodes,
        "adding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def register(name, wanted):
    client = mlflow.MlflowClient()
    versions = []
    for each in wanted:
        k, _, kind = each.partition(":")
        with mlflow.start_run() as run:
            mlflow.log_metric("auc", 0.5 + float(k) / 100)
            mlflow.log_param("k", k)
            mlflow.set_tag("mlflow.source.git.commit", f"c0ffee{k}")
            example = np.ones((1, 4), np.float32)
            mlflow.log_input(mlflow.data.from_numpy(example, name="ones"), context="training")
            if kind == "sklearn":
                from sklearn.linear_model import LinearRegression

                fitted = LinearRegression().fit(example, [float(k)])
                signature = infer_signature(example, fitted.predict(example))
                more = {"registered_model_name": name, "signature": signature, **NEEDS}
                mlflow.sklearn.log_model(fitted, name="model", **more)
            else:
                mlflow.onnx.log_model(
                    adding(float(k), kind == "large"),
                    name="model",
                    registered_model_name=name,
                    save_as_external_data=kind == "large",
                    **NEEDS,
                )
        newest = max(int(found.version) for found in client.search_model_versions(f"name='{name}'"))
        versions.append({"version": newest, "run": run.info.run_id})
    return versions


if __name__ == "__main__":
    wanted = (argument.split("=") for argument in sys.argv[1:])
    print(json.dumps({name: register(name, values.split(",")) for name, values in wanted}))
