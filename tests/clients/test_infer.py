"""Every model through tritonclient, on both protocols, compared with Python's onnxruntime."""

import asyncio
import queue

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_http(server, case, binary):
    with triton_http.InferenceServerClient(server.http) as client:
        outputs = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in case.expected]
        inputs = case.inputs(triton_http, binary_data=binary)
        result = client.infer(case.model, inputs, model_version=case.version, outputs=outputs, request_id="a-1")
    case.check(result)
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == (case.model, case.version, "a-1")


def test_http_without_named_outputs(server, case):
    with triton_http.InferenceServerClient(server.http) as client:
        case.check(client.infer(case.model, case.inputs(triton_http), model_version=case.version))


def test_http_on_the_grpc_port(server, iris):
    with triton_http.InferenceServerClient(server.grpc) as client:
        iris.check(client.infer("iris", iris.inputs(triton_http)))


def test_grpc(server, case):
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        result = client.infer(case.model, case.inputs(triton_grpc), model_version=case.version, request_id="b-2")
    case.check(result)
    answer = result.get_response()
    assert (answer.model_name, answer.model_version, answer.id) == (case.model, case.version, "b-2")


def test_grpc_on_the_http_port(server, iris):
    with triton_grpc.InferenceServerClient(server.http) as client:
        iris.check(client.infer("iris", iris.inputs(triton_grpc)))


def test_http_aio(server, case):
    async def run():
        async with triton_http_aio.InferenceServerClient(server.http) as client:
            calls = (client.infer(case.model, case.inputs(triton_http), model_version=case.version) for _ in range(4))
            return await asyncio.gather(*calls)

    for result in asyncio.run(run()):
        case.check(result)


def test_grpc_aio(server, case):
    async def run():
        async with triton_grpc_aio.InferenceServerClient(server.grpc) as client:
            calls = (client.infer(case.model, case.inputs(triton_grpc), model_version=case.version) for _ in range(4))
            return await asyncio.gather(*calls)

    for result in asyncio.run(run()):
        case.check(result)


def test_async_infer(server, case):
    with triton_http.InferenceServerClient(server.http, concurrency=4) as client:
        calls = [
            client.async_infer(case.model, case.inputs(triton_http), model_version=case.version) for _ in range(8)
        ]
        for call in calls:
            case.check(call.get_result())


def test_one_output_of_two(server):
    features = np.zeros((2, 30), np.float32)
    tensor = triton_http.InferInput("features", [2, 30], "FP32").set_data_from_numpy(features)
    with triton_http.InferenceServerClient(server.http) as client:
        result = client.infer("risk", [tensor], outputs=[triton_http.InferRequestedOutput("probabilities")])
    assert result.as_numpy("probabilities").shape == (2, 2)
    assert result.as_numpy("label") is None


def test_the_latest_version_answers_by_default(server, iris):
    with triton_http.InferenceServerClient(server.http) as client:
        result = client.infer("iris", iris.inputs(triton_http))
    assert result.get_response()["model_version"] == "2"
    iris.check(result)


@pytest.mark.parametrize("request_with", [None, "gzip", "deflate"])
@pytest.mark.parametrize("answer_with", [None, "gzip", "deflate"])
def test_http_compression(server, case, request_with, answer_with):
    with triton_http.InferenceServerClient(server.http) as client:
        result = client.infer(
            case.model,
            case.inputs(triton_http),
            model_version=case.version,
            request_compression_algorithm=request_with,
            response_compression_algorithm=answer_with,
        )
    case.check(result)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_grpc_compression(server, case, algorithm):
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        inputs = case.inputs(triton_grpc)
        result = client.infer(case.model, inputs, model_version=case.version, compression_algorithm=algorithm)
    case.check(result)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_classification(server, iris, protocol):
    module = {"http": triton_http, "grpc": triton_grpc}[protocol]
    with module.InferenceServerClient(getattr(server, protocol)) as client:
        outputs = [module.InferRequestedOutput("probabilities", class_count=2)]
        rows = client.infer("iris", iris.inputs(module), outputs=outputs).as_numpy("probabilities")
    assert rows.shape == (1, 2)
    score, index, label = rows[0][0].decode().split(":")
    assert (int(index), label) == (0, "setosa")
    assert float(score) == pytest.approx(float(iris.expected["probabilities"][0][0]), abs=1e-4)


