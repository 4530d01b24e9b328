"""Rollouts that go by what the monitor sees: outputs against the stable version's, and rows against the reference."""

import shutil
import threading

import numpy as np
import onnx
import pytest
from conftest import MODELS, eventually, running, tidegate
from onnx import helper, numpy_helper
from test_monitor import FAST, SEED, admin, flowers, send

PLAN = {
    "candidate": "3",
    "steps": [{"weight": 50, "bake_s": 1, "min_samples": 100}, {"weight": 80, "bake_s": 1, "min_samples": 100}],
    "interval_s": 1,
    "guards": {"drift": {"score_max": 0.1, "min_rows": 300}},
}


def repository(folder, rotated=False, number="3"):
    """iris with another version: the same as 2, or with its classes in another order."""
    models = folder / "models"
    shutil.copytree(MODELS / "iris", models / "iris")
    model = onnx.load(models / "iris" / "2" / "model.onnx")
    model.doc_string = "another"
    if rotated:
        model.graph.node[-1].output[0] = "before"
        order = numpy_helper.from_array(np.array([2, 0, 1], dtype=np.int64), "order")
        model.graph.initializer.append(order)
        model.graph.node.append(helper.make_node("Gather", ["before", "order"], ["probabilities"], axis=1))
    made = models / "iris" / number
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    onnx.save(model, made / "model.onnx")
    return models


def rollout(server, plan, seed, shift=0.0):
    """Starts it and sends rows until it has ended."""
    status, body = admin(server, "/models/iris/traffic", {"weights": {"2": 100}}, "PUT")
    assert status == 200, body
    status, started = admin(server, "/models/iris/rollouts", plan, "POST")
    assert status in (200, 201, 202), started
    over = threading.Event()

    def traffic():
        for number in range(1000):
            if over.is_set():
                return
            send(server, flowers(200, seed + number, shift), batch=2)

    sender = threading.Thread(target=traffic)
    sender.start()
    try:

        def ended():
            _, now = admin(server, f"/models/iris/rollouts/{started['id']}")
            return now["state"] in ("promoted", "rolled_back", "paused", "failed", "aborted") and now

        return eventually(ended, within=120)
    finally:
        over.set()
        sender.join()


def guard(rollout, name):
    return next(each for each in rollout["guards"] if each["guard"] == name)


@pytest.mark.parametrize("number", ["1", "3"])
@pytest.mark.parametrize("rotated", [False, True])
def test_outputs_are_compared_between_the_arms(tmp_path, rotated, number):
    """Also of a candidate that is older: of equal weights it is what the split calls stable, as is one with more than half."""
    with running(repository(tmp_path, rotated, number), tmp_path / "gate", environment=FAST) as server:
        ended = rollout(server, PLAN | {"candidate": number}, SEED)
        drift = guard(ended, "drift")
        assert drift["candidate"]["of"] > 100 and drift["stable"]["of"] > 100, drift
        if not rotated:
            assert (ended["state"], drift["outcome"]) == ("promoted", "pass"), ended
            assert drift["evidence"] < drift["limit"], drift
            return
        assert ended["state"] == "rolled_back" and ended["reason"]["message"].startswith("drift: "), ended
        assert drift["outcome"] == "fail" and drift["evidence"] >= drift["limit"] and drift["low"] >= 0.1, drift
        _, table = admin(server, "/models/iris/traffic")
        assert list(table["traffic"]["weights"]) == ["2"], table
        # What the evidence is made of, to be computed again.
        outputs = {each["feature"]: each for each in ended["evidence"]["outputs"]["features"]}
        assert sum(outputs["class(probabilities)"]["candidate"]) == drift["candidate"]["of"], outputs


def test_a_candidate_is_compared_with_its_own_reference(tmp_path):
    models = repository(tmp_path)
    train = tmp_path / "train.csv"
    names = ",".join(f"features[{at}]" for at in range(4))
    rows = (",".join(map(repr, map(float, row))) for row in flowers(1000, SEED))
    train.write_text("\n".join([names, *rows]) + "\n")
    tidegate("profile", train, "--model", "iris", "--out", models / "iris" / "3" / "reference.json")
    plan = PLAN | {"guards": {"reference_drift": {}}}
    with running(models, tmp_path / "gate", environment=FAST) as server:
        ended = rollout(server, plan, SEED + 5000)
        assert (ended["state"], guard(ended, "reference_drift")["outcome"]) == ("promoted", "pass"), ended
        ended = rollout(server, plan, SEED + 9000, shift=1.0)
        own = guard(ended, "reference_drift")
        assert ended["state"] == "rolled_back" and own["outcome"] == "fail", ended
        assert own["why"].startswith("features[0] of "), own


def test_guards_without_a_monitor_are_refused(tmp_path):
    with running(repository(tmp_path), tmp_path / "gate", environment={"TIDEGATE_MONITOR_ENABLED": "false"}) as server:
        admin(server, "/models/iris/traffic", {"weights": {"2": 100}}, "PUT")
        status, body = admin(server, "/models/iris/rollouts", PLAN, "POST")
        assert status == 409 and "monitor.enabled" in body["detail"], body
