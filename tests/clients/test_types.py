"""Every datatype there and back through an identity model, on both protocols."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from onnx import TensorProto, helper

from conftest import running

# OIP name: ONNX type, and values that a lossy or mistaken conversion would not survive.
TYPES = {
    "BOOL": (TensorProto.BOOL, np.array([[True, False, True]])),
    "UINT8": (TensorProto.UINT8, np.array([[0, 1, 255]], np.uint8)),
    "UINT16": (TensorProto.UINT16, np.array([[0, 1, 65535]], np.uint16)),
    "UINT32": (TensorProto.UINT32, np.array([[0, 1, 2**32 - 1]], np.uint32)),
    "UINT64": (TensorProto.UINT64, np.array([[0, 2**53 + 1, 2**64 - 1]], np.uint64)),
    "INT8": (TensorProto.INT8, np.array([[-128, 0, 127]], np.int8)),
    "INT16": (TensorProto.INT16, np.array([[-(2**15), 0, 2**15 - 1]], np.int16)),
    "INT32": (TensorProto.INT32, np.array([[-(2**31), 0, 2**31 - 1]], np.int32)),
    "INT64": (TensorProto.INT64, np.array([[-(2**63), 2**53 + 1, 2**63 - 1]], np.int64)),
    "FP16": (TensorProto.FLOAT16, np.array([[0.1, -65504, 6e-8]], np.float16)),
    "BF16": (TensorProto.BFLOAT16, np.array([[0.1, -3e38, 1e-38]], ml_dtypes.bfloat16)),
    "FP32": (TensorProto.FLOAT, np.array([[0.1, -3.4e38, 1e-45]], np.float32)),
    "FP64": (TensorProto.DOUBLE, np.array([[0.1, -1.7e308, 5e-324]], np.float64)),
    "BYTES": (TensorProto.STRING, np.array([["ä", "", 'a "quoted" line\n']], np.object_)),
}
# The protocol has no JSON form for these.
BINARY_ONLY = {"FP16", "BF16"}


def write_identity(folder, datatype):
    (folder / "1").mkdir(parents=True)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", TYPES[datatype][0], ["batch", "n"])],
        [helper.make_tensor_value_info("y", TYPES[datatype][0], ["batch", "n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "1" / "model.onnx"))


@pytest.fixture(scope="module")
def types_server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("types")
    for datatype in TYPES:
        write_identity(repository / f"identity_{datatype.lower()}", datatype)
    with running(repository, tmp_path_factory.mktemp("types-server")) as started:
        yield started


def sent(datatype):
    """What tritonclient wants to be given: BF16 goes in as float32, BYTES as bytes."""
    values = TYPES[datatype][1]
    if datatype == "BF16":
        return values.astype(np.float32)
    if datatype == "BYTES":
        return np.array([[text.encode() for text in values[0]]], np.object_)
    return values


def check(datatype, got):
    want = sent(datatype)
    assert got.shape == want.shape
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("datatype", TYPES)
@pytest.mark.parametrize("way", ["http-binary", "http-json", "grpc"])
def test_round_trip(types_server, datatype, way):
    if way == "http-json" and datatype in BINARY_ONLY:
        body = {"inputs": [{"name": "x", "datatype": datatype, "shape": [1, 1], "data": [1]}]}
        status, _, answer = types_server.post(f"/v2/models/identity_{datatype.lower()}/infer", body)
        assert status == 400 and datatype.encode() in answer
        return
    module = triton_grpc if way == "grpc" else triton_http
    options = {} if way == "grpc" else {"binary_data": way == "http-binary"}
    values = sent(datatype)
    tensor = module.InferInput("x", list(values.shape), datatype).set_data_from_numpy(values, **options)
    address = types_server.grpc if way == "grpc" else types_server.http
    with module.InferenceServerClient(address) as client:
        output = module.InferRequestedOutput("y", **options)
        result = client.infer(f"identity_{datatype.lower()}", [tensor], outputs=[output])
    got = result.as_numpy("y")
    if way == "http-json" and datatype == "BYTES":
        got = np.array([[text if isinstance(text, bytes) else text.encode() for text in got[0]]], np.object_)
    check(datatype, got)


FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@pytest.mark.parametrize("datatype", FIELDS)
def test_typed_contents(types_server, datatype):
    """gRPC's typed fields, which tritonclient never sends."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name=f"identity_{datatype.lower()}")
    values = sent(datatype)
    tensor = request.inputs.add(name="x", datatype=datatype, shape=list(values.shape))
    getattr(tensor.contents, FIELDS[datatype]).extend(values[0].tolist())
    with grpc.insecure_channel(types_server.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    check(datatype, triton_grpc.InferResult(answer).as_numpy("y"))


@pytest.mark.parametrize("datatype", TYPES)
def test_metadata_names_the_datatype(types_server, datatype):
    with triton_http.InferenceServerClient(types_server.http) as client:
        metadata = client.get_model_metadata(f"identity_{datatype.lower()}")
    assert metadata["inputs"] == [{"name": "x", "datatype": datatype, "shape": [-1, -1]}]


@pytest.mark.parametrize("module", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_a_large_tensor(types_server, module):
    """8 MiB: more than gRPC's usual limit of 4."""
    values = np.random.default_rng(1).random((1, 1 << 21), np.float32)
    tensor = module.InferInput("x", list(values.shape), "FP32").set_data_from_numpy(values)
    address = types_server.grpc if module is triton_grpc else types_server.http
    with module.InferenceServerClient(address) as client:
        np.testing.assert_array_equal(client.infer("identity_fp32", [tensor]).as_numpy("y"), values)


def test_an_empty_tensor(types_server):
    values = np.zeros((1, 0), np.float32)
    tensor = triton_http.InferInput("x", [1, 0], "FP32").set_data_from_numpy(values)
    with triton_http.InferenceServerClient(types_server.http) as client:
        result = client.infer("identity_fp32", [tensor])
    assert result.get_response()["outputs"][0]["shape"] == [1, 0]


def test_a_small_integer_out_of_range_is_refused(types_server):
    body = {"inputs": [{"name": "x", "datatype": "UINT8", "shape": [1, 1], "data": [256]}]}
    status, _, answer = types_server.post("/v2/models/identity_uint8/infer", body)
    assert status == 400, answer
