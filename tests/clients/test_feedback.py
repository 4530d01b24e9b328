"""Feedback as clients give it: over REST and gRPC, late, again, corrected, and across a `kill -9`."""

import json
import math
import os
import pathlib
import re
import subprocess
import time
import urllib.error
import urllib.request
import uuid

import grpc
import numpy as np
import pandas
import pytest
from conftest import BINARY, MODELS, ROOT, Server, eventually, running, tidegate
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

WITHIN_S = 30
NAMES = ["setosa", "versicolor", "virginica"]
FLOWERS = np.array(
    [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3], [5.9, 2.8, 4.3, 1.3], [6.1, 2.9, 4.7, 1.4], [4.9, 3.1, 1.5, 0.1]],
    np.float32,
)


def infer(server, rows, path="/v2/models/iris/infer"):
    """A prediction's id and its probabilities."""
    rows = np.asarray(rows, np.float32)
    tensor = {"name": "features", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}
    status, headers, body = server.post(path, {"inputs": [tensor]})
    assert status == 200, body
    output = json.loads(body)["outputs"][0]
    return headers["tidegate-prediction-id"], np.array(output["data"]).reshape(output["shape"])


def say(server, items, model="iris", want=202):
    status, headers, body = server.post(f"/v2/models/{model}/feedback", items)
    assert status == want, body
    assert headers["Content-Type"] == "application/json"
    answer = json.loads(body)
    if status != 202:
        return answer
    ids = [each["prediction_id"] for each in (items if isinstance(items, list) else [items])]
    assert [each["prediction_id"] for each in answer["results"]] == ids
    return [each["status"] for each in answer["results"]]


def quality(server, model="iris", days=None):
    query = "" if days is None else f"?days={days}"
    token = (server.state / "admin-token").read_text().strip()
    request = urllib.request.Request(
        f"http://{server.admin}/admin/v1/models/{model}/quality{query}", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer), answer.headers["ETag"]


def arms(server, version="2"):
    versions = quality(server)[0]["versions"]
    return next((each["arms"] for each in versions if each["version"] == version), {})


def counted(server, predictions, arm="stable"):
    """Figures of an arm once so many predictions are counted."""
    return eventually(
        lambda: (found := arms(server).get(arm)) and found["predictions"] == predictions and found
    )


@pytest.fixture
def gateway(tmp_path):
    with running(MODELS, tmp_path / "gate") as server:
        yield server


def sender(server):
    """`tidegate.v1.Feedback/Send` as a client knows it that has read nothing but reflection."""
    channel = grpc.insecure_channel(server.grpc)
    database = ProtoReflectionDescriptorDatabase(channel)
    assert "tidegate.v1.Feedback" in database.get_services()
    pool = DescriptorPool(database)
    method = pool.FindServiceByName("tidegate.v1.Feedback").methods_by_name["Send"]
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    call = channel.unary_unary(
        "/tidegate.v1.Feedback/Send", request.SerializeToString, response_deserializer=response.FromString
    )
    return request, call


