"""Alerts as a receiver meets them: a real gateway, a stream that really drifts, a process that is told, a restart, and the end."""

import base64
import contextlib
import hashlib
import hmac
import http.server
import json
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import tritonclient.http
import yaml
from conftest import MODELS, ROOT, Server, eventually, running, tidegate
from test_monitor import ROWS, SEED, admin, flowers, repository, send  # noqa: F401

# Of a dispatch to GitHub, which takes ten.
PAYLOAD = {"event", "state", "model", "version", "arm", "kind", "about", "severity", "summary", "detail"}
# What the model takes at once.
BATCH = 30
SECRET = "0123456789abcdef0123456789abcdef"
FAST = {"TIDEGATE_MONITOR_INTERVAL_S": "1", "OPS_KEY": SECRET, "CI_TOKEN": "ghp_" + SECRET}


class Recorder(http.server.BaseHTTPRequestHandler):
    """Writes down what it gets, and answers with the server's status."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, dict(self.headers.items()), body))
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def recorder(status):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.got, server.status = [], status
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def verified(headers, body):
    """As docs/rollouts.md tells receivers to do it."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    want = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    return hmac.compare_digest(headers["webhook-signature"], f"v1,{want}")


def events(server):
    """Those of drift, as their receiver reads them."""
    read = []
    for _, headers, body in server.got:
        headers = {name.lower(): value for name, value in headers.items()}
        assert headers["content-type"] == "application/cloudevents+json; charset=utf-8"
        assert verified(headers, body)
        event = json.loads(body)
        assert event["id"] == headers["webhook-id"]
        read.append(event)
    return read


def config(ops, ci):
    return f"""
[alerts]
for_s = 2
keep_firing_for_s = 2
[[alerts.receivers]]
name = "ops"
kind = "cloudevents"
url = "{ops.url}/in"
secret = "env:OPS_KEY"
kinds = ["drift"]
[[alerts.receivers]]
name = "retrain"
kind = "github"
url = "{ci.url}"
repository = "acme/iris"
secret = "env:CI_TOKEN"
models = ["ir*"]
kinds = ["drift", "alarm", "quality"]
"""


def command(server, *arguments, code=0):
    return tidegate(*arguments, "--address", f"http://{server.admin}", "--state-dir", server.state, code=code)


def firing(server, kind="drift"):
    """The alert of this kind that fires and that somebody was planned to be told of."""
    status, body = admin(server, "/alerts")
    assert status == 200, body
    found = [each for each in body["alerts"] if each["state"] == "firing" and each["kind"] == kind]
    return next((each for each in found if each["deliveries"]), None)


def stable_rows(server):
    found = next(each for each in admin(server, "/models/iris/drift")[1]["versions"] if each["version"] == "2")
    return sum(each["rows"] for each in found["arms"])


def metric(server, name, **labels):
    """Value of a series; `None` while there is none."""
    text = server.get("/metrics", server.metrics)[1].decode()
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if found and found[1] == name and dict(re.findall(r'(\w+)="([^"]*)"', found[2])) == labels:
            return float(found[3])
    return None


