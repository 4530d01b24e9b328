"""Models from a real MLflow server (accounts, proxied artifacts, webhooks) and a real S3 endpoint, both started here."""

import atexit
import base64
import contextlib
import hashlib
import hmac
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from conftest import BINARY, HOST, ROOT, Server, free_ports, running
from test_repository import scaling

ENVIRONMENT = ROOT / "tests" / ".venv" / "mlflow" / "bin"
ADMIN, ADMIN_PASSWORD = "admin", "the-admin-password-1"
READER, READER_PASSWORD = "reader", "canary-reader-password"
WEBHOOK_SECRET = "canary-webhook-secret"
STARTED_WITHIN_S = 120
SEEN_WITHIN_S = 60
COMMAND_WITHIN_S = 300


def eventually(check, within=SEEN_WITHIN_S):
    """What `check` gives once it gives something, or raises what it last raised."""
    deadline = time.monotonic() + within
    while True:
        try:
            if found := check():
                return found
            problem = f"nothing within {within} s"
        except (AssertionError, OSError, KeyError) as error:
            problem = error
        assert time.monotonic() < deadline, problem
        time.sleep(0.2)


def call(method, url, body=None, headers=()):
    """Status and body."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **dict(headers)}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class Registry:
    """A real MLflow server in a folder of its own; it can be stopped and started again on the same port."""

    def __init__(self, folder):
        self.folder = folder
        (self.port,) = free_ports(1)
        self.address = f"{HOST}:{self.port}"
        # Whatever becomes of the run; for a server that has ended this does nothing.
        atexit.register(self.stop)
        self.start()
        self.post("users/create", {"username": READER, "password": READER_PASSWORD})

    def environment(self):
        return {
            **os.environ,
            "MLFLOW_TRACKING_URI": f"http://{self.address}",
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": ADMIN_PASSWORD,
            "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-this-test",
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_CACHE_TTL": "1",
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(b"k" * 32).decode(),
            # No job runners: nothing here needs one.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        }

    def start(self):
        arguments = [
            *(str(ENVIRONMENT / "mlflow"), "server", "--host", HOST, "--port", str(self.port), "--workers", "2"),
            *("--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "./artifacts"),
            *("--app-name", "basic-auth"),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                arguments, cwd=self.folder, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
        try:
            eventually(lambda: self.get("registered-models/search")[0] == 200, STARTED_WITHIN_S)
        except AssertionError:
            self.stop()
            raise AssertionError((self.folder / "log").read_text()[-4000:]) from None

    def stop(self):
        """The server and the workers that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()

    def headers(self):
        pair = base64.b64encode(f"{ADMIN}:{ADMIN_PASSWORD}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}

    def get(self, method):
        return call("GET", f"http://{self.address}/api/2.0/mlflow/{method}", headers=self.headers())

    def post(self, method, body):
        status, answer = call("POST", f"http://{self.address}/api/2.0/mlflow/{method}", body, self.headers())
        assert status == 200, answer
        return json.loads(answer)

    def register(self, **models):
        """Logs and registers; the versions and their runs by model."""
        script = ROOT / "tests" / "clients" / "mlflow_models.py"
        wanted = [f"{name}={values}" for name, values in models.items()]
        command = [str(ENVIRONMENT / "python"), str(script), *wanted]
        run = subprocess.run(
            command, cwd=self.folder, env=self.environment(), capture_output=True, text=True, timeout=COMMAND_WITHIN_S
        )
        assert run.returncode == 0, run.stderr[-4000:]
        return json.loads(run.stdout.strip().splitlines()[-1])

    def alias(self, name, alias, version):
        self.post("registered-models/alias", {"name": name, "alias": alias, "version": str(version)})

    def artifact(self, name, version):
        """Folder of a version's files on the server's disk."""
        query = urllib.parse.urlencode({"name": name, "version": version})
        uri = json.loads(self.get(f"model-versions/get-download-uri?{query}")[1])["artifact_uri"]
        return self.folder / "artifacts" / uri.removeprefix("mlflow-artifacts:/")


@pytest.fixture(scope="session")
def registry(tmp_path_factory):
    started = Registry(tmp_path_factory.mktemp("mlflow"))
    # A model for each test, all at once: the client takes longer to start than to register.
    started.models = started.register(
        listed="1,2:large,3:sklearn", altered="1", adder="1,2", hooked="1,2", changed="1", away="1"
    )
    yield started
    started.stop()


class Bucket:
    """A real S3 endpoint with one bucket, `models`."""

    def __init__(self, folder):
        self.folder = folder
        (port,) = free_ports(1)
        self.address = f"{HOST}:{port}"
        self.objects = {}
        atexit.register(self.stop)
        self.start()

    def start(self):
        arguments = [str(ENVIRONMENT / "moto_server"), "-H", HOST, "-p", self.address.rpartition(":")[2]]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(arguments, cwd=self.folder, stdout=log, stderr=log)
        eventually(lambda: call("PUT", f"http://{self.address}/models")[0] == 200, STARTED_WITHIN_S)
        # It keeps its objects in memory only.
        for key, content in self.objects.items():
            self.put(key, content)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def put(self, key, content):
        self.objects[key] = content
        # Any account may write, but not none.
        credential = "Credential=key/20260131/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 {credential}"}
        status, answer = call("PUT", f"http://{self.address}/models/{urllib.parse.quote(key)}", content, headers)
        assert status == 200, answer


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    started = Bucket(tmp_path_factory.mktemp("bucket"))
    yield started
    started.stop()


