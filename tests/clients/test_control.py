"""Health, metadata, configuration, statistics, the repository, settings, reflection: what clients ask besides inference."""

import json
import shutil
import time

import grpc
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import MODELS, running
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from google.protobuf.descriptor_pool import DescriptorPool
from tritonclient.utils import InferenceServerException

NAMES = {"iris", "digits", "risk", "topics"}
CLIENTS = {"http": triton_http, "grpc": triton_grpc}
STATISTICS = {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"}


@pytest.fixture(params=["http", "grpc"])
def client(request, server):
    with CLIENTS[request.param].InferenceServerClient(getattr(server, request.param)) as made:
        made.protocol = request.param
        yield made


def ask(client, method, *args, **kwargs):
    """The answer as JSON, whichever the protocol."""
    if client.protocol == "grpc":
        kwargs["as_json"] = True
    return getattr(client, method)(*args, **kwargs)


def test_health(server, client):
    assert client.is_server_live()
    assert client.is_server_ready()
    for name in NAMES:
        assert client.is_model_ready(name)
    assert client.is_model_ready("iris", "1")
    assert not client.is_model_ready("iris", "9")
    assert not client.is_model_ready("nothing")


def test_health_bodies(server):
    assert json.loads(server.get("/v2/health/live")[1])["live"] is True
    ready = json.loads(server.get("/v2/health/ready")[1])
    assert ready["ready"] is True and ready["live"] is True
    assert json.loads(server.get("/v2/models/iris/ready")[1]) == {"name": "iris", "ready": True}


def test_server_metadata(client):
    metadata = ask(client, "get_server_metadata")
    assert metadata["name"] and metadata["version"]
    assert {"classification", "binary_tensor_data", "statistics"} <= set(metadata["extensions"])


def test_model_metadata(client):
    metadata = ask(client, "get_model_metadata", "topics")
    assert metadata["versions"] == ["1"]
    inputs = {each["name"]: (each["datatype"], [int(size) for size in each["shape"]]) for each in metadata["inputs"]}
    assert inputs == {"input_ids": ("INT64", [-1, -1]), "attention_mask": ("INT64", [-1, -1])}
    outputs = [(each["name"], each["datatype"], [int(size) for size in each["shape"]]) for each in metadata["outputs"]]
    assert outputs == [("logits", "FP32", [-1, 14])]
    with pytest.raises(InferenceServerException):
        client.get_model_metadata("nothing")


def test_model_config(client):
    config = ask(client, "get_model_config", "iris")
    config = config.get("config", config)
    assert config["name"] == "iris"
    assert config["max_batch_size"] == 32
    (features,) = config["input"]
    assert (features["name"], features["data_type"]) == ("features", "TYPE_FP32")
    assert [int(size) for size in features["dims"]] == [4]


def test_statistics(client, server, iris):
    def count():
        (stats,) = ask(client, "get_inference_statistics", "iris", "2")["model_stats"]
        assert (stats["name"], stats["version"]) == ("iris", "2")
        if client.protocol == "http":
            assert STATISTICS <= set(stats["inference_stats"])
        return int(stats.get("inference_count", 0)), int(stats["inference_stats"]["success"].get("count", 0))

    module = CLIENTS[client.protocol]
    client.infer("iris", iris.inputs(module))
    before = count()
    for _ in range(3):
        client.infer("iris", iris.inputs(module))
    assert count() == (before[0] + 3, before[1] + 3)


def test_statistics_of_all_models(client):
    stats = ask(client, "get_inference_statistics")["model_stats"]
    assert {each["name"] for each in stats} == NAMES


def test_repository_index(client):
    index = ask(client, "get_model_repository_index")
    models = index["models"] if client.protocol == "grpc" else index
    found = {(each["name"], each["version"]): each["state"] for each in models}
    assert found == {
        key: "READY" for key in [("iris", "1"), ("iris", "2"), ("digits", "1"), ("risk", "1"), ("topics", "1")]
    }


def test_trace_and_log_settings(client):
    assert "trace_level" in (ask(client, "get_trace_settings").get("settings") or ask(client, "get_trace_settings"))
    log = ask(client, "get_log_settings")
    assert "log_error" in log.get("settings", log)


def test_list_of_models_and_openapi(server):
    assert set(json.loads(server.get("/v2/models")[1])["models"]) == NAMES
    status, body = server.get("/v2/models/iris/openapi.json")
    assert status == 200
    document = json.loads(body)
    assert document["openapi"].startswith("3.")
    assert b"features" in body and b"probabilities" in body


def test_grpc_health_check(server):
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_grpc_health_watch(server):
    with grpc.insecure_channel(server.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_reflection(server):
    """A client that knows no .proto file finds the service, its methods and its messages."""
    with grpc.insecure_channel(server.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health", "tidegate.v1.Feedback"} <= services
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("inference.GRPCInferenceService")
        assert {"ModelInfer", "ModelStreamInfer", "RepositoryIndex"} <= {each.name for each in service.methods}
        assert pool.FindMessageTypeByName("inference.ModelInferRequest").fields_by_name["raw_input_contents"].number == 7


@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    """A server of its own, whose models may be unloaded."""
    repository = tmp_path_factory.mktemp("own") / "models"
    shutil.copytree(MODELS, repository)
    with running(repository, tmp_path_factory.mktemp("own-server"), "[repository]\nmodel_control = true\n") as started:
        started.repository = repository
        yield started


def test_loading_is_refused_by_default(client):
    with pytest.raises(InferenceServerException):
        client.unload_model("digits")
    assert client.is_model_ready("digits")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_unload_and_load(own_server, protocol):
    with CLIENTS[protocol].InferenceServerClient(getattr(own_server, protocol)) as client:
        client.unload_model("digits")
        # An unload may finish after its answer, when the last request has left.
        deadline = time.monotonic() + 10
        while client.is_model_ready("digits"):
            assert time.monotonic() < deadline, "still ready"
            time.sleep(0.05)
        assert client.is_model_ready("iris")
        assert client.is_server_ready()
        client.load_model("digits")
        assert client.is_model_ready("digits")
        with pytest.raises(InferenceServerException):
            client.load_model("nothing")


def test_a_new_version_is_served_after_a_load(own_server, iris):
    source = own_server.repository / "iris" / "1"
    shutil.copytree(source, own_server.repository / "iris" / "3")
    with triton_http.InferenceServerClient(own_server.http) as client:
        client.load_model("iris")
        answer = client.infer("iris", iris.inputs(triton_http)).get_response()
        assert answer["model_version"] == "3"


def test_metrics(server, iris):
    with triton_http.InferenceServerClient(server.http) as client:
        client.infer("iris", iris.inputs(triton_http))
    status, body = server.get("/metrics", server.metrics)
    assert status == 200
    text = body.decode()
    for name in ("tidegate_requests_total", "tidegate_request_seconds_bucket", "tidegate_overhead_seconds_bucket"):
        assert f"\n{name}{{" in text, name
    assert 'nv_inference_request_success{model="iris",version="2"}' in text


def test_kserve_v1_and_sagemaker_routes(server, iris):
    status, _, body = server.post("/v1/models/iris:predict", {"instances": [[5.1, 3.5, 1.4, 0.2]]})
    assert status == 200, body
    (row,) = json.loads(body)["predictions"]
    assert row == pytest.approx(iris.expected["probabilities"][0].tolist(), abs=1e-4)
    assert server.get("/ping")[0] == 200