def test_a_drift_is_told_survives_a_restart_and_is_resolved(repository, tmp_path):  # noqa: F811
    with recorder(204) as ops, recorder(204) as ci:
        toml = config(ops, ci)
        with running(repository, tmp_path / "gate", config=toml, environment=FAST) as server:
            send(server, flowers(ROWS, SEED + 2))
            moved = flowers(2 * ROWS, SEED + 1, shift=1.0)
            send(server, moved)
            eventually(lambda: len(ops.got) == 1 and len(ci.got) == 1)
            [event] = events(ops)
            assert event["type"] == "dev.tidegate.alert.firing" and event["source"] == "/tidegate"
            data = event["data"]
            assert (data["model"], data["version"], data["arm"]) == ("iris", "2", "stable")
            assert (data["kind"], data["about"], data["severity"]) == ("drift", "inputs", "warning")
            strongest = data["detail"]["features"][0]
            assert strongest["feature"] == "features[0]", data["detail"]
            assert strongest["scores"]["cell_psi"] >= strongest["limits"]["cell_psi"] > 0
            assert data["detail"]["rows"] >= 500 and 0 <= strongest["p_value"] < 0.05
            # The pipeline: one run, though the drift and the alarm fire.
            path, headers, body = ci.got[0]
            assert path == "/repos/acme/iris/dispatches" and headers["authorization"] == f"Bearer {FAST['CI_TOKEN']}"
            dispatch = json.loads(body)
            assert dispatch["event_type"] == "tidegate-alert" and set(dispatch["client_payload"]) == PAYLOAD
            assert dispatch["client_payload"]["model"] == "iris"
            alert, alarm = (eventually(lambda kind=kind: firing(server, kind)) for kind in ("drift", "alarm"))
            eventually(lambda: firing(server)["deliveries"]["ops"]["firing"]["state"] == "delivered")
            started = {"delivered", "waiting"}
            both = lambda: {firing(server, kind)["deliveries"]["retrain"]["firing"]["state"] for kind in ("drift", "alarm")}  # noqa: E731
            eventually(lambda: both() == started)
            assert alarm["id"] != alert["id"] == data["alert"]
            series = {"model": "iris", "version": "2", "arm": "stable", "kind": "drift"}
            assert metric(server, "tidegate_alerts_firing", **series) == 1
            sent = {"receiver": "ops", "outcome": "delivered"}
            assert metric(server, "tidegate_alert_deliveries_total", **sent) == 1
            text = command(server, "alerts", "list")
            assert "firing" in text and "drifted: features[0]" in text and "ops delivered" in text, text
        with running(repository, tmp_path / "gate", config=toml, environment=FAST) as server:
            # Judged again, from the same windows, and told to nobody.
            eventually(lambda: (found := admin(server, "/models/iris/drift")[1]["versions"]) and found[-1]["arms"])
            send(server, moved[:40])
            eventually(lambda: stable_rows(server) > 3 * ROWS)
            assert firing(server)["id"] == alert["id"]
            # Many more rows as they used to be, and the hour looks again as it did.
            raw(server, flowers(60 * ROWS, SEED + 3)).close()
            eventually(lambda: len(ops.got) == 2)
            assert firing(server) is None and len(ci.got) == 1
            over = events(ops)[1]
            assert over["type"] == "dev.tidegate.alert.resolved" and over["data"]["alert"] == alert["id"]
            assert over["data"]["resolution"] and over["data"]["resolved_at"]
            assert metric(server, "tidegate_alerts_firing", **series) is None
            status, journal = admin(server, "/journal?action=alert.&limit=100")
            actions = [event["action"] for event in journal["events"] if event["actor"] == "alert-watcher"]
            drift = [event["action"] for event in journal["events"] if event["subject"] == alert["id"]]
            assert drift.count("alert.fire") == drift.count("alert.resolve") == 1 and "alert.tell" in drift, actions
            answers = json.dumps([admin(server, "/alerts")[1], journal])
            log = server.log.read_text()
            for secret in (SECRET, FAST["CI_TOKEN"]):
                assert secret not in answers and secret not in log
            for address in (ops.url, ci.url):
                assert address not in answers


def test_what_was_not_told_is_told_after_kill_9_by_the_same_id(repository, tmp_path):  # noqa: F811
    with recorder(503) as ops, recorder(204) as ci:
        toml = config(ops, ci)
        server = Server(repository, tmp_path / "gate", config=toml, environment=FAST)
        send(server, flowers(2 * ROWS, SEED + 1, shift=1.0))
        eventually(lambda: len(ops.got) >= 1 and len(ci.got) == 1)
        eventually(lambda: firing(server)["deliveries"]["retrain"]["firing"]["state"] != "pending")
        server.process.kill()
        server.process.wait()
        ops.status = 204
        with running(repository, tmp_path / "gate", config=toml, environment=FAST) as server:
            eventually(lambda: firing(server)["deliveries"]["ops"]["firing"]["state"] == "delivered")
            assert len({event["id"] for event in events(ops)}) == 1
            # The pipeline was told before.
            assert len(ci.got) == 1


