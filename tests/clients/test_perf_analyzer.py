"""perf_analyzer, Triton's load tool, over both protocols: it reads metadata, configuration and statistics on its way."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

LIBRARIES = pathlib.Path(sys.prefix) / "lib"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Where perf_analyzer finds the CUDA runtime (from its wheel) and libb64 (built here when not installed)."""
    (cuda,) = LIBRARIES.glob("python3*/site-packages/nvidia/cuda_runtime/lib")
    folder = tmp_path_factory.mktemp("b64")
    source = pathlib.Path(__file__).with_name("b64.c")
    library = folder / "libb64.so.0d"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    # libb64 last in the list: the system's own one is not shadowed by being found first in its folder.
    return {**os.environ, "LD_LIBRARY_PATH": f"{cuda}:{folder}"}


def analyze(environment, *arguments):
    run = subprocess.run(
        [
            *(pathlib.Path(sys.prefix) / "bin" / "perf_analyzer", "--request-count", "100", "--concurrency-range", "2"),
            *arguments,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = run.stdout + run.stderr
    assert run.returncode == 0, text
    assert "Failed" not in text and "rror:" not in text, text
    (throughput,) = re.findall(r"Throughput: ([0-9.]+) infer/sec", text)
    assert float(throughput) > 0
    return text


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    "model", [("iris",), ("digits",), ("risk",), ("topics", "--shape", "input_ids:8", "--shape", "attention_mask:8")]
)
def test_perf_analyzer(server, environment, protocol, model):
    name, *shapes = model
    # Zeros: random token ids would lie outside the vocabulary.
    analyze(environment, "-m", name, "-u", getattr(server, protocol), "-i", protocol, "--input-data", "zero", *shapes)


def test_batches(server, environment):
    analyze(environment, "-m", "digits", "-u", server.grpc, "-i", "grpc", "-b", "4")


def test_streaming(server, environment):
    analyze(environment, "-m", "digits", "-u", server.grpc, "-i", "grpc", "--streaming")
