"""A version that is loaded runs what its model was asked lately, before anybody gets its answers."""

import json
import shutil

import numpy as np
import onnx
import pytest
from conftest import running
from onnx import TensorProto, helper, numpy_helper
from test_admin import Admin, eventually

LOOPS = 10**12


def model(nodes, constants=()):
    """`y` of `x`, rows of one whole number."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.INT64, ["n", 1]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


def same():
    return model([helper.make_node("Identity", ["x"], ["y"])])


def table():
    """Knows what becomes of 0 to 3, and fails on anything else."""
    rows = numpy_helper.from_array(np.array([10, 20, 30, 40], np.int64), "rows")
    return model([helper.make_node("Gather", ["rows", "x"], ["y"])], [rows])


def counting():
    """Counts up to the largest of its inputs first."""
    of = lambda name, kind, shape: helper.make_tensor_value_info(name, kind, shape)
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["before", "none"], ["after"])],
        "body",
        [of("turn", TensorProto.INT64, []), of("on", TensorProto.BOOL, []), of("before", TensorProto.INT64, ["n", 1])],
        [of("still", TensorProto.BOOL, []), of("after", TensorProto.INT64, ["n", 1])],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Loop", ["most", "", "x"], ["y"], body=body),
    ]
    return model(nodes, [numpy_helper.from_array(np.array(0, np.int64), "none")])


def put(repository, version, content, settings=""):
    folder = repository / "m" / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(content)
    (repository / "m" / "tidegate.toml").write_text(settings)


class Gate:
    def __init__(self, server):
        self.server = server
        self.admin = Admin(server.admin, (server.state / "admin-token").read_text().strip())

    @staticmethod
    def body(*values):
        return {"inputs": [{"name": "x", "datatype": "INT64", "shape": [len(values), 1], "data": list(values)}]}

    def ask(self, *values, version=1):
        status, _, answer = self.server.post(f"/v2/models/m/versions/{version}/infer", self.body(*values))
        assert status == 200, answer
        return json.loads(answer)["outputs"][0]["data"]

    def load(self, version):
        return self.admin.call("POST", f"/models/m/versions/{version}:load", {"reason": "a test"})

    def version(self, number):
        known = self.admin.ok("GET", "/models/m")["versions"]
        return next(each for each in known if each["version"] == str(number))

    def check(self, number):
        """What is said of its run on recorded inputs."""
        checks = self.version(number)["checks"]
        return next((each for each in checks if each["name"] == "recorded_inputs"), None)


@pytest.fixture
def gate(tmp_path):
    repository = tmp_path / "models"
    put(repository, 1, same())
    config = "[probe]\nwall_max_ms = 5000\n[repository]\npoll_ms = 3600000\n"
    with running(repository, tmp_path / "gate", config=config) as server:
        found = Gate(server)
        found.repository = repository
        yield found


def test_a_new_version_runs_what_the_old_one_was_asked(gate):
    for value in range(4):
        gate.ask(value, 3 - value)
    put(gate.repository, 2, table())
    assert gate.load(2).status == 200
    assert gate.check(1) is None, "nobody had asked anything"
    assert gate.check(2) == {"name": "recorded_inputs", "outcome": "pass", "detail": "4 ran"}
    assert gate.ask(2, version=2) == [30]


def test_an_error_is_said_and_stops_nothing(gate):
    gate.ask(1), gate.ask(7), gate.ask(2)
    _, headers, _ = gate.server.post("/v2/models/m/infer", gate.body(-987654321))
    put(gate.repository, 2, table())
    assert gate.load(2).status == 200
    check = gate.check(2)
    newest = headers["tidegate-prediction-id"]
    assert check == {"name": "recorded_inputs", "outcome": "warn", "detail": f"2 ran, 2 failed: prediction {newest}"}
    assert "987654321" not in gate.server.log.read_text(), "what was recorded is quoted nowhere"
    assert gate.version(2)["state"] == "ready" and gate.ask(3, version=2) == [40]


def test_what_hangs_the_trial_is_not_loaded(gate):
    gate.ask(LOOPS)
    put(gate.repository, 2, counting())
    refused = gate.load(2)
    assert refused.status == 409 and "recorded inputs" in refused.json["detail"], refused.body
    assert "longer than the limit of 5 s" in refused.json["detail"]
    # The watcher may try it as well, with the same end.
    eventually(lambda: gate.version(2)["state"] == "failed")
    assert "recorded inputs" in gate.version(2)["reason"] and gate.ask(5) == [5]
    # Who knows better says so; then it is a model as any other.
    shutil.rmtree(gate.repository / "m" / "2")
    put(gate.repository, 2, counting(), "[warmup]\nrecords = 0\n")
    assert gate.load(2).status == 200
    assert gate.check(2) is None and gate.ask(5, version=2) == [5]


def test_after_a_restart_only_what_the_same_bytes_answered_is_run(tmp_path):
    repository = tmp_path / "models"
    put(repository, 1, same())
    put(repository, 2, table())
    for start in range(2):
        with running(repository, tmp_path / "gate") as server:
            gate = Gate(server)
            if start == 0:
                gate.ask(7)
                gate.ask(1, version=2)
            log = server.log
    # What version 1 was asked would have failed on version 2.
    warmed = [line for line in log.read_text().splitlines() if "warmed with recorded inputs" in line]
    assert len(warmed) == 2, warmed
    assert all("ran=1" in line and "failed=0" in line for line in warmed), warmed