def test_a_test_a_silence_and_what_is_odd(repository, tmp_path):  # noqa: F811
    """NaN in a tenth of the rows, while the model is silent: told when the silence ends."""
    with recorder(204) as ops, recorder(422) as ci:
        toml = config(ops, ci).replace('kinds = ["drift"]', 'kinds = ["data_quality"]')
        with running(repository, tmp_path / "gate", config=toml, environment=FAST) as server:
            assert "ops delivered" in command(server, "alerts", "test", "ops", "--reason", "is it there?")
            [event] = events(ops)
            assert event["type"] == "dev.tidegate.alert.test" and event["data"]["model"] == "test"
            refused = command(server, "alerts", "test", "retrain", code=1)
            assert "refused" in refused and "status 422" in refused, refused
            assert "not configured" in command(server, "alerts", "test", "nobody", code=1)
            assert "a reason" in command(server, "alerts", "silence", "iris", "--hours", "1", code=1)
            text = command(server, "alerts", "silence", "iris", "--hours", "1", "--reason", "we know")
            assert "iris is silent until" in text
            rows = flowers(2 * ROWS, SEED + 2)
            rows[::10, 1] = np.nan
            # JSON has no NaN.
            raw(server, rows).close()
            found = eventually(lambda: odd(server))
            assert found["about"] == "nan" and found["detail"]["features"][0]["feature"] == "features[1]", found
            share = found["detail"]["features"][0]["scores"]["nan"]
            assert share == pytest.approx(0.1) and found["detail"]["features"][0]["low"] > 0.01
            assert found["deliveries"]["ops"]["firing"]["state"] == "waiting", found
            assert "we know" in command(server, "alerts", "list")
            assert "silent no more" in command(server, "alerts", "unsilence", "iris")
            eventually(lambda: len(ops.got) == 2)
            assert events(ops)[1]["data"]["kind"] == "data_quality"
            actions = [event["action"] for event in admin(server, "/journal?limit=100")[1]["events"]]
            assert {"alert.test", "silence.put", "silence.delete", "alert.fire", "alert.tell"} <= set(actions)


def raw(server, rows):
    """Sends rows as they are, by the binary extension."""
    client = tritonclient.http.InferenceServerClient(server.http)
    for at in range(0, len(rows), BATCH):
        part = tritonclient.http.InferInput("features", list(rows[at : at + BATCH].shape), "FP32")
        part.set_data_from_numpy(rows[at : at + BATCH])
        client.infer("iris", [part])
    return client


def odd(server):
    found = [each for each in admin(server, "/alerts")[1]["alerts"] if each["kind"] == "data_quality"]
    return next((each for each in found if each["deliveries"].get("ops")), None)


def test_labels_beyond_a_limit_are_told(tmp_path):
    """Every label says that it was the first class: two of three are wrong."""
    with recorder(204) as ops, recorder(204) as ci:
        toml = config(ops, ci).replace('kinds = ["drift"]', 'kinds = ["quality"]')
        toml += '\n[[alerts.quality]]\nmodels = ["iris"]\nmetric = "accuracy"\nmin = 0.9\n'
        with running(MODELS, tmp_path / "gate", config=toml, environment=FAST) as server:
            rows = flowers(600, SEED)
            items = []
            for at in range(0, len(rows), BATCH):
                part = rows[at : at + BATCH]
                tensor = {"name": "features", "datatype": "FP32", "shape": list(part.shape), "data": part.ravel().tolist()}
                status, headers, body = server.post("/v2/models/iris/infer", {"inputs": [tensor]})
                assert status == 200, body
                items.append({"prediction_id": headers["tidegate-prediction-id"], "label": [0] * len(part)})
            status, _, body = server.post("/v2/models/iris/feedback", items)
            assert status == 202, body
            eventually(lambda: len(ops.got) == 1 and len(ci.got) == 1)
            data = events(ops)[0]["data"]
            assert (data["kind"], data["about"], data["arm"], data["severity"]) == ("quality", "accuracy", "all", "critical")
            metric_of = data["detail"]["metric"]
            assert metric_of["value"] < 0.5 and metric_of["high"] < metric_of["limit"] == 0.9, metric_of
            assert json.loads(ci.got[0][2])["client_payload"]["kind"] == "quality"


