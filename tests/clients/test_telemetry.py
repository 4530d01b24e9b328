"""The gateway calls nobody: no process of it opens a connection while it loads and serves models.

ONNX Runtime's own telemetry is on by default on Linux and calls home when a session is made, so
this is watched from outside, by the system calls that the gateway and its child processes make.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = os.environ.get("TIDEGATE_BINARY", os.path.join(ROOT, "target", "debug", "tidegate"))
# Any address family that leaves the machine; Unix sockets do not.
OUTGOING = re.compile(r"(connect|sendto|sendmsg|sendmmsg)\(.*sa_family=AF_INET6?[,}]")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outgoing_calls(trace):
    with open(trace, encoding="utf-8", errors="replace") as lines:
        return [line.strip() for line in lines if OUTGOING.search(line)]


def traced(trace, command, **options):
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    return subprocess.Popen(["strace", "-f", "-qq", "-e", calls, "-o", trace, *command], **options)


def test_strace_is_there():
    assert shutil.which("strace"), "install strace: this suite watches system calls"


def test_the_watch_sees_a_connection(tmp_path):
    """Positive control: the same watch sees a program that does connect."""
    trace = str(tmp_path / "trace")
    connect = "import socket; s = socket.socket(); s.connect_ex(('127.0.0.1', 9))"
    assert traced(trace, [sys.executable, "-c", connect]).wait(timeout=30) == 0
    assert outgoing_calls(trace)


@pytest.mark.parametrize("engine", ["ort", "tract"])
def test_no_connection_leaves_the_gateway(tmp_path, engine):
    trace = str(tmp_path / "trace")
    http, grpc, metrics = free_port(), free_port(), free_port()
    command = [BINARY, "serve", "--model-repository", os.path.join(ROOT, "models"), "--engine", engine]
    command += ["--state-dir", str(tmp_path / "state")]
    for flag, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
        command += [f"--{flag}-address", f"127.0.0.1:{port}"]
    process = traced(trace, command, cwd=ROOT, start_new_session=True)
    try:
        wait_ready(process, http)
        body = b'{"inputs":[{"name":"%s","shape":[1,4],"datatype":"FP32","data":[5.1,3.5,1.4,0.2]}]}'
        name = input_name(http)
        url = f"http://127.0.0.1:{http}/v2/models/iris/infer"
        for _ in range(20):
            with urllib.request.urlopen(url, data=body % name.encode()) as answer:
                assert answer.status == 200
        time.sleep(2)  # What is sent in the background is sent by then.
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    assert outgoing_calls(trace) == []


def wait_ready(process, port):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, "the gateway ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready") as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("not ready in time")


def input_name(port):
    import json

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/iris") as answer:
        return json.load(answer)["inputs"][0]["name"]
