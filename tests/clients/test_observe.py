"""What the gateway tells of its work: metrics, access log, traces, log settings."""

import concurrent.futures
import json
import queue
import re
import time
import urllib.request
from collections import Counter

import grpc
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import HOST, MODELS, running
from tritonclient.utils import InferenceServerException

SERIES = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
HISTOGRAMS = ["request", "queue", "batch_wait", "compute", "overhead"]
PROTOBUF = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
FLOWER = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [5.1875, 3.5, 1.4, 0.2]}]}
BROKEN = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": ["secret-value"]}]}
INFER = "/v2/models/iris/infer"


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not (got := condition()):
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)
    return got


class Page:
    """One scrape."""

    def __init__(self, server):
        status, body = server.get("/metrics", server.metrics)
        assert status == 200
        self.series = []
        for line in body.decode().splitlines():
            if not line.startswith("#"):
                name, labels, value = SERIES.match(line).groups()
                self.series.append((name, dict(LABEL.findall(labels or "")), float(value)))

    def sum(self, name, *by, **wanted):
        """Sums of a family by the values of the labels `by`; a plain number without any."""
        sums = Counter()
        for got, labels, value in self.series:
            if got == name and wanted.items() <= labels.items():
                sums[tuple(labels[label] for label in by)] += value
        found = {key: value for key, value in sums.items() if value}
        return found if by else sums[()]


def send_known(server, case):
    """Over HTTP five and two that are refused, over gRPC three and one for no model, over a stream four."""
    with triton_http.InferenceServerClient(server.http) as client:
        for _ in range(5):
            case.check(client.infer(case.model, case.inputs(triton_http)))
    for _ in range(2):
        assert server.post(INFER, BROKEN)[0] == 400
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        for _ in range(3):
            case.check(client.infer(case.model, case.inputs(triton_grpc)))
        with pytest.raises(InferenceServerException):
            client.infer("nothing", case.inputs(triton_grpc))
        answers = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        for _ in range(4):
            client.async_stream_infer(case.model, case.inputs(triton_grpc))
        for _ in range(4):
            result, error = answers.get(timeout=10)
            assert error is None
            case.check(result)
        client.stop_stream()


def test_metrics_count_exactly(tmp_path, iris):
    config = "[repository]\nmodel_control = true\n"
    with running(MODELS, tmp_path, config) as server:
        send_known(server, iris)
        wanted = {("http", "ok"): 5, ("http", "invalid_input"): 2, ("grpc", "ok"): 3, ("grpc_stream", "ok"): 4}
        wanted[("grpc", "not_found")] = 1

        def counted():
            page = Page(server)
            return page.sum("tidegate_requests_total", "protocol", "outcome") == wanted and page

        page = wait_for(counted)
        assert page.sum("tidegate_requests_total", model="other") == 1
        for name in HISTOGRAMS:
            ran = page.sum(f"tidegate_{name}_seconds_count", "protocol", model="iris", version="2")
            refused = page.sum("tidegate_requests_total", model="iris", outcome="invalid_input")
            http = 5 + (refused if name == "request" else 0)
            assert ran == {("http",): http, ("grpc",): 3, ("grpc_stream",): 4}, name
            # The last bucket holds everything.
            buckets = page.sum(f"tidegate_{name}_seconds_bucket", le="+Inf", model="iris", version="2")
            assert buckets == sum(ran.values()), name
        # The four parts of the requests that ran make up the whole; refused ones are in the whole only.
        whole, *parts = (
            page.sum(f"tidegate_{name}_seconds_sum", model="iris", protocol="grpc") for name in HISTOGRAMS
        )
        assert sum(parts) == pytest.approx(whole)

        check_triton_names(server, page)
        check_unloaded(server)
        check_protobuf(server)


def check_triton_names(server, page):
    with triton_http.InferenceServerClient(server.http) as client:
        [stats] = client.get_inference_statistics("iris", "2")["model_stats"]
    inference = stats["inference_stats"]

    def nv(name):
        return page.sum(f"nv_inference_{name}", model="iris", version="2")

    assert nv("request_success") == inference["success"]["count"] == 12
    assert nv("request_failure") == inference["fail"]["count"]
    assert nv("count") == stats["inference_count"] == 12
    assert nv("exec_count") == stats["execution_count"]
    # Microseconds here, nanoseconds there.
    for name, other in [("queue", "queue"), *((f"compute_{part}",) * 2 for part in ("input", "infer", "output"))]:
        assert nv(f"{name}_duration_us") == pytest.approx(inference[other]["ns"] / 1000, abs=2), name


def check_unloaded(server):
    with triton_http.InferenceServerClient(server.http) as client:
        client.unload_model("iris")
    wait_for(lambda: not any(labels.get("model") == "iris" for _, labels, _ in Page(server).series))
    assert any(labels.get("model") == "digits" for _, labels, _ in Page(server).series)


def check_protobuf(server):
    request = urllib.request.Request(f"http://{server.metrics}/metrics", headers={"accept": PROTOBUF})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["content-type"] == PROTOBUF
        assert b"tidegate_requests_total" in answer.read()