def test_a_drift_brings_a_version_that_waits_for_approval(repository, tmp_path):  # noqa: F811
    """The walk of docs/alerts.md: the pipeline is told, brings a version, which is held until somebody approves it."""
    with recorder(204) as ops, recorder(204) as ci:
        toml = config(ops, ci) + "\n[release]\napprovals_required = 1\n"
        with running(repository, tmp_path / "gate", config=toml, environment=FAST, wait=False) as server:
            state = lambda number: version_of(server, number)["state"]  # noqa: E731
            eventually(lambda: listening(server))
            for number in ("1", "2"):
                eventually(lambda number=number: state(number) == "held")
                command(server, "approvals", "approve", "iris", number, "--comment", "as it was")
            server.wait_ready()
            send(server, flowers(2 * ROWS, SEED + 1, shift=1.0))
            dispatch = json.loads(eventually(lambda: ci.got and ci.got[0][2]))
            model = dispatch["client_payload"]["model"]
            # What a workflow would do: train, and upload, the list of sums last.
            new = repository / model / "3"
            new.mkdir()
            shutil.copy(repository / model / "1" / "model.onnx", new)
            (new / "lineage.toml").write_text(f'owner = "retrain"\ntraining_run = "{dispatch["client_payload"]["event"]}"\n')
            names = ("lineage.toml", "model.onnx")
            sums = [f"{hashlib.sha256((new / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
            (new / "SHA256SUMS").write_text("".join(sums))
            eventually(lambda: state("3") == "held")
            command(server, "approvals", "approve", "iris", "3", "--comment", "looked at")
            eventually(lambda: state("3") == "ready")
            eventually(lambda: firing(server))
            # The version that drifted goes, and its alert with it.
            command(server, "traffic", "set", "iris", "3=100", "--reason", "retrained")
            command(server, "versions", "unload", "iris", "2", "--reason", "it drifted")
            over = eventually(lambda: [event for event in events(ops) if event["type"].endswith(".resolved")])[0]
            assert "the version" in over["data"]["resolution"], over


def listening(server):
    with contextlib.suppress(OSError):
        return server.get("/admin/v1/health", server.admin)[0] == 200


def version_of(server, number):
    _, body = admin(server, "/models/iris")
    return next((each for each in body.get("versions", []) if each["version"] == number), {"state": None})


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "alerts.md").read_text(), re.DOTALL)


def test_the_pages_workflow_and_its_names_are_right(tmp_path):
    [text] = blocks("yaml")
    workflow = yaml.safe_load(text)
    steps = workflow["jobs"]["train"]["steps"]
    assert len(steps) == 5 and workflow["permissions"]["contents"] == "read"
    for step in steps:
        # Nothing that came with an event is text of a script.
        assert "${{" not in step.get("run", "")
        subprocess.run(["bash", "-n"], input=step.get("run", ""), text=True, check=True)
    used = set(re.findall(r"client_payload\.(\w+)", text))
    assert {"event", "model"} <= used <= PAYLOAD, used


def test_the_pages_configurations_pass_check_config(tmp_path):
    assert len(blocks("toml")) == 2
    for at, block in enumerate(blocks("toml")):
        path = tmp_path / f"{at}.toml"
        path.write_text(block)
        # The bucket of the second is nobody's.
        tidegate("check-config", "--config", path, "--model-repository", MODELS)
