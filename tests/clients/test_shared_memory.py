"""System shared memory: refused as it comes, and right when switched on."""

import os

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import tritonclient.utils.shared_memory as shm
from conftest import MODELS, running
from tritonclient.utils import InferenceServerException

CLIENTS = {"http": triton_http, "grpc": triton_grpc}


@pytest.fixture(scope="module")
def shm_server(tmp_path_factory):
    with running(MODELS, tmp_path_factory.mktemp("shm"), "[server]\nsystem_shared_memory = true\n") as started:
        yield started


@pytest.fixture
def region(request):
    """A region of 64 bytes: input in the first half, output in the second."""
    key = f"/t{os.getpid()}"
    handle = shm.create_shared_memory_region("flowers", key, 64)
    yield handle, key
    shm.destroy_shared_memory_region(handle)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_refused_by_default(server, region, protocol):
    with CLIENTS[protocol].InferenceServerClient(getattr(server, protocol)) as client:
        with pytest.raises(InferenceServerException):
            client.register_system_shared_memory("flowers", region[1], 64)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_input_and_output(shm_server, region, iris, protocol):
    module = CLIENTS[protocol]
    handle, key = region
    shm.set_shared_memory_region(handle, [iris.feed["features"]])
    with module.InferenceServerClient(getattr(shm_server, protocol)) as client:
        client.unregister_system_shared_memory()
        client.register_system_shared_memory("flowers", key, 64)
        status = client.get_system_shared_memory_status()
        assert "flowers" in str(status)
        tensor = module.InferInput("features", [1, 4], "FP32")
        tensor.set_shared_memory("flowers", 16)
        output = module.InferRequestedOutput("probabilities")
        output.set_shared_memory("flowers", 32, 32)
        client.infer("iris", [tensor], outputs=[output])
        got = shm.get_contents_as_numpy(handle, np.float32, [1, 3], offset=32)
        np.testing.assert_allclose(got, iris.expected["probabilities"], rtol=1e-4, atol=1e-4)
        # More than the region holds.
        tensor.set_shared_memory("flowers", 16, offset=60)
        with pytest.raises(InferenceServerException):
            client.infer("iris", [tensor])
        client.unregister_system_shared_memory("flowers")
        tensor.set_shared_memory("flowers", 16)
        with pytest.raises(InferenceServerException):
            client.infer("iris", [tensor])