@pytest.fixture
def secrets(tmp_path):
    """Files of secrets, by name."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name, secret in {
        "user": READER,
        "password": READER_PASSWORD,
        "webhook": WEBHOOK_SECRET,
        "key-id": "key",
        "key": "canary-store-secret",
    }.items():
        (folder / name).write_text(secret + "\n")
    return folder


def of_mlflow(secrets, **more):
    return "\n".join(
        [
            "[repository]",
            f'mlflow_username = "file:{secrets / "user"}"',
            f'mlflow_password = "file:{secrets / "password"}"',
            f'mlflow_webhook_secret = "file:{secrets / "webhook"}"',
            'mlflow_stable_alias = "champion"',
            *(f"{key} = {json.dumps(value)}" for key, value in {"poll_ms": 2000, "quiet_ms": 200, **more}.items()),
            '[log]\nlevel = "trace"',
        ]
    )


def of_bucket(bucket, secrets, **more):
    return "\n".join(
        [
            "[repository]",
            f'store_endpoint = "http://{bucket.address}"',
            f'store_key_id = "file:{secrets / "key-id"}"',
            f'store_secret = "file:{secrets / "key"}"',
            *(f"{key} = {json.dumps(value)}" for key, value in {"poll_ms": 500, "quiet_ms": 500, **more}.items()),
            '[log]\nlevel = "trace"',
        ]
    )


def tidegate(*arguments, within=COMMAND_WITHIN_S):
    command = [str(BINARY), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=within)


def listed(url, config):
    """Models by name, as the program lists them."""
    run = tidegate("models", "list", url, "--config", config, "--json")
    assert run.returncode == 0, run.stderr
    return {model["name"]: model for model in json.loads(run.stdout)["models"]}


def answered(server, model, version=""):
    """What the model makes of zero, and the version that said so; raises for anything but an answer."""
    route = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}
    status, headers, body = server.post(route, {"inputs": [tensor]})
    assert status == 200, body
    return json.loads(body)["outputs"][0]["data"][0], headers["tidegate-model-version"]


def view(server, model):
    """A model as the admin API shows it: with `versions` by number."""
    token = (server.log.parent / "state" / "admin-token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    status, body = call("GET", f"http://{server.admin}/admin/v1/models/{model}", headers=headers)
    assert status == 200, body
    shown = json.loads(body)
    return {**shown, "versions": {str(version["version"]): version for version in shown["versions"]}}


def sign(delivery, body, secret=WEBHOOK_SECRET, at=None):
    """Headers of a delivery, as MLflow makes them."""
    at = str(int(time.time() if at is None else at))
    mac = hmac.new(secret.encode(), b".".join([delivery.encode(), at.encode(), body]), hashlib.sha256).digest()
    return {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": at,
        "X-MLflow-Signature": f"v1,{base64.b64encode(mac).decode()}",
    }


@contextlib.contextmanager
def asking(server, model):
    """Asks all the while; the answers and whatever was none."""
    answers, problems, over = [], [], threading.Event()

    def ask():
        while not over.is_set():
            try:
                answers.append(answered(server, model))
            except Exception as error:  # noqa: BLE001: whatever it is, a caller saw it
                problems.append(repr(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()
    assert not problems, problems[:3]


# The source itself, without a gateway around it.


def test_a_registry_is_listed_and_staged_byte_for_byte(registry, secrets, tmp_path):
    first, second, other = registry.models["listed"]
    registry.alias("listed", "champion", first["version"])
    registry.post("model-versions/set-tag", {"name": "listed", "version": "1", "key": "owner", "value": "risk"})
    config, url = tmp_path / "tidegate.toml", f"mlflow+http://{registry.address}/?models=listed"
    config.write_text(of_mlflow(secrets))
    # The first look may find a version younger than the quiet period and any difference of clocks.
    model = listed(url, config)["listed"]
    versions = {version["version"]: version for version in model["versions"]}
    assert model["labels"] == {"champion": 1, "stable": 1}
    assert versions[1]["problem"] is None and versions[1]["tags"] == {"owner": "risk"}
    assert versions[2]["bytes"] > 20 * 1024 * 1024 and versions[2]["problem"] is None
    assert "no ONNX flavor" in versions[3]["problem"]
    assert versions[3]["run"] == other["run"]
    for version in (first, second):
        number = version["version"]
        into = tmp_path / f"staged-{number}"
        run = tidegate("models", "list", url, "--config", config, "--stage", f"listed@{number}", "--into", into)
        assert run.returncode == 0, run.stderr
        staged = json.loads(run.stdout)
        assert staged["fingerprint"] == versions[number]["fingerprint"]
        folder = registry.artifact("listed", number)
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        home = into / "listed" / str(number)
        assert sorted(path.relative_to(home) for path in home.rglob("*") if path.is_file()) == names
        for name in names:
            assert (home / name).read_bytes() == (folder / name).read_bytes(), name
        lineage = staged["lineage"]
        assert lineage["training"]["run"] == version["run"] and lineage["training"]["user"] == ADMIN
        assert lineage["git"]["commit"] == f"c0ffee{number}"
        assert lineage["datasets"][0]["name"] == "ones" and lineage["datasets"][0]["context"] == "training"


def test_a_changed_artifact_has_another_fingerprint(registry, secrets, tmp_path):
    config, url = tmp_path / "tidegate.toml", f"mlflow+http://{registry.address}/?models=altered"
    config.write_text(of_mlflow(secrets))
    before = listed(url, config)["altered"]["versions"][0]["fingerprint"]
    assert listed(url, config)["altered"]["versions"][0]["fingerprint"] == before
    path = registry.artifact("altered", 1) / "model.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert listed(url, config)["altered"]["versions"][0]["fingerprint"] != before


def test_wrong_credentials_are_said_and_not_shown(registry, secrets, tmp_path):
    (secrets / "password").write_text("canary-wrong-password")
    config = tmp_path / "tidegate.toml"
    config.write_text(of_mlflow(secrets))
    run = tidegate("models", "list", f"mlflow+http://{registry.address}/", "--config", config)
    assert run.returncode == 1 and "401" in run.stderr
    assert "canary" not in run.stdout + run.stderr


def test_a_bucket_is_listed_and_staged_byte_for_byte(bucket, secrets, tmp_path):
    large = bytes(range(256)) * 160_000
    for key, content in {
        "listed/m/1/model.onnx": large,
        "listed/m/1/samples/ü & <x>.json": b"{}",
        "listed/m/2/model.onnx": b"second",
        "listed/m/2/a\\b": b"hostile",
        "listed/m/config.pbtxt": b"max_batch_size: 4",
        **{f"listed/many/1/w{at}": b"w" for at in range(1100)},
    }.items():
        bucket.put(key, content)
    config, url = tmp_path / "tidegate.toml", "s3://models/listed"
    config.write_text(of_bucket(bucket, secrets))
    models = listed(url, config)
    first, second = models["m"]["versions"]
    assert first["bytes"] == len(large) + 2 and first["problem"] is None
    assert "'\\'" in second["problem"]
    assert models["many"]["versions"][0]["files"] == 1100, "several pages"
    run = tidegate("models", "list", url, "--config", config, "--stage", "m@1", "--into", tmp_path / "staged")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["fingerprint"] == first["fingerprint"]
    home = tmp_path / "staged" / "m"
    assert (home / "1" / "model.onnx").read_bytes() == large
    assert (home / "1" / "samples" / "ü & <x>.json").read_bytes() == b"{}"
    assert (home / "config.pbtxt").read_bytes() == b"max_batch_size: 4"
    run = tidegate("models", "list", url, "--config", config, "--stage", "m@2", "--into", tmp_path / "hostile")
    assert run.returncode == 1 and not list((tmp_path / "hostile").rglob("*b*"))


# A gateway that serves from it.


def test_an_alias_that_moves_swaps_the_model(registry, secrets, tmp_path):
    registry.alias("adder", "champion", 1)
    url = f"mlflow+http://{registry.address}/?models=adder"
    with running(url, tmp_path / "server", of_mlflow(secrets)) as server:
        assert answered(server, "adder") == (1.0, "1")
        assert answered(server, "adder", "champion") == (1.0, "1")
        assert answered(server, "adder", "2") == (2.0, "2")
        with asking(server, "adder") as answers:
            eventually(lambda: answers)
            registry.alias("adder", "champion", 2)
            eventually(lambda: answered(server, "adder") == (2.0, "2"))
        # One moment of change, and no answer that neither version gives.
        versions = [version for _, version in answers]
        assert versions == sorted(versions) and set(answers) <= {(1.0, "1"), (2.0, "2")}
        assert answered(server, "adder", "stable") == (2.0, "2")
        lineage = view(server, "adder")["versions"]["2"]["lineage"]
        assert lineage["git"]["commit"] == "c0ffee2"
        # And a version that comes later.
        registry.register(adder=5)
        eventually(lambda: answered(server, "adder", "3") == (5.0, "3"))
        assert answered(server, "adder") == (2.0, "2"), "only the alias says who answers"
        log = server.log.read_text()
    assert "canary" not in log


def test_a_webhook_is_a_hint_and_a_forged_one_is_refused(registry, secrets, tmp_path):
    registry.alias("hooked", "champion", 1)
    url = f"mlflow+http://{registry.address}/?models=hooked"
    # No poll will help within the time of this test.
    with running(url, tmp_path / "server", of_mlflow(secrets, poll_ms=3_600_000)) as server:
        assert answered(server, "hooked") == (1.0, "1")
        hook = f"http://{server.admin}/admin/v1/webhooks/mlflow"
        body = b'{"entity": "model_version_alias", "action": "created", "data": {"name": "hooked"}}'
        for headers in (
            {},
            sign("d-1", body, secret="guess"),
            {**sign("d-1", body), "X-MLflow-Delivery-Id": "d-2"},
            sign("d-1", body, at=time.time() - 301),
            sign("d-1", body, at=time.time() + 301),
        ):
            status, _ = call("POST", hook, body, headers)
            assert status in {400, 401, 403}, headers
        assert call("POST", hook, body + b" ", sign("d-1", body))[0] in {401, 403}
        good = sign("d-3", body)
        assert call("POST", hook, body, good)[0] in {200, 202, 204}
        registry.post(
            "webhooks",
            {
                "name": "tidegate",
                "url": hook,
                "secret": WEBHOOK_SECRET,
                "events": [{"entity": "MODEL_VERSION_ALIAS", "action": "CREATED"}],
            },
        )
        registry.alias("hooked", "champion", 2)
        eventually(lambda: answered(server, "hooked") == (2.0, "2"))
        log = server.log.read_text()
    assert "canary" not in log


def test_a_changed_artifact_is_quarantined(registry, secrets, tmp_path):
    url = f"mlflow+http://{registry.address}/?models=changed"
    with running(url, tmp_path / "server", of_mlflow(secrets)) as server:
        assert answered(server, "changed") == (1.0, "1")
        path = registry.artifact("changed", 1) / "model.onnx"
        # Another constant in the same place: a model that loads, and is not the one that was.
        content = path.read_bytes()
        one, seven = b"\x00\x00\x80\x3f" * 4, b"\x00\x00\xe0\x40" * 4
        assert content.count(one) == 1
        path.write_bytes(content.replace(one, seven))
        # The version that serves is still ready; why the other bytes were not taken is said beside it.
        eventually(lambda: "bytes changed" in json.dumps(view(server, "changed")["versions"]["1"]))
        assert answered(server, "changed") == (1.0, "1"), "what serves goes on serving"
    # After a restart too.
    with running(url, tmp_path / "server", of_mlflow(secrets)) as server:
        time.sleep(2)
        assert answered(server, "changed") == (1.0, "1")


def test_a_registry_that_is_away_changes_nothing(registry, secrets, tmp_path):
    registry.alias("away", "champion", 1)
    url = f"mlflow+http://{registry.address}/?models=away"
    with running(url, tmp_path / "server", of_mlflow(secrets)) as server:
        assert answered(server, "away") == (1.0, "1")
        registry.stop()
        try:
            with asking(server, "away") as answers:
                time.sleep(3)
            assert set(answers) == {(1.0, "1")}
            server.stop()
            # Without the registry the copies serve, under the same labels.
            with running(url, tmp_path / "server", of_mlflow(secrets)) as again:
                assert answered(again, "away") == (1.0, "1")
                assert answered(again, "away", "champion") == (1.0, "1")
                registry.start()
                registry.register(away=4)
                registry.alias("away", "champion", 2)
                eventually(lambda: answered(again, "away") == (4.0, "2"))
        finally:
            if registry.process.poll() is not None:
                registry.start()


def test_a_bucket_is_served_and_half_an_upload_is_not(bucket, secrets, tmp_path):
    bucket.put("prod/scaling/1/model.onnx", scaling(2.0))
    url = "s3://models/prod"

    def factor(server, version=""):
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}
        route = f"/v2/models/scaling{f'/versions/{version}' if version else ''}/infer"
        status, _, body = server.post(route, {"inputs": [tensor]})
        assert status == 200, body
        return json.loads(body)["outputs"][0]["data"][0]

    config = of_bucket(bucket, secrets, quiet_ms=3000)
    with running(url, tmp_path / "server", config, wait=False) as server:
        eventually(lambda: factor(server) == 2)
        # Another part of it comes again and again: it is never taken meanwhile.
        for at in range(5):
            bucket.put("prod/scaling/2/model.onnx", scaling(3.0)[: 20 + at])
            time.sleep(1)
            assert factor(server) == 2
            with pytest.raises(AssertionError):
                factor(server, "2")
        bucket.put("prod/scaling/2/model.onnx", scaling(3.0))
        eventually(lambda: factor(server, "2") == 3)
        # With its list of digests it is taken at once.
        model = scaling(4.0)
        bucket.put("prod/scaling/3/model.onnx", model)
        bucket.put("prod/scaling/3/SHA256SUMS", f"{hashlib.sha256(model).hexdigest()}  model.onnx\n".encode())
        eventually(lambda: factor(server, "3") == 4)
        bucket.stop()
        try:
            time.sleep(2)
            assert factor(server, "3") == 4
            server.stop()
            assert "canary" not in server.log.read_text()
            with running(url, tmp_path / "server", config) as again:
                assert [factor(again, version) for version in ("1", "2", "3")] == [2, 3, 4]
        finally:
            bucket.start()


def test_an_unsigned_version_is_refused(tmp_path):
    """With a key configured, nothing is served that it did not sign."""
    folder = tmp_path / "models" / "scaling" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(scaling(2.0))
    key = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
    run = tidegate("models", "validate", tmp_path / "models")
    assert run.returncode == 0, run.stdout + run.stderr
    server = Server(tmp_path / "models", tmp_path / "server", f'[repository]\ntrusted_keys = "{key}"', wait=False)
    try:
        eventually(lambda: "it is not signed" in server.log.read_text())
        assert server.get("/v2/models/scaling/ready")[0] != 200
    finally:
        server.process.kill()