def test_figures_are_those_of_numpy(gateway):
    """Late labels in a list, over both protocols; each figure by its definition, from the answers themselves."""
    generator = np.random.default_rng(7)
    rows = FLOWERS[generator.integers(0, 5, 60)] + generator.normal(0, 0.4, (60, 4)).astype(np.float32)
    made = [infer(gateway, row[None]) for row in rows]
    truth = generator.integers(0, 3, 60)
    items = [{"prediction_id": name, "label": int(label)} for (name, _), label in zip(made[:25], truth)]
    items += [{"prediction_id": name, "label": NAMES[label]} for (name, _), label in zip(made[25:40], truth[25:])]
    assert say(gateway, items) == ["recorded"] * 40
    request, send = sender(gateway)
    message = request(model_name="iris")
    for (name, _), label in zip(made[40:50], truth[40:]):
        message.items.add(prediction_id=name).labels.add(int=int(label))
    assert [each.status for each in send(message).results] == ["recorded"] * 10

    figures = counted(gateway, 60)
    labels, p = truth[:50], np.concatenate([answer for _, answer in made])[:50]
    taken = p.argmax(1)
    right = taken == labels
    of = figures["classification"]
    assert figures["labelled"] == 50 and figures["unjudged"] == 0 and of["rows"] == 50
    assert of["accuracy"]["value"] == pytest.approx(right.mean())
    assert of["accuracy"]["low"] < right.mean() < of["accuracy"]["high"]
    assert of["log_loss"]["value"] == pytest.approx(-np.log(p[range(50), labels]).mean(), rel=1e-5)
    assert of["brier"]["value"] == pytest.approx(((p - np.eye(3)[labels]) ** 2).sum(1).mean(), rel=1e-5)
    bins = np.clip(np.ceil(p.max(1) * 10).astype(int) - 1, 0, 9)
    ece = sum((bins == at).mean() * abs(p.max(1)[bins == at].mean() - right[bins == at].mean()) for at in set(bins))
    assert of["calibration"]["ece"] == pytest.approx(ece, rel=1e-4)
    f1 = []
    for at, name in enumerate(NAMES):
        hits, support, said = ((taken == at) & right).sum(), (labels == at).sum(), (taken == at).sum()
        one = next(each for each in of["classes"] if each["class"] == name)
        assert (one["support"], one["predicted"]) == (support, said)
        f1.append(2 * hits / (support + said))
    assert of["f1"] == pytest.approx(np.mean(f1))
    assert figures["coverage"]["value"] == pytest.approx(50 / 60)
    everything = np.concatenate([answer for _, answer in made])
    assert figures["estimated_accuracy"]["value"] == pytest.approx(everything.max(1).mean(), rel=1e-5)
    assert figures["estimated_accuracy"]["rows"] == 60

    page = gateway.get("/metrics", gateway.metrics)[1].decode()
    labels = 'model="iris",version="2",arm="stable"'
    shown = re.search(rf'tidegate_quality{{{labels},metric="accuracy"}} (\S+)', page)
    assert float(shown[1]) == pytest.approx(right.mean())
    assert f"tidegate_quality_samples{{{labels}}} 50" in page
    assert 'tidegate_feedback_total{model="iris",outcome="recorded"} 50' in page
    told = tidegate("quality", "iris", "--address", f"http://{gateway.admin}", "--state-dir", gateway.state)
    assert re.search(rf"^2 +stable +60 +50 +coverage +{50 / 60:.4f}", told, re.M), told
    report, tag = quality(gateway, days=1)
    assert report["from"] == report["to"] and tag


def test_again_corrected_and_by_the_row(gateway):
    name, answer = infer(gateway, FLOWERS)
    taken = answer.argmax(1).tolist()
    rows = {"prediction_id": name, "label": taken}
    assert say(gateway, rows) == ["recorded"]
    assert say(gateway, rows) == ["unchanged"]
    wrong = {"prediction_id": name, "label": [(taken[0] + 1) % 3, None, *taken[2:]]}
    assert say(gateway, [wrong, wrong]) == ["corrected", "unchanged"]
    figures = counted(gateway, 1)["classification"]
    assert (figures["rows"], figures["accuracy"]["value"]) == (4, 0.75)
    revenue = {"prediction_id": name, "metric": "revenue", "value": 2.5}
    assert say(gateway, [revenue, {**revenue, "value": 3}]) == ["recorded", "corrected"]
    assert counted(gateway, 1)["metrics"]["revenue"]["mean"]["value"] == 3
    records = [json.loads(line) for line in tidegate(
        "audit", "export", gateway.state / "ledger" / "feedback", "--format", "jsonl", "--out", "-"
    ).splitlines()]
    said = [record for record in records if record["kind"] == "feedback"]
    assert [record["action"] for record in said] == ["feedback.label"] * 2 + ["feedback.metric"] * 2
    assert all(record["prediction_id"] == name and record["arm"] == "stable" for record in said)


