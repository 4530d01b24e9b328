"""The program's other commands, against the running server, and every command that the documents show."""

import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
from conftest import BINARY, HOST, MODELS, ROOT, free_ports, latest, reference

WITHIN_S = 120


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """The suite's own variable is no key of the gateway; `--strict` would complain."""
    monkeypatch.delenv("TIDEGATE_BINARY", raising=False)


def tidegate(*arguments, stdin=None):
    command = [str(BINARY), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=WITHIN_S)


def infer(server, *arguments, stdin=None):
    return tidegate("infer", "--url", f"http://{server.http}", *arguments, stdin=stdin)


def request_of(case):
    inputs = [
        {"name": name, "datatype": case.datatypes[name], "shape": list(array.shape), "data": array.ravel().tolist()}
        for name, array in case.feed.items()
    ]
    return {"inputs": inputs}


def check_answer(run, case):
    """The answer of `infer --json` against Python's onnxruntime."""
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["headers"]["model_version"] == case.version
    assert document["headers"]["prediction_id"]
    outputs = {each["name"]: each for each in document["response"]["outputs"]}
    assert outputs.keys() == case.expected.keys()
    for name, array in case.expected.items():
        assert outputs[name]["shape"] == list(array.shape)
        got = np.array(outputs[name]["data"]).reshape(array.shape)
        np.testing.assert_allclose(got, array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["iris", "digits", "risk", "topics"])
@pytest.mark.parametrize("kind", ["file", "stdin", "npz"])
def test_infer_answers_as_onnxruntime(server, tmp_path, model, kind):
    case = latest(model)
    if kind == "npz":
        path = tmp_path / "request.npz"
        np.savez(path, **case.feed)
        run = infer(server, model, "--json", "--input", path)
    elif kind == "file":
        path = tmp_path / "request.json"
        path.write_text(json.dumps(request_of(case)))
        run = infer(server, model, "--json", "--input", path)
    else:
        run = infer(server, model, "--json", "--input", "-", stdin=json.dumps(request_of(case)))
    check_answer(run, case)


def test_infer_prints_for_people(server, tmp_path, iris):
    path = tmp_path / "request.json"
    path.write_text(json.dumps(request_of(iris)))
    run = infer(server, "iris", "--version", "2", "--input", path)
    assert run.returncode == 0, run.stderr
    assert "model-version: 2" in run.stdout and "prediction-id: " in run.stdout
    [values] = re.findall(r"^probabilities FP32 \[1,3\]: (.*)$", run.stdout, re.MULTILINE)
    got = [float(value) for value in values.split(", ")]
    np.testing.assert_allclose(got, iris.expected["probabilities"][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["iris", "digits", "risk", "topics"])
def test_infer_makes_up_data(server, model):
    run = infer(server, model, "--random", "--json")
    assert run.returncode == 0, run.stderr
    outputs = json.loads(run.stdout)["response"]["outputs"]
    assert {each["name"] for each in outputs} == latest(model).expected.keys()


def test_infer_chooses_the_version(server, iris):
    feed = {"features": np.array([[5.1, 3.5, 1.4, 0.2]], np.float32)}
    run = infer(server, "iris", "--version", "1", "--json", "--input", "-", stdin=json.dumps(request_of(iris)))
    assert run.returncode == 0, run.stderr
    [output] = json.loads(run.stdout)["response"]["outputs"]
    wanted = reference(MODELS / "iris" / "1" / "model.onnx", feed)["probabilities"]
    np.testing.assert_allclose(output["data"], wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (1, ["nothing", "--random"], "nothing"),
        (1, ["iris", "--version", "9", "--random"], "404"),
        (1, ["iris", "--input", "-"], "400"),
        (1, ["iris", "--random", "--url", f"http://{HOST}:1"], f"{HOST}:1"),
        (2, ["iris"], "--input"),
        (2, ["iris", "--random", "--input", "-"], "cannot be used with"),
        (2, ["iris", "--random", "--url", "ftp://there"], "ftp://there"),
        (2, ["iris", "--input", "/not/there.json"], "/not/there.json"),
        (2, ["iris", "--random", "--shape", "nothing=1"], "nothing"),
    ],
)
def test_infer_exit_codes(server, code, arguments, says):
    url = [] if "--url" in arguments else ["--url", f"http://{server.http}"]
    run = tidegate("infer", *arguments, *url, stdin='{"inputs": []}')
    assert run.returncode == code, run.stdout + run.stderr
    assert says in run.stderr and not run.stdout


def test_inspect():
    run = tidegate("models", "inspect", MODELS / "risk" / "1" / "model.onnx", "--json")
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    runs = {each["engine"]: each["runs"] for each in document["engines"]}
    assert runs == {"onnxruntime": True, "tract": False}
    assert {each["name"] for each in document["inputs"]} == latest("risk").feed.keys()
    assert document["digest"].startswith("sha256:")


