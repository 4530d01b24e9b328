"""Starting and stopping: a drain without a failed request, broken models beside good ones, how starting can fail."""

import json
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import BINARY, MODELS, ROOT, Server, running
from onnx import TensorProto, helper, numpy_helper


class Load:
    """Threads that each send one request after another until the server says that it is going away."""

    def __init__(self, server, case, threads=4):
        self.server, self.case = server, case
        self.answered, self.failed = 0, []
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        targets = [self.http, self.grpc] * (threads // 2)
        self.threads = [threading.Thread(target=target) for target in targets]
        for thread in self.threads:
            thread.start()

    def loop(self, client, module):
        while not self.stopped.is_set():
            try:
                self.case.check(client.infer(self.case.model, self.case.inputs(module)))
            except Exception as error:
                with self.lock:
                    self.failed.append(repr(error))
                return
            with self.lock:
                self.answered += 1

    def http(self):
        with triton_http.InferenceServerClient(self.server.http) as client:
            self.loop(client, triton_http)

    def grpc(self):
        with triton_grpc.InferenceServerClient(self.server.grpc) as client:
            self.loop(client, triton_grpc)

    def join(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join(30)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def test_drain_under_load(tmp_path, iris):
    """Clients do as load balancers do: they leave when readiness goes; until then and while leaving nothing fails."""
    server = Server(MODELS, tmp_path, "[server]\ndrain_notice_ms = 2000\n")
    load = Load(server, iris)
    try:
        wait_for(lambda: load.answered > 50 or load.failed)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/v2/health/ready")[0] == 503, 2)
        noticed = load.answered
        # Not ready, and still answering.
        wait_for(lambda: load.answered > noticed + 20 or load.failed, 2)
    finally:
        load.join()
        code = server.process.wait(40)
    assert load.failed == []
    assert code == 0, server.log.read_text()


def write_slow(folder):
    """A model that computes for some tenths of a second: forty products of large matrices."""
    size = 1024
    (folder / "1").mkdir(parents=True)
    weights = numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")
    names = ["x", *(f"h{at}" for at in range(39)), "y"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [source, "w"], [target]) for source, target in zip(names, names[1:])],
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", size])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "1" / "model.onnx"))


def test_requests_in_flight_at_sigterm_are_answered(tmp_path):
    """No notice at all: what has been accepted is still finished."""
    write_slow(tmp_path / "models" / "slow")
    rows = np.ones((1024, 1024), np.float32)
    server = Server(tmp_path / "models", tmp_path / "server", "[server]\ndrain_notice_ms = 0\n")
    answers = []

    def send(module, address):
        tensor = module.InferInput("x", list(rows.shape), "FP32").set_data_from_numpy(rows)
        with module.InferenceServerClient(address) as client:
            try:
                answers.append(np.array_equal(client.infer("slow", [tensor]).as_numpy("y"), rows))
            except Exception as error:
                answers.append(error)

    sides = [(triton_grpc, server.grpc), (triton_http, server.http)] * 2
    threads = [threading.Thread(target=send, args=side) for side in sides]
    for thread in threads:
        thread.start()
    # Time for four times 4 MiB to arrive, not for 300 GFLOP.
    time.sleep(0.5)
    server.stop()
    for thread in threads:
        thread.join(30)
    assert answers == [True] * 4


def test_a_second_signal_in_the_middle_of_runs_ends_it_cleanly(tmp_path):
    """Runs that nobody waits for any more are still in the engine when the process goes."""
    write_slow(tmp_path / "models" / "slow")
    rows = np.ones((1024, 1024), np.float32)
    for attempt in range(3):
        server = Server(tmp_path / "models", tmp_path / f"server{attempt}")
        tensor = triton_grpc.InferInput("x", list(rows.shape), "FP32").set_data_from_numpy(rows)
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            ended = threading.Semaphore(0)
            for _ in range(4):
                client.async_infer("slow", [tensor], callback=lambda result, error: ended.release())
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.get("/v2/health/ready")[0] == 503, 2)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0, server.log.read_text()
        assert "stopping now" in server.log.read_text()


def test_readiness_goes_before_the_listener(tmp_path):
    server = Server(MODELS, tmp_path, "[server]\ndrain_notice_ms = 1500\n")
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.get("/v2/health/ready")[0] == 503, 1)
    assert server.get("/v2/health/live")[0] == 200
    assert server.process.wait(40) == 0


def test_a_quiet_stream_does_not_hold_up_the_end(tmp_path, iris):
    """The grace is ten minutes: only a stream that the server ends itself lets it stop in time."""
    server = Server(MODELS, tmp_path, "[server]\ndrain_grace_ms = 600000\n")
    answers = []
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(callback=lambda result, error: answers.append((result, error)))
        client.async_stream_infer("iris", iris.inputs(triton_grpc))
        wait_for(lambda: answers)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
    assert answers[0][1] is None
    iris.check(answers[0][0])


def test_sigint_too(tmp_path):
    server = Server(MODELS, tmp_path)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(40) == 0


def test_a_broken_model_does_not_stop_the_others(tmp_path, iris):
    repository = tmp_path / "models"
    shutil.copytree(MODELS, repository)
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"this is no model")
    # A version whose samples do not match never becomes ready.
    samples = repository / "digits" / "1" / "samples.json"
    document = json.loads(samples.read_text())
    document["samples"][0]["response"]["outputs"][0]["data"][0] += 1
    samples.write_text(json.dumps(document))
    server = Server(repository, tmp_path / "server", wait=False)
    try:
        with triton_http.InferenceServerClient(server.http) as client:

            def settled():
                assert server.process.poll() is None, server.log.read_text()
                try:
                    index = client.get_model_repository_index()
                except Exception:
                    return False
                states = {each["name"]: each for each in index}
                good = all(states.get(name, {}).get("state") == "READY" for name in ("iris", "risk", "topics"))
                bad = all(states.get(name, {}).get("state") == "UNAVAILABLE" for name in ("broken", "digits"))
                return good and bad and states

            wait_for(settled, 60)
            states = settled()
            assert states["broken"]["reason"] and states["digits"]["reason"]
            iris.check(client.infer("iris", iris.inputs(triton_http)))
            assert not client.is_model_ready("broken")
            assert not client.is_model_ready("digits")
    finally:
        server.stop()


def test_an_empty_repository_serves_nothing_and_says_so(tmp_path):
    repository = tmp_path / "models"
    repository.mkdir()
    server = Server(repository, tmp_path / "server", wait=False)
    try:
        wait_for(lambda: answers(server))
        assert server.get("/v2/models/iris")[0] == 404
    finally:
        server.stop()


def answers(server):
    try:
        return server.get("/v2/health/live")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("engine", ["ort", "tract"])
def test_either_engine(tmp_path, engine):
    """The three models that both engines can run."""
    repository = tmp_path / "models"
    shutil.copytree(MODELS, repository, ignore=shutil.ignore_patterns("risk"))
    with running(repository, tmp_path / "server", f'[engine]\nengine = "{engine}"\n') as server:
        for model in ("iris", "digits", "topics"):
            assert json.loads(server.get(f"/v2/models/{model}/ready")[1])["ready"] is True


def test_wrong_usage_exits_2(tmp_path):
    config = tmp_path / "bad.toml"
    config.write_text("[server]\nhtp_address = 1\n")
    run = subprocess.run([BINARY, "check-config", "--config", config], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert "htp_address" in run.stdout + run.stderr