def test_what_is_wrong_is_said(gateway):
    name, _ = infer(gateway, FLOWERS[:1])
    nobody = str(uuid.UUID(int=uuid.UUID(name).int ^ 1))
    good = {"prediction_id": name, "label": 0}
    assert say(gateway, {**good, "prediction_id": nobody}, want=404)["code"] == "not_found"
    assert say(gateway, good, model="digits", want=404)["code"] == "not_found"
    assert say(gateway, [{**good, "prediction_id": nobody}, good]) == ["not_found", "recorded"]
    cases = [
        (b"", "request body"), (b"[]", "at least one"), ({"label": 1}, "prediction_id"),
        ({**good, "label": 3}, "none of the 3 classes"), ({**good, "label": [0, 0]}, "1 rows"),
        ({**good, "lable": 1}, "lable"), ([good, {**good, "label": {}}], "item 1"),
        ([good] * 1001, "the limit is 1000"),
    ]
    for body, why in cases:
        answer = say(gateway, body, want=400)
        assert answer["code"] == "invalid_input" and why in answer["error"], answer
    assert gateway.get("/v2/models/iris/feedback")[0] == 405
    assert gateway.post("/v2/models/iris/feedback", b" " * (1 << 20) + b"{}")[0] == 413
    request, send = sender(gateway)
    for model, item, code, why in [
        ("iris", {"prediction_id": nobody}, grpc.StatusCode.INVALID_ARGUMENT, "item 0: expected a label"),
        ("iris", {"prediction_id": nobody, "labels": [{"int": 1}]}, grpc.StatusCode.NOT_FOUND, "is not found"),
        ("a b", {"prediction_id": name, "labels": [{"int": 1}]}, grpc.StatusCode.NOT_FOUND, "is not found"),
        ("iris", {"prediction_id": name, "metric": "m"}, grpc.StatusCode.INVALID_ARGUMENT, "no value"),
    ]:
        with pytest.raises(grpc.RpcError) as failed:
            send(request(model_name=model, items=[item]))
        assert failed.value.code() == code and why in failed.value.details(), failed.value
    # Nothing of what was refused counts.
    assert counted(gateway, 1)["classification"]["rows"] == 1


def test_without_records_there_is_nothing_to_label(tmp_path):
    with running(MODELS, tmp_path / "gate", config="[ledger]\ndurability = 'off'\n") as server:
        name, _ = infer(server, FLOWERS[:1])
        answer = say(server, {"prediction_id": name, "label": 0}, want=501)
        assert answer["code"] == "unsupported" and "not recorded" in answer["error"]


def test_a_label_that_was_answered_survives_kill_9(tmp_path):
    """Labels go in one after the other until the process is killed; each that was answered counts afterwards, once."""
    server = Server(MODELS, tmp_path / "gate", config="[ledger]\nsegment_bytes = 65536\n")
    made = [infer(server, FLOWERS[at % 5][None]) for at in range(300)]
    answered = 0
    for at, (name, answer) in enumerate(made):
        if at == 200:
            server.process.kill()
        try:
            assert say(server, {"prediction_id": name, "label": int(answer.argmax())}) == ["recorded"]
            answered += 1
        except (OSError, urllib.error.URLError):
            break
    server.process.wait()
    assert answered == 200
    (tmp_path / "again").mkdir()
    (server.state).rename(tmp_path / "again" / "state")
    with running(MODELS, tmp_path / "again") as again:
        figures = counted(again, 300)
        assert figures["labelled"] in (200, 201) and figures["classification"]["accuracy"]["value"] == 1
        outcomes = say(again, [{"prediction_id": name, "label": int(p.argmax())} for name, p in made])
        assert outcomes[:200] == ["unchanged"] * 200 and set(outcomes[201:]) == {"recorded"}
        assert counted(again, 300)["labelled"] == 300


def test_labelled_predictions_are_exported(gateway, tmp_path):
    made = [infer(gateway, FLOWERS[at % 5][None]) for at in range(10)]
    labels = {name: NAMES[int(p.argmax())] for name, p in made[:6]}
    say(gateway, [{"prediction_id": name, "label": "setosa"} for name in labels])
    say(gateway, [{"prediction_id": name, "label": label} for name, label in labels.items()])
    say(gateway, [{"prediction_id": made[9][0], "metric": "revenue", "value": 1}])
    name = made[0][0]
    say(gateway, [{"prediction_id": name, "metric": "revenue", "value": 2}])
    export = ("audit", "export", gateway.state, "--labelled", "--model", "iris")
    tidegate(*export, "--format", "parquet", "--out", tmp_path / "train.parquet")
    frame = pandas.read_parquet(tmp_path / "train.parquet").set_index("prediction_id")
    assert {key: row["label"].tolist() for key, row in frame.iterrows()} == {key: [of] for key, of in labels.items()}
    assert json.loads(frame.loc[name, "metrics"]) == {"revenue": 2}
    np.testing.assert_allclose(frame.loc[name, "in_features"], FLOWERS[0])
    assert (frame["label_time"] > frame["time"]).all()
    lines = [json.loads(line) for line in tidegate(*export, "--format", "jsonl", "--out", "-").splitlines()]
    assert {line["prediction_id"]: line["label"] for line in lines} == {key: [of] for key, of in labels.items()}
    # Typed by what they are: numbers are numbers.
    say(gateway, [{"prediction_id": key, "label": NAMES.index(of)} for key, of in labels.items()])
    tidegate(*export, "--format", "parquet", "--out", tmp_path / "train")
    frame = pandas.read_parquet(tmp_path / "train" / "model=iris")
    assert frame["label"].map(lambda of: of.dtype).eq(np.int64).all()
    assert len(frame) == 6


