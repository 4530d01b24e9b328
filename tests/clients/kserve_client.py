"""Runs inside the environment that has KServe's client; prints what it got as JSON.

    python kserve_client.py HTTP_ADDRESS GRPC_ADDRESS < request.json
"""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

DTYPES = {"FP32": np.float32, "INT64": np.int64}


def infer_request(model, inputs, binary):
    tensors = []
    for each in inputs:
        tensor = InferInput(each["name"], each["shape"], each["datatype"])
        values = np.array(each["data"], DTYPES[each["datatype"]]).reshape(each["shape"])
        tensor.set_data_from_numpy(values, binary_data=binary)
        tensors.append(tensor)
    return InferRequest(model, tensors, request_id="k-1")


def outputs(answer):
    return {each.name: {"shape": list(each.shape), "data": each.as_numpy().ravel().tolist()} for each in answer.outputs}


async def main(http, grpc, model, inputs):
    url = f"http://{http}"
    result = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as rest:
        result["live"] = await rest.is_server_live(url)
        result["ready"] = await rest.is_server_ready(url)
        result["model_ready"] = await rest.is_model_ready(url, model)
        result["unknown_ready"] = await rest.is_model_ready(url, "nothing")
        for name, binary in (("json", False), ("binary", True)):
            answer = await rest.infer(url, infer_request(model, inputs, binary), model_name=model)
            result[name] = outputs(answer)
        try:
            await rest.infer(url, infer_request("nothing", inputs, False), model_name="nothing")
        except Exception as error:
            result["error"] = str(error)
    async with InferenceGRPCClient(grpc) as client:
        result["grpc_live"] = await client.is_server_live()
        result["grpc_ready"] = await client.is_server_ready()
        result["grpc_model_ready"] = await client.is_model_ready(model)
        result["grpc"] = outputs(await client.infer(infer_request(model, inputs, True)))
        result["grpc_typed"] = outputs(await client.infer(infer_request(model, inputs, False)))
    print(json.dumps(result))


if __name__ == "__main__":
    request = json.load(sys.stdin)
    asyncio.run(main(sys.argv[1], sys.argv[2], request["model"], request["inputs"]))