def lines(server, target="access"):
    found = []
    for line in server.log.read_text().splitlines():
        document = json.loads(line)
        if document["target"] == target:
            found.append(document)
    return found


@pytest.mark.parametrize("mode", ["off", "errors", "all"])
def test_access_log(tmp_path, mode):
    config = f'[log]\nformat = "json"\naccess = "{mode}"\n'
    with running(MODELS, tmp_path, config) as server:
        status, good, body = server.post(INFER, FLOWER)
        assert status == 200
        status, bad, _ = server.post(INFER, BROKEN)
        assert status == 400
        answered = str(json.loads(body)["outputs"][0]["data"][0])
    # The server has ended, so everything is written.
    got = {line["prediction_id"]: line["status"] for line in lines(server)}
    wanted = {}
    if mode != "off":
        wanted[bad["tidegate-prediction-id"]] = "invalid_input"
    if mode == "all":
        wanted[good["tidegate-prediction-id"]] = "ok"
    assert got == wanted and len(lines(server)) == len(wanted)
    for line in lines(server):
        assert line["protocol"] == "http" and line["total_ms"] > 0
    log = server.log.read_text()
    for secret in ("5.1875", "secret-value", answered):
        assert secret not in log


class Collector(grpc.GenericRpcHandler):
    """An OTLP collector that keeps what it gets as bytes."""

    EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

    def __init__(self):
        self.got = []
        self.calls = []
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), handlers=[self])
        self.endpoint = f"http://{HOST}:{self.server.add_insecure_port(f'{HOST}:0')}"
        self.server.start()

    def service(self, details):
        self.calls.append(details.method)
        # An empty answer says that everything was accepted.
        return grpc.unary_unary_rpc_method_handler(self.export) if details.method == self.EXPORT else None

    def export(self, request, _context):
        self.got.append(request)
        return b""


@pytest.fixture
def collector():
    started = Collector()
    yield started
    started.server.stop(None).wait()


def named(span):
    """A span's name as the protocol buffer holds it: field 5, length-delimited."""
    return bytes([0x2A, len(span)]) + span.encode()


def traceparent(trace_id, sampled=True):
    return {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-{sampled:02x}"}


def many_at_once(server):
    """Requests close enough together for some to share a batch."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return all(status == 200 for status, *_ in pool.map(lambda _: server.post(INFER, FLOWER), range(32)))


def test_traces_reach_the_collector(tmp_path, collector):
    config = f'[telemetry]\notlp_endpoint = "{collector.endpoint}"\nservice_name = "harbour"\n'
    over_http, over_grpc, unsampled = "4bf92f3577b34da6a3ce929d0e0e4736", "5b" * 16, "6c" * 16
    with running(MODELS, tmp_path, config) as server:
        assert server.post(INFER, FLOWER, traceparent(over_http))[0] == 200
        assert server.post(INFER, FLOWER, traceparent(unsampled, sampled=False))[0] == 200
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            tensor = triton_grpc.InferInput("features", [1, 4], "FP32")
            tensor._raw_content = bytes(16)
            client.infer("iris", [tensor], headers=traceparent(over_grpc))
        _, own, _ = server.post(INFER, FLOWER)
        for trace_id in (over_http, over_grpc, own["tidegate-prediction-id"].replace("-", "")):
            wait_for(lambda wanted=bytes.fromhex(trace_id): any(wanted in each for each in collector.got))
        alone = b"".join(collector.got)
        wait_for(lambda: many_at_once(server) and named("compute_output") in b"".join(collector.got))
    # A request that shares its batch with none has nothing to gather or part.
    assert named("compute_input") not in alone and named("compute_output") not in alone
    sent = b"".join(collector.got)
    assert bytes.fromhex("00f067aa0ba902b7") in sent, "the caller's span is the parent"
    for span in ("infer", "queue", "batch_wait", "compute_input", "compute_infer", "compute_output"):
        assert named(span) in sent, span
    assert b"harbour" in sent
    assert bytes.fromhex(unsampled) not in sent


def test_nothing_is_sent_without_an_endpoint(tmp_path, collector, monkeypatch):
    """Not even where OpenTelemetry's own variable names a collector."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    with running(MODELS, tmp_path) as server:
        assert server.post(INFER, FLOWER, traceparent("7d" * 16))[0] == 200
    assert collector.calls == []


@pytest.mark.parametrize("module", [triton_http, triton_grpc])
def test_log_settings_change_the_level(tmp_path, module):
    config = '[repository]\nmodel_control = true\n[log]\nformat = "json"\n'
    with running(MODELS, tmp_path, config) as server:
        address = server.http if module is triton_http else server.grpc
        with module.InferenceServerClient(address) as client:

            def said():
                """Lines at the level of information that a reload leaves."""
                before = len(server.log.read_text().splitlines())
                client.unload_model("topics")
                client.load_model("topics")
                after = server.log.read_text().splitlines()[before:]
                return [line for line in after if json.loads(line)["level"] == "INFO"]

            assert said()
            client.update_log_settings({"log_info": False})
            settings = client.get_log_settings()
            if module is triton_http:
                assert settings["log_info"] is False
            else:
                assert settings.settings["log_info"].bool_param is False
            assert not said()
            client.update_log_settings({"log_info": True})
            assert said()
