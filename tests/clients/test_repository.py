"""The model repository: what is loaded, overridden, refused and unloaded, and what callers see meanwhile."""

import contextlib
import json
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import MODELS, Server, running
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

CLIENTS = {"http": triton_http, "grpc": triton_grpc}
CONTROL = "[repository]\nmodel_control = true\n"
# What a caller may get while a model comes and goes, beside an answer.
CLEAN = {"http": {"404", "503"}, "grpc": {"StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE"}}


def scaling(factor, width=4, products=0):
    """A model that multiplies rows of `width` numbers by `factor`, after `products` products with the identity."""
    names = ["x", *(f"h{at}" for at in range(products))]
    nodes = [helper.make_node("MatMul", [source, "eye"], [target]) for source, target in zip(names, names[1:])]
    nodes.append(helper.make_node("Mul", [names[-1], "factor"], ["y"]))
    weights = [numpy_helper.from_array(np.array(factor, np.float32), "factor")]
    if products:
        weights.append(numpy_helper.from_array(np.eye(width, dtype=np.float32), "eye"))
    graph = helper.make_graph(
        nodes,
        "scaling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def write(repository, name, factors, config=None, **options):
    """A scaling model in the repository: `factors` by version."""
    for version, factor in factors.items():
        folder = repository / name / str(version)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(scaling(factor, **options))
    if config:
        (repository / name / "config.pbtxt").write_text(config)


def factor_of(client, protocol, name, version="", width=4):
    """What the model multiplies by."""
    module = CLIENTS[protocol]
    tensor = module.InferInput("x", [1, width], "FP32")
    tensor.set_data_from_numpy(np.ones((1, width), np.float32))
    return float(client.infer(name, [tensor], model_version=version).as_numpy("y")[0, 0])


def index_of(client, protocol):
    """State and reason by model and version."""
    if protocol == "grpc":
        models = client.get_model_repository_index(as_json=True).get("models", [])
    else:
        models = client.get_model_repository_index()
    return {
        (each["name"], each.get("version", "")): (each.get("state", ""), each.get("reason", "")) for each in models
    }


def max_batch_size(client, protocol, name):
    if protocol == "grpc":
        config = client.get_model_config(name, as_json=True)["config"]
    else:
        config = client.get_model_config(name)
    return int(config.get("max_batch_size", 0))


def connect(server, protocol):
    return CLIENTS[protocol].InferenceServerClient(getattr(server, protocol))


@pytest.fixture(params=["http", "grpc"])
def protocol(request):
    return request.param


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A server whose models `http` and `grpc`, one for each protocol's tests, may be changed."""
    folder = tmp_path_factory.mktemp("controlled")
    for name in CLIENTS:
        write(folder / "models", name, {1: 2.0})
    with running(folder / "models", folder / "server", CONTROL) as started:
        yield started


@pytest.fixture
def client(controlled, protocol):
    with connect(controlled, protocol) as made:
        # As the repository has it, whatever the test before did.
        made.load_model(protocol)
        yield made


def test_unloading_and_loading(client, protocol):
    client.unload_model(protocol)
    assert not client.is_model_ready(protocol)
    state, reason = index_of(client, protocol)[(protocol, "1")]
    assert state == "UNAVAILABLE" and reason
    with pytest.raises(InferenceServerException) as caught:
        factor_of(client, protocol, protocol)
    assert caught.value.status() in CLEAN[protocol]
    client.load_model(protocol)
    assert client.is_model_ready(protocol)
    assert index_of(client, protocol)[(protocol, "1")][0] == "READY"
    assert factor_of(client, protocol, protocol) == 2


def test_unloading_twice_and_what_is_not_there(client, protocol):
    client.unload_model(protocol)
    client.unload_model(protocol)
    assert not client.is_model_ready(protocol)
    for ask in (client.unload_model, client.load_model):
        with pytest.raises(InferenceServerException, match="nothing.*not in the repository") as caught:
            ask("nothing")
        assert caught.value.status() in CLEAN[protocol]
    assert not [name for name, _ in index_of(client, protocol) if name == "nothing"]


def test_a_load_with_a_configuration(client, protocol):
    client.load_model(protocol, config=json.dumps({"max_batch_size": 7}))
    assert max_batch_size(client, protocol, protocol) == 7
    assert factor_of(client, protocol, protocol) == 2
    # The next plain load goes by the repository again.
    client.load_model(protocol)
    assert max_batch_size(client, protocol, protocol) != 7


def test_a_load_with_files(client, protocol):
    client.load_model(
        protocol, config=json.dumps({"max_batch_size": 5}), files={"file:1/model.onnx": scaling(3.0)}
    )
    assert factor_of(client, protocol, protocol) == 3
    assert max_batch_size(client, protocol, protocol) == 5
    client.load_model(protocol)
    assert factor_of(client, protocol, protocol) == 2


def test_a_load_with_files_of_a_new_model(client, protocol):
    name = f"brought-{protocol}"
    files = {"file:1/model.onnx": scaling(4.0), "file:2/model.onnx": scaling(5.0)}
    client.load_model(name, config=json.dumps({"version_policy": {"all": {}}}), files=files)
    assert [factor_of(client, protocol, name, version) for version in ("", "1", "2")] == [5, 4, 5]
    client.unload_model(name)
    assert not client.is_model_ready(name)


@pytest.mark.parametrize(
    ("content", "path"), [(b"no model", "1/model.onnx"), (None, "../1/model.onnx"), (None, "/1/model.onnx")]
)
def test_files_that_are_refused_leave_the_old_version(client, protocol, content, path):
    with pytest.raises(InferenceServerException) as caught:
        client.load_model(protocol, config="{}", files={f"file:{path}": content or scaling(3.0)})
    assert caught.value.status() in {"400", "StatusCode.INVALID_ARGUMENT"}
    assert factor_of(client, protocol, protocol) == 2


@pytest.mark.parametrize(
    ("tensor", "sides"),
    [
        ({"name": "x", "data_type": "TYPE_INT64", "dims": [4]}, ("INT64", "FP32")),
        ({"name": "x", "data_type": "TYPE_FP32", "dims": [9]}, ("9", "4")),
        ({"name": "z", "data_type": "TYPE_FP32", "dims": [4]}, ("'z'", "x")),
    ],
    ids=["datatype", "shape", "name"],
)
def test_a_configuration_that_contradicts_the_graph(client, protocol, tensor, sides):
    config = json.dumps({"max_batch_size": 8, "input": [tensor]})
    with pytest.raises(InferenceServerException) as caught:
        client.load_model(protocol, config=config)
    assert caught.value.status() in {"400", "StatusCode.INVALID_ARGUMENT"}
    message = caught.value.message()
    assert all(side in message for side in sides), message
    assert "/tmp" not in message and "state" not in message
    assert client.is_model_ready(protocol)
    assert factor_of(client, protocol, protocol) == 2
    state, reason = index_of(client, protocol)[(protocol, "1")]
    assert state == "READY" and reason


def test_a_configuration_that_is_no_json(client, protocol):
    with pytest.raises(InferenceServerException):
        client.load_model(protocol, config="{max_batch_size")
    assert factor_of(client, protocol, protocol) == 2


def test_version_policies(tmp_path):
    factors = {1: 1.0, 2: 2.0, 3: 3.0, 10: 10.0}
    policies = {
        "default": (None, {"1", "2", "3", "10"}),
        "latest": ("version_policy: { latest: { num_versions: 1 } }", {"10"}),
        "two": ("version_policy: { latest { num_versions: 2 } }", {"3", "10"}),
        "all": ("version_policy: { all: { } }", {"1", "2", "3", "10"}),
        "specific": ("version_policy: { specific: { versions: [ 1, 3 ] } }", {"1", "3"}),
    }
    for name, (policy, _) in policies.items():
        write(tmp_path / "models", name, factors, policy)
    with running(tmp_path / "models", tmp_path / "server", CONTROL) as server:
        for protocol in CLIENTS:
            with connect(server, protocol) as client:
                index = index_of(client, protocol)
                for name, (_, versions) in policies.items():
                    assert {version for model, version in index if model == name} == versions
                    highest = max(versions, key=int)
                    assert factor_of(client, protocol, name) == int(highest)
                    for version in map(str, factors):
                        if version in versions:
                            assert factor_of(client, protocol, name, version) == int(version)
                        else:
                            assert not client.is_model_ready(name, version)
        # A policy that changes is followed at the next load.
        (tmp_path / "models" / "latest" / "config.pbtxt").write_text(policies["specific"][0])
        with connect(server, "http") as client:
            client.load_model("latest")
            assert {version for model, version in index_of(client, "http") if model == "latest"} == {"1", "3"}
            assert factor_of(client, "http", "latest") == 3
            assert not client.is_model_ready("latest", "10")


def test_a_broken_new_version_does_not_end_the_old(tmp_path, protocol):
    """Also where the policy wants only the new one, or one that is not there."""
    write(tmp_path / "models", "scaling", {1: 2.0}, "version_policy: { latest: { num_versions: 1 } }")
    with running(tmp_path / "models", tmp_path / "server", CONTROL) as server, connect(server, protocol) as client:
        new = tmp_path / "models" / "scaling" / "2"
        new.mkdir()
        (new / "model.onnx").write_bytes(b"no model")
        refusals = [None, json.dumps({"version_policy": {"specific": {"versions": [9]}}})]
        for config in refusals:
            with pytest.raises(InferenceServerException, match="version [29]"):
                client.load_model("scaling", config=config)
            assert client.is_model_ready("scaling")
            assert factor_of(client, protocol, "scaling") == 2
            assert index_of(client, protocol)[("scaling", "1")][0] == "READY"
        (new / "model.onnx").write_bytes(scaling(3.0))
        client.load_model("scaling")
        assert factor_of(client, protocol, "scaling") == 3
        assert set(index_of(client, protocol)) == {("scaling", "2")}


class Callers:
    """Threads that send without pause, whatever comes back."""

    def __init__(self, server, name, width):
        self.server, self.name, self.width = server, name, width
        self.answered, self.refused, self.wrong = 0, 0, []
        self.lock, self.done = threading.Lock(), threading.Event()
        self.threads = [threading.Thread(target=self.loop, args=(each,)) for each in ["http", "grpc"] * 3]
        for thread in self.threads:
            thread.start()

    def loop(self, protocol):
        with connect(self.server, protocol) as client:
            while not self.done.is_set():
                problem, refused = None, False
                try:
                    got = factor_of(client, protocol, self.name, width=self.width)
                    problem = None if got == 2 else got
                except InferenceServerException as error:
                    refused = error.status() in CLEAN[protocol]
                    problem = None if refused else (protocol, error.status(), error.message())
                except Exception as error:
                    problem = (protocol, repr(error))
                with self.lock:
                    self.refused += refused
                    self.answered += not refused
                    if problem is not None:
                        self.wrong.append(problem)
                if refused:
                    time.sleep(0.005)

    def wait(self, count, more):
        """Until `more` of the counter were added."""
        target, deadline = getattr(self, count) + more, time.monotonic() + 30
        while getattr(self, count) < target and not self.wrong:
            assert time.monotonic() < deadline, f"{count}: {getattr(self, count)} of {target}"
            time.sleep(0.005)

    def join(self):
        self.done.set()
        for thread in self.threads:
            thread.join(30)


def test_unloading_and_reloading_under_load(tmp_path):
    """Every request is answered, or refused as one to a model that is not there."""
    width = 512
    write(tmp_path / "models", "busy", {1: 2.0}, width=width, products=40)
    with running(tmp_path / "models", tmp_path / "server", CONTROL) as server:
        callers = Callers(server, "busy", width)
        try:
            with connect(server, "http") as client:
                for at in range(6):
                    callers.wait("answered", 12)
                    if at % 2:
                        # Replaced in place: nothing may be refused for it.
                        refused = callers.refused
                        client.load_model("busy", config=json.dumps({"max_batch_size": 2 + at}))
                        callers.wait("answered", 12)
                        assert callers.refused == refused
                    client.unload_model("busy")
                    assert not client.is_model_ready("busy")
                    callers.wait("refused", 12)
                    client.load_model("busy")
                    assert client.is_model_ready("busy")
        finally:
            callers.join()
        assert callers.wrong == []
        assert callers.answered > 0 and callers.refused > 0


def has_cuda():
    with contextlib.suppress(OSError):
        return any(path.name.startswith("nvidia") for path in pathlib.Path("/dev").iterdir())
    return False


@pytest.mark.skipif(has_cuda(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.pbtxt", "instance_group [ { count: 1 kind: KIND_GPU gpus: [ 0 ] } ]"),
        ("tidegate.toml", '[engine]\nexecution_providers = ["cuda", "cpu"]\n'),
    ],
    ids=["pbtxt", "toml"],
)
def test_a_model_for_a_gpu_is_served_without_one(tmp_path, file, text):
    write(tmp_path / "models", "scaling", {1: 2.0})
    (tmp_path / "models" / "scaling" / file).write_text(text)
    with running(tmp_path / "models", tmp_path / "server") as server:
        for protocol in CLIENTS:
            with connect(server, protocol) as client:
                assert factor_of(client, protocol, "scaling") == 2
        log = server.log.read_text()
        assert "provider: cpu, because cuda is not usable" in log, log


def test_a_second_start_reuses_the_verdicts(tmp_path, iris):
    def verdicts():
        files = (tmp_path / "server" / "state" / "cache" / "probe").iterdir()
        return {path.name: path.stat().st_mtime_ns for path in files}

    def copies():
        # A folder's time says when it was last used.
        found = (tmp_path / "server" / "state" / "cache" / "models").rglob("*")
        return {path: path.stat().st_mtime_ns for path in found if path.is_file()}

    with running(MODELS, tmp_path / "server"):
        first = verdicts(), copies()
    assert len(first[0]) == len(list(MODELS.glob("*/*/model.onnx")))
    with running(MODELS, tmp_path / "server") as server:
        assert (verdicts(), copies()) == first
        with connect(server, "http") as client:
            iris.check(client.infer("iris", iris.inputs(triton_http)))


def test_a_changed_model_gets_a_verdict_of_its_own(tmp_path):
    def verdicts():
        return {path.name for path in (tmp_path / "server" / "state" / "cache" / "probe").iterdir()}

    write(tmp_path / "models", "scaling", {1: 2.0})
    with running(tmp_path / "models", tmp_path / "server"):
        first = verdicts()
    (tmp_path / "models" / "scaling" / "1" / "model.onnx").write_bytes(scaling(3.0))
    # Other bytes under a number that was seen: only who says so gets them.
    with running(tmp_path / "models", tmp_path / "server") as server, connect(server, "http") as client:
        assert factor_of(client, "http", "scaling") == 2
    with running(tmp_path / "models", tmp_path / "server", "[repository]\npin_digests = false\n") as server:
        assert len(verdicts() - first) == 1
        with connect(server, "http") as client:
            assert factor_of(client, "http", "scaling") == 3


def test_broken_models_beside_good_ones(tmp_path):
    """Each broken one is listed with its reason and can be repaired; the good ones serve meanwhile."""
    repository = tmp_path / "models"
    write(repository, "good", {1: 2.0})
    write(repository, "config", {1: 2.0}, "max_batch_size: 8\ninput [ { name: \"x\" data_type: TYPE_INT8 dims: [ 4 ] } ]")
    write(repository, "syntax", {1: 2.0}, "max_batch_size: [ 8")
    write(repository, "half", {1: 2.0, 2: 3.0})
    (repository / "half" / "2" / "model.onnx").write_bytes(scaling(3.0)[:40])
    (repository / "empty" / "1").mkdir(parents=True)
    (repository / "bare").mkdir()
    server = Server(repository, tmp_path / "server", CONTROL, wait=False)
    try:
        with connect(server, "http") as client:
            index = settled(server, client)
            broken = {"config": "1", "syntax": "", "half": "2", "empty": "1", "bare": ""}
            for name, version in broken.items():
                state, reason = index[(name, version)]
                assert state == "UNAVAILABLE" and reason, name
                assert str(tmp_path) not in reason
            assert "INT8" in index[("config", "1")][1] and "FP32" in index[("config", "1")][1]
            assert index[("good", "1")] == ("READY", "") and index[("half", "1")][0] == "READY"
            assert factor_of(client, "http", "good") == 2
            assert factor_of(client, "http", "half", "1") == 2
            # Repaired while it runs.
            (repository / "config" / "config.pbtxt").unlink()
            client.load_model("config")
            assert factor_of(client, "http", "config") == 2
    finally:
        server.stop()


def settled(server, client):
    """The index once nothing is loading any more."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()
        with contextlib.suppress(OSError, InferenceServerException):
            index = index_of(client, "http")
            # `bare` has no version; it has a reason when it was looked at.
            if index and all(state == "READY" or reason for state, reason in index.values()):
                return index
        time.sleep(0.05)
    raise AssertionError(server.log.read_text())


def test_unloading_everything(tmp_path, protocol):
    repository = tmp_path / "models"
    shutil.copytree(MODELS, repository)
    names = sorted(path.name for path in repository.iterdir() if path.is_dir())
    with running(repository, tmp_path / "server", CONTROL) as server, connect(server, protocol) as client:
        for name in names:
            client.unload_model(name)
        for name in names:
            assert not client.is_model_ready(name)
            status, body = server.get(f"/v2/models/{name}/ready")
            assert status != 200 and json.loads(body), (status, body)
        assert client.is_server_live()
        assert all(state == "UNAVAILABLE" for state, _ in index_of(client, protocol).values())
        assert server.get("/v2/models/iris")[0] == 404
        client.load_model("iris")
        assert client.is_model_ready("iris") and not client.is_model_ready("digits")
