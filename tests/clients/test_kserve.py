"""KServe's Python client, REST and gRPC. It needs another protobuf than tritonclient, so it runs in its own environment."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import latest

PYTHON = pathlib.Path(sys.prefix) / "kserve" / "bin" / "python"
SCRIPT = pathlib.Path(__file__).with_name("kserve_client.py")


@pytest.mark.parametrize("model", ["iris", "digits", "risk", "topics"])
def test_kserve_client(server, model):
    # This client cannot name a version: the latest one answers.
    case = latest(model)
    inputs = [
        {"name": name, "shape": array.shape, "datatype": case.datatypes[name], "data": array.ravel().tolist()}
        for name, array in case.feed.items()
    ]
    run = subprocess.run(
        [PYTHON, SCRIPT, server.http, server.grpc],
        input=json.dumps({"model": case.model, "inputs": inputs}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    for question in ("live", "ready", "model_ready", "grpc_live", "grpc_ready", "grpc_model_ready"):
        assert result[question] is True, question
    assert result["unknown_ready"] is False
    assert "nothing" in result["error"] and "404" in result["error"]
    for way in ("json", "binary", "grpc", "grpc_typed"):
        assert set(result[way]) == set(case.expected)
        for name, array in case.expected.items():
            got = np.array(result[way][name]["data"]).reshape(result[way][name]["shape"])
            assert got.shape == array.shape
            np.testing.assert_allclose(got, array, rtol=1e-4, atol=1e-4)
