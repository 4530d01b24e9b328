"""Starts the built binary for the tests, on free ports, and asks Python's onnxruntime for the right answers."""

import atexit
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import onnxruntime
import pytest
from tritonclient.utils import triton_to_np_dtype

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("TIDEGATE_BINARY", ROOT / "target" / "debug" / "tidegate"))
MODELS = ROOT / "models"
HOST = "127.0.0.1"
READY_WITHIN_S = 60
STOPPED_WITHIN_S = 40


def free_ports(count):
    """Ports that nothing listens on; all held until the last is found, so that none comes twice."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def tidegate(*arguments, code=0):
    """Runs a command that must end with `code`; what it printed, and of one that fails what it complained of."""
    done = subprocess.run([str(BINARY), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr or done.stdout
    return done.stdout if code == 0 else done.stderr


def eventually(what, within=60):
    """What `what` gives, once it is something."""
    until = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < until, what
        time.sleep(0.05)
    return found


class Server:
    """A running gateway: `http`, `grpc`, `metrics` and `admin` are `host:port`; `state` is its state folder."""

    def __init__(self, repository, folder, config=None, wait=True, environment=None):
        self.http, self.grpc, self.metrics, self.admin = (f"{HOST}:{port}" for port in free_ports(4))
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.state = folder / "log", folder / "state"
        arguments = [
            *(str(BINARY), "serve", "--model-repository", str(repository), "--state-dir", str(self.state)),
            *("--http-address", self.http, "--grpc-address", self.grpc, "--metrics-address", self.metrics),
            *("--admin-address", self.admin),
        ]
        if config:
            (folder / "tidegate.toml").write_text(config)
            arguments += ["--config", str(folder / "tidegate.toml")]
        with self.log.open("wb") as log:
            # The models were written just now, whole: nobody has to wait and see.
            variables = {**os.environ, "TIDEGATE_REPOSITORY_QUIET_MS": "0", **(environment or {})}
            self.process = subprocess.Popen(
                arguments, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=variables
            )
        # A test that fails half-way leaves nothing running; for a process that has ended this does nothing.
        atexit.register(self.process.kill)
        if wait:
            self.wait_ready()

    def get(self, path, address=None):
        """Status and body."""
        try:
            with urllib.request.urlopen(f"http://{address or self.http}{path}", timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path, body, headers=()):
        """Status, headers and body of a POST; `body` is bytes or something for JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.http}{path}", data, dict(headers), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def wait_ready(self):
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"exited with {self.process.returncode}:\n{self.log.read_text()}"
            with contextlib.suppress(OSError):
                if self.get("/v2/health/ready")[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready within {READY_WITHIN_S} s:\n{self.log.read_text()}")

    def stop(self):
        """SIGTERM; the exit code must be 0."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still there {STOPPED_WITHIN_S} s after SIGTERM:\n{self.log.read_text()}") from None
        assert code == 0, f"exit code {code}:\n{self.log.read_text()}"


@contextlib.contextmanager
def running(*args, **kwargs):
    server = Server(*args, **kwargs)
    try:
        yield server
    except BaseException:
        server.process.kill()
        server.process.wait()
        raise
    server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Serves the repository's own models."""
    assert BINARY.exists(), f"{BINARY} is not built: cargo build"
    with running(MODELS, tmp_path_factory.mktemp("server")) as started:
        yield started


class Case:
    """One sample of one of the repository's models: the input arrays and what Python's onnxruntime answers."""

    def __init__(self, model, version, request):
        self.model, self.version = model, version
        self.feed = {
            tensor["name"]: np.array(tensor["data"], triton_to_np_dtype(tensor["datatype"])).reshape(tensor["shape"])
            for tensor in request["inputs"]
        }
        self.datatypes = {tensor["name"]: tensor["datatype"] for tensor in request["inputs"]}
        self.expected = reference(MODELS / model / version / "model.onnx", self.feed)

    def inputs(self, module, **options):
        """The inputs for tritonclient's `http` or `grpc` module."""
        made = []
        for name, array in self.feed.items():
            tensor = module.InferInput(name, list(array.shape), self.datatypes[name])
            tensor.set_data_from_numpy(array, **options)
            made.append(tensor)
        return made

    def check(self, result):
        """Compares every output of a tritonclient result."""
        for name, array in self.expected.items():
            got = result.as_numpy(name)
            assert got is not None, f"no output {name}"
            assert got.shape == array.shape and got.dtype == array.dtype
            np.testing.assert_allclose(got, array, rtol=1e-4, atol=1e-4)


def reference(path, feed):
    """What Python's onnxruntime answers, by output name."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed)))


def latest(model):
    """The last sample of a model's latest version."""
    path = max((MODELS / model).glob("*/samples.json"), key=lambda path: int(path.parent.name))
    return Case(model, path.parent.name, json.loads(path.read_text())["samples"][-1]["request"])


def _cases():
    for path in sorted(MODELS.glob("*/*/samples.json")):
        for at, sample in enumerate(json.loads(path.read_text())["samples"]):
            model, version = path.parts[-3:-1]
            yield pytest.param((model, version, sample["request"]), id=f"{model}-{version}-{at}")


@pytest.fixture(params=list(_cases()))
def case(request):
    return Case(*request.param)


@pytest.fixture
def iris():
    """One flower."""
    request = {
        "inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}],
    }
    return Case("iris", "2", request)