def test_regression_and_scores_as_the_model_says(tmp_path):
    """A model of one float a row: a number, unless its `tidegate.toml` says that it is a score."""
    repository = tmp_path / "models"
    for name, extra in [("score", "[feedback]\ntask = 'classification'\nthreshold = 0.75\n"), ("value", "")]:
        folder = repository / name / "1"
        folder.mkdir(parents=True)
        identity(folder / "model.onnx")
        if extra:
            (repository / name / "tidegate.toml").write_text(extra)
    with running(repository, tmp_path / "gate") as server:
        values = [0.1, 0.5, 0.7, 0.9]
        for model, labels in [("value", [0.0, 1.0, 0.7, 0.4]), ("score", [0, 1, True, True])]:
            names = [one(server, model, value) for value in values]
            items = [{"prediction_id": name, "label": label} for name, label in zip(names, labels)]
            assert say(server, items, model=model) == ["recorded"] * 4
        errors = np.array(values) - np.array([0.0, 1.0, 0.7, 0.4])
        regression = quality(server, "value")[0]["versions"][0]["all"]["regression"]
        assert regression["mae"]["value"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
        assert regression["rmse"]["value"] == pytest.approx(math.sqrt((errors**2).mean()), rel=1e-5)
        assert regression["bias"]["value"] == pytest.approx(errors.mean(), rel=1e-5)
        scores = quality(server, "score")[0]["versions"][0]["all"]["classification"]
        # 0.5 and 0.7 are below the threshold.
        assert scores["accuracy"]["value"] == 0.5
        truth, p = np.array([0, 1, 1, 1]), np.array(values)
        assert scores["brier"]["value"] == pytest.approx(((p - truth) ** 2).mean(), rel=1e-5)
        wrong = say(server, {"prediction_id": names[0], "label": "x"}, model="score", want=400)
        assert "none of two classes" in wrong["error"]


def identity(path):
    from onnx import TensorProto, helper, save

    tensor = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [tensor("x")], [tensor("y")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def one(server, model, value):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}
    status, headers, body = server.post(f"/v2/models/{model}/infer", {"inputs": [tensor]})
    assert status == 200, body
    return headers["tidegate-prediction-id"]


def test_the_page(gateway, tmp_path):
    """Every command of docs/feedback.md, as it stands there."""
    page = (ROOT / "docs" / "feedback.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) == 4
    (tmp_path / "tidegate-state").symlink_to(gateway.state)
    request = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": FLOWERS[0].tolist()}]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    where = f"--address http://{gateway.admin} --state-dir {gateway.state}"
    shell = f'set -euo pipefail\ntidegate() {{ if [ "$1" = quality ]; then set -- "$@" {where}; fi; "{BINARY}" "$@"; }}\n'
    script = shell + "\n".join(blocks).replace("127.0.0.1:8000", gateway.http)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count('"status":"recorded"') == 2, done.stdout
    assert '"kind":"feedback"' in done.stdout.replace(" ", "")
    python = re.search(r"^```python\n(.*?)^```", page, re.S | re.M)[1]
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        space = {}
        exec(python, space)
    finally:
        os.chdir(here)
    assert space["y"].iloc[0].tolist() == ["setosa"] and len(space["x"].iloc[0]) == 4
    assert pathlib.Path(tmp_path / "train.jsonl").read_text().count("\n") == 1


class Canary:
    """A rollout of version 2 at half of the traffic, held to its labels."""

    def __init__(self, server, folder):
        self.server, self.plan = server, folder / "plan.json"
        self.where = ("--address", f"http://{server.admin}", "--state-dir", server.state)
        plan = {
            "candidate": "2", "steps": [{"weight": 50, "bake_s": 3600, "min_samples": 1}], "interval_s": 1,
            "guards": {"feedback": {"min_labels": 10}, "sample_ratio": None},
        }
        self.plan.write_text(json.dumps(plan))

    def run(self, *arguments):
        return tidegate(*arguments, *self.where)

    def label(self, mistaken):
        """Twenty predictions with their labels, of which those of version 2 say `mistaken`."""
        items = []
        for at in range(20):
            row = FLOWERS[at % 5]
            tensor = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": row.tolist()}
            status, headers, body = self.server.post("/v2/models/iris/infer", {"inputs": [tensor]})
            assert status == 200, body
            right = int(np.argmax(json.loads(body)["outputs"][0]["data"]))
            wrong = headers["tidegate-model-version"] == "2" and mistaken(at)
            items.append({"prediction_id": headers["tidegate-prediction-id"], "label": (right + wrong) % 3})
        assert say(self.server, items) == ["recorded"] * 20

    def state(self):
        return json.loads(self.run("rollout", "status", "iris", "--json"))

    def guard(self):
        return next((each for each in self.state().get("guards", []) if each["guard"] == "feedback"), None)


def test_a_candidate_that_is_mistaken_more_often_goes_back(tmp_path):
    """Nothing is wrong with the candidate but what it says, by the labels."""
    with running(MODELS, tmp_path / "gate") as server:
        canary = Canary(server, tmp_path)
        canary.run("traffic", "set", "iris", "1=100")
        canary.run("rollout", "start", "iris", "--file", canary.plan)
        guard = eventually(canary.guard)
        assert guard["outcome"] == "inconclusive" and "labels" in guard["why"]
        until = time.monotonic() + WITHIN_S
        while "rolled_back" not in json.dumps(canary.state()["state"]):
            assert time.monotonic() < until, canary.state()
            canary.label(lambda at: at % 4 != 0)
        guard = canary.guard()
        assert guard["outcome"] == "fail" and guard["evidence"] >= guard["limit"]
        assert guard["candidate"]["events"] > guard["stable"]["events"] == 0


def test_a_restart_makes_no_new_labels_of_old_ones(tmp_path):
    """What labels said before a rollout began is not its own, also for a process that counts them anew."""
    with running(MODELS, tmp_path / "gate") as server:
        canary = Canary(server, tmp_path)
        canary.run("traffic", "set", "iris", "1=50", "2=50")
        for _ in range(3):
            canary.label(lambda at: True)
        canary.run("traffic", "set", "iris", "1=100")
        canary.run("rollout", "start", "iris", "--file", canary.plan)
        guard = eventually(canary.guard)
        assert guard["candidate"]["of"] == guard["stable"]["of"] == 0
    with running(MODELS, tmp_path / "gate") as server:
        canary = Canary(server, tmp_path)
        eventually(canary.guard)
        for _ in range(3):
            canary.label(lambda at: False)
        guard = eventually(lambda: (found := canary.guard()) and found["candidate"]["of"] >= 10 and found)
        assert guard["candidate"]["events"] == guard["stable"]["events"] == 0
        assert guard["candidate"]["of"] + guard["stable"]["of"] <= 60 and guard["outcome"] == "pass"


def test_the_ledger_still_verifies(tmp_path):
    """The log of feedback is signed and checked like the others, also with what was erased in it."""
    with running(MODELS, tmp_path / "gate", config="[ledger]\ncheckpoint_interval_s = 1\n") as server:
        names = [infer(server, FLOWERS[:1])[0] for _ in range(4)]
        say(server, [{"prediction_id": name, "label": 0} for name in names])
        checkpoint = server.state / "ledger" / "feedback" / "checkpoint"
        eventually(lambda: checkpoint.exists() and int(checkpoint.read_text().split("\n")[1]) >= 4)
        tidegate(
            *("audit", "erase", names[0], "--reason", "asked for"),
            *("--address", f"http://{server.admin}", "--state-dir", server.state),
        )
        report = json.loads(tidegate("audit", "verify", server.state / "ledger", "--json"))["report"]
        log = next(each for each in report["logs"] if each["log"] == "feedback")
        assert log["next_seq"] == 4 and log["signed"] >= 4
        eventually(lambda: json.loads(tidegate("audit", "verify", server.state / "ledger", "--json"))["report"])
        assert say(server, {"prediction_id": names[1], "label": 0}) == ["unchanged"]