class Stream:
    """A stream of tritonclient whose answers are taken one by one."""

    def __init__(self, client):
        self.client, self.answers = client, queue.Queue()
        client.start_stream(lambda result, error: self.answers.put((result, error)))

    def next(self):
        return self.answers.get(timeout=30)


def test_stream(server, case):
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        stream = Stream(client)
        ids = {f"s-{at}" for at in range(10)}
        for each in sorted(ids):
            client.async_stream_infer(
                case.model, case.inputs(triton_grpc), model_version=case.version, request_id=each
            )
        seen = set()
        for _ in ids:
            result, error = stream.next()
            assert error is None
            case.check(result)
            seen.add(result.get_response().id)
            assert result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
    assert seen == ids


def test_a_stream_goes_on_after_an_error(server, iris):
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        stream = Stream(client)
        client.async_stream_infer("nothing", iris.inputs(triton_grpc))
        result, error = stream.next()
        assert result is None and "nothing" in str(error)
        client.async_stream_infer("iris", iris.inputs(triton_grpc))
        result, error = stream.next()
        assert error is None
        iris.check(result)
        client.stop_stream()


def test_raw_request(server):
    """JSON of length 0: the whole body is the one input."""
    features = np.array([5.1, 3.5, 1.4, 0.2], "<f4")
    headers = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}
    status, answer_headers, body = server.post("/v2/models/iris/infer", features.tobytes(), headers)
    assert status == 200, body
    result = triton_http.InferResult.from_response_body(
        body, header_length=int(answer_headers["Inference-Header-Content-Length"])
    )
    assert result.as_numpy("probabilities").shape == (1, 3)


def test_answers_name_the_version_and_its_digest(server):
    body = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [[5.1, 3.5, 1.4, 0.2]]}]}
    status, headers, _ = server.post("/v2/models/iris/infer", body)
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert headers["tidegate-model-version"] == "2"
    assert headers["tidegate-model-digest"].startswith("sha256:")
    assert len(headers["tidegate-prediction-id"]) == 36


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_errors(server, iris, protocol):
    module = {"http": triton_http, "grpc": triton_grpc}[protocol]
    invalid = {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}[protocol]
    absent = {"http": "404", "grpc": "StatusCode.NOT_FOUND"}[protocol]

    def tensor(name, array, datatype):
        return module.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)

    good = np.zeros((1, 4), np.float32)
    with module.InferenceServerClient(getattr(server, protocol)) as client:
        for expected, model, version, tensors, word in [
            (absent, "nothing", "", iris.inputs(module), "nothing"),
            (absent, "iris", "9", iris.inputs(module), "9"),
            (invalid, "iris", "", [tensor("colour", good, "FP32")], "colour"),
            (invalid, "iris", "", [tensor("features", good.astype(np.float64), "FP64")], "FP32"),
            (invalid, "iris", "", [tensor("features", np.zeros((1, 5), np.float32), "FP32")], "features"),
        ]:
            with pytest.raises(InferenceServerException) as caught:
                client.infer(model, tensors, model_version=version)
            assert caught.value.status() == expected, caught.value
            assert word in caught.value.message()
        with pytest.raises(InferenceServerException) as caught:
            client.infer("iris", iris.inputs(module), outputs=[module.InferRequestedOutput("smell")])
        assert caught.value.status() == invalid
        # The connection and the server are none the worse.
        iris.check(client.infer("iris", iris.inputs(module)))


def test_error_bodies(server):
    status, headers, body = server.post("/v2/models/iris/infer", b"{")
    assert status == 400
    assert headers["Content-Type"] == "application/json"
    assert b'"error"' in body and b'"code"' in body
    assert server.post("/v2/nowhere", {})[0] == 404
    assert server.get("/v2/models/iris/infer")[0] == 405