def test_inspect_what_is_no_model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is no model")
    assert tidegate("models", "inspect", path).returncode == 1
    assert tidegate("models", "inspect", tmp_path / "missing.onnx").returncode == 1
    assert tidegate("models", "inspect").returncode == 2


def test_validate(tmp_path):
    run = tidegate("models", "validate", MODELS)
    assert run.returncode == 0, run.stdout + run.stderr
    for model in ("iris", "digits", "risk", "topics"):
        assert model in run.stdout

    repository = tmp_path / "models"
    shutil.copytree(MODELS / "iris", repository / "iris")
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"this is no model")
    samples = repository / "iris" / "1" / "samples.json"
    document = json.loads(samples.read_text())
    document["samples"][0]["response"]["outputs"][0]["data"][0] += 1
    samples.write_text(json.dumps(document))
    run = tidegate("models", "validate", repository)
    assert run.returncode == 1
    assert "broken" in run.stdout and "iris" in run.stdout
    assert tidegate("models", "validate", tmp_path / "nowhere").returncode == 1
    assert tidegate("models", "validate").returncode == 2


def test_check_config_right(tmp_path):
    config = tmp_path / "tidegate.toml"
    config.write_text('[log]\naccess = "all"\n')
    for strict in ([], ["--strict"]):
        run = tidegate("check-config", "--config", config, *strict)
        assert run.returncode == 0, run.stdout + run.stderr
        assert "the configuration is right" in run.stdout


def test_check_config_says_all_problems_at_once(tmp_path):
    config = tmp_path / "tidegate.toml"
    config.write_text(
        '[server]\nhttp_address = "here"\nhtp_address = 1\nbody_max_bytes = -1\n'
        '[engine]\nengine = "torch"\n[telemetry]\nsample_ratio = 2.0\n[nothing]\nat_all = 1\n'
    )
    keys = ["server.http_address", "htp_address", "body_max_bytes", "engine.engine", "sample_ratio", "nothing"]
    run = tidegate("check-config", "--config", config)
    assert run.returncode == 2
    assert all(key in run.stdout for key in keys), run.stdout
    run = tidegate("check-config", "--config", config, "--json")
    assert run.returncode == 2
    document = json.loads(run.stdout)
    assert document["ok"] is False and len(document["problems"]) >= len(keys)


def test_check_config_names_every_model_problem(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "models" / name / "1").mkdir(parents=True)
        (tmp_path / "models" / name / "config.pbtxt").write_text("max_batch_size: -4")
    run = tidegate("check-config", "--model-repository", tmp_path / "models")
    assert run.returncode == 1
    assert "model one: " in run.stdout and "model two: " in run.stdout


def test_check_config_strict():
    open_to_all = ["check-config", "--http-address", "0.0.0.0:8000"]
    assert tidegate(*open_to_all).returncode == 2
    assert tidegate(*open_to_all, "--allow-unauthenticated").returncode == 0
    assert tidegate(*open_to_all, "--allow-unauthenticated", "--strict").returncode == 1


def shown_commands():
    """One after the other: commands in the documents' shell blocks, and those in running text that start the built program."""
    for name in ("README.md", "docs/operate.md"):
        text = pathlib.Path(ROOT / name).read_text()
        found = []
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            found += block.replace("\\\n", " ").splitlines()
        plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        found += [each.replace("\n", " ") for each in re.findall(r"`([^`]+)`", plain)]
        for each in found:
            # Only what can be run as it stands: no placeholders, and more than a program's name.
            if re.match(r"(curl|(target/release/)?tidegate) ", each) and not re.search(r"<\w+>|FILE|…", each):
                yield pytest.param(each, id=f"{name}: {each[:60]}")


def test_the_documents_show_commands():
    assert len(list(shown_commands())) >= 6


@pytest.mark.parametrize("command", list(shown_commands()))
def test_a_shown_command_works(server, tmp_path, command):
    places = {
        "localhost:8000": server.http,
        "127.0.0.1:8000": server.http,
        "localhost:8002": server.metrics,
        "/var/lib/tidegate": str(tmp_path / "state"),
    }
    words = shlex.split(command, comments=True)
    for shown, here in places.items():
        words = [word.replace(shown, here) for word in words]
    if words[0] == "curl":
        # curl says 0 for an answer that is an error; the reader of a document would not.
        words.insert(1, "--fail")
    else:
        words[0] = str(BINARY)
    if words[1] in ("infer", "health"):
        words += ["--url", f"http://{server.http}"]
    if words[1] == "serve":
        return check_serves(words)
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=WITHIN_S)
    assert run.returncode == 0, run.stdout + run.stderr


def check_serves(words):
    """On other ports: until it is ready, then to its end."""
    for listener, port in zip(("http", "grpc", "metrics", "admin"), free_ports(4)):
        words += [f"--{listener}-address", f"{HOST}:{port}"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watchdog = threading.Timer(WITHIN_S, process.kill)
    watchdog.start()
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.endswith(" ready\n") and "transport" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) == 0, said
    finally:
        watchdog.cancel()
        process.kill()
