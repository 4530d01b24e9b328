"""The admin API and the commands over it, against a running gateway; its document, by schemathesis."""

import contextlib
import http.client
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.http as triton_http
from conftest import BINARY, HOST, ROOT, running
from test_repository import write

PREFIX = "/admin/v1"
WITHIN_S = 60
SCHEMATHESIS = ROOT / "tests" / ".venv" / "schemathesis" / "bin" / "schemathesis"
REVOKED_WITHIN_S = 5

# Contract, section 4: what scripts may rely on.
CONTRACT = [
    *("GET /models", "GET /models/{model}"),
    *("POST /models/{model}/versions/{version}:load", "POST /models/{model}/versions/{version}:unload"),
    "PUT /models/{model}/labels/{label}",
    *("GET /models/{model}/traffic", "PUT /models/{model}/traffic"),
    *("POST /models/{model}/rollouts", "GET /models/{model}/rollouts", "GET /models/{model}/rollouts/{rollout}"),
    *(f"POST /models/{{model}}/rollouts/{{rollout}}:{verb}" for verb in ("pause", "resume", "promote", "abort")),
    "POST /models/{model}:rollback",
    *(f"{method} /models/{{model}}/versions/{{version}}/approvals" for method in ("GET", "POST")),
    *("GET /models/{model}/shadow", "GET /models/{model}/drift", "GET /models/{model}/quality"),
    *("GET /journal", "GET /events", "POST /drain", "POST /reload", "GET /predictions/{id}", "GET /audit/stats"),
]


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        """Of a refusal, whose form is checked."""
        assert self.headers["content-type"] == "application/problem+json", self.body
        problem = self.json
        assert problem["status"] == self.status and problem["request_id"] == self.headers["x-request-id"]
        for key in ("type", "title", "detail", "hint"):
            assert problem[key], problem
        return problem["code"]


class Admin:
    """A caller with a token."""

    def __init__(self, address, token):
        self.address, self.token = address, token

    def call(self, method, path, body=None, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token:
            headers.setdefault("authorization", f"Bearer {self.token}")
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers.setdefault("content-type", "application/json")
        request = urllib.request.Request(f"http://{self.address}{PREFIX}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def get(self, path, **headers):
        return self.call("GET", path, **headers)

    def ok(self, method, path, body=None, **headers):
        answer = self.call(method, path, body, **headers)
        assert answer.status in (200, 201, 202), answer.body
        return answer.json


class Gate:
    """A gateway with models that multiply: version `v` of each by `v`."""

    def __init__(self, server):
        self.server = server
        self.token = (server.state / "admin-token").read_text().strip()
        self.admin = Admin(server.admin, self.token)
        eventually(lambda: self.states() == {"1": "ready", "2": "ready", "3": "ready"})

    def states(self):
        return {each["version"]: each["state"] for each in self.admin.ok("GET", "/models/scale")["versions"]}

    def key(self, role, *models):
        """A caller with a new key; a running gateway takes it over by itself."""
        grants = [f"--models={model}" for model in models]
        name = f"{role}-{time.monotonic_ns()}"
        made = tidegate("keys", "create", "--name", name, "--role", role, *grants, "--state-dir", self.server.state)
        assert made.returncode == 0, made.stderr
        caller = Admin(self.server.admin, made.stdout.strip())
        caller.name = name
        eventually(lambda: caller.get("/models").status == 200, REVOKED_WITHIN_S)
        return caller

    def cli(self, *arguments, stdin=None, **options):
        places = ("--address", f"http://{self.server.admin}", "--state-dir", str(self.server.state))
        return tidegate(*arguments, *places, stdin=stdin, **options)

    def factor(self, model="scale", headers=None):
        """What a request without a version is multiplied by."""
        with contextlib.closing(triton_http.InferenceServerClient(self.server.http)) as client:
            tensor = triton_http.InferInput("x", [1, 4], "FP32")
            tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
            return int(client.infer(model, [tensor], headers=headers).as_numpy("y")[0, 0])


def tidegate(*arguments, stdin=None, env=None):
    command = [str(BINARY), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=WITHIN_S, env=env)


def eventually(what, within_s=WITHIN_S):
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def no_token_around(monkeypatch):
    monkeypatch.delenv("TIDEGATE_ADMIN_TOKEN", raising=False)


def models(folder):
    repository = folder / "models"
    write(repository, "scale", {1: 1.0, 2: 2.0, 3: 3.0}, config='version_policy { all {} }\nmax_batch_size: 8')
    write(repository, "other", {1: 1.0})
    # Nobody is still writing them, so that the start does not wait.
    long_ago = time.time() - 3600
    for path in [repository, *repository.rglob("*")]:
        os.utime(path, (long_ago, long_ago))
    return repository


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("admin")
    with running(models(folder), folder) as server:
        yield Gate(server)


@pytest.fixture
def gate(started):
    """The gateway, with no table, no labels, and every version loaded."""
    yield started
    for rollout in started.admin.ok("GET", "/models/scale/rollouts")["rollouts"]:
        if not rollout["ended_at"]:
            started.admin.ok("POST", f"/models/scale/rollouts/{rollout['id']}:abort")
    for label in started.admin.ok("GET", "/models/scale/labels")["labels"]:
        started.admin.ok("DELETE", f"/models/scale/labels/{label}")
    for model in ("scale", "other"):
        if started.admin.ok("GET", f"/models/{model}/traffic")["follow"] == "traffic":
            started.admin.ok("DELETE", f"/models/{model}/traffic")
    for version in ("1", "2", "3"):
        if started.states()[version] != "ready":
            started.admin.ok("POST", f"/models/scale/versions/{version}:load")


# Credentials


def test_strangers_get_nothing(gate):
    document = gate.admin.ok("GET", "/openapi.json")
    stranger = Admin(gate.server.admin, None)
    assert stranger.ok("GET", "/health")["status"] == "ok"
    probes = 0
    for path, item in document["paths"].items():
        path = re.sub(r"\{\w+\}", "1", path)
        for method in item:
            if path in ("/health", "/webhooks/mlflow"):
                continue
            for credential in (None, "", "Bearer", "Bearer x", "Basic YTpi", f"Bearer {gate.token}x"):
                headers = {"authorization": credential} if credential is not None else {}
                answer = stranger.call(method.upper(), path, **headers)
                assert (answer.status, answer.code) == (401, "unauthenticated"), path
                assert answer.headers["www-authenticate"].startswith("Bearer")
                probes += 1
    for path in ("/none", "/models/", "//models", "/models?token=" + gate.token, "/models/scale/~rollback"):
        assert stranger.get(path).status == 401
    assert stranger.get("/models", cookie=f"token={gate.token}").status == 401
    print(f"{probes} probes without a credential, 0 answered")


def test_the_first_token_is_for_its_owner_only(gate):
    path = gate.server.state / "admin-token"
    assert path.stat().st_mode & 0o777 == 0o600
    log = gate.server.log.read_text()
    assert str(path) in log and gate.token not in log


def test_roles_and_models(gate):
    viewer, deployer = gate.key("viewer"), gate.key("deployer", "oth*")
    assert [each["name"] for each in viewer.ok("GET", "/models")["models"]] == ["other", "scale"]
    assert [each["name"] for each in deployer.ok("GET", "/models")["models"]] == ["other"]
    table = {"weights": {"1": 1}}
    denied = viewer.call("PUT", "/models/scale/traffic", table)
    assert (denied.status, denied.code) == (403, "forbidden")
    assert deployer.call("PUT", "/models/other/traffic", table).status == 200
    hidden = deployer.call("PUT", "/models/scale/traffic", table)
    absent = deployer.call("PUT", "/models/nothing/traffic", table)
    assert (hidden.status, absent.status) == (404, 404)
    assert hidden.json["detail"].replace("scale", "nothing") == absent.json["detail"]
    assert viewer.get("/journal").status == 403 and deployer.get("/journal").status == 200
    assert {event.get("model") for event in deployer.ok("GET", "/journal")["events"]} <= {"other"}
    for path in ("/drain", "/reload"):
        assert deployer.call("POST", path).status == 403
    refused = gate.admin.ok("GET", f"/journal?outcome=refused&actor={viewer.name}")["events"]
    assert {event["action"] for event in refused} == {"traffic.put", "journal.get"}


def test_a_revoked_key_is_out_within_seconds(gate):
    viewer = gate.key("viewer")
    key_id = viewer.token.removeprefix("tg_").split(".")[0]
    revoked = tidegate("keys", "revoke", key_id, "--state-dir", gate.server.state)
    assert revoked.returncode == 0, revoked.stderr
    eventually(lambda: viewer.get("/models").status == 401, REVOKED_WITHIN_S)


# Changes


def test_a_change_is_in_force_when_it_is_answered(gate):
    for at in range(60):
        version = at % 3 + 1
        view = gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {str(version): 1}, "reason": f"turn {at}"})
        assert view["traffic"]["weights"] == {str(version): 1} and view["changed"]["reason"] == f"turn {at}"
        assert gate.factor() == version
    back = gate.admin.ok("POST", "/models/scale:rollback", tidegate_reason="enough")
    assert gate.factor() == int(next(iter(back["traffic"]["weights"])))
    gate.admin.ok("DELETE", "/models/scale/traffic", tidegate_reason="away")
    assert gate.factor() == 3, "the latest"
    gate.admin.ok("PUT", "/models/scale/labels/stable", {"version": "1"})
    assert gate.factor() == 1, "the label decides"


def test_rules_and_sticky_keys(gate):
    table = {
        "weights": {"1": 50, "2": 50},
        "sticky": {"header": "x-user"},
        "rules": [{"name": "beta", "header": "x-beta", "equals": "1", "version": "3"}],
    }
    gate.admin.ok("PUT", "/models/scale/traffic", table)
    assert gate.factor(headers={"x-beta": "1"}) == 3
    seen = {user: gate.factor(headers={"x-user": user}) for user in map(str, range(20))}
    assert set(seen.values()) == {1, 2}
    for user, version in seen.items():
        assert gate.factor(headers={"x-user": user}) == version, "the same user, the same version"


def test_two_writers(gate):
    first = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"1": 1}})
    tag = first.headers["etag"]
    won = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"2": 1}}, if_match=tag)
    lost = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"3": 1}}, if_match=tag)
    assert (won.status, lost.status, lost.code) == (200, 412, "stale")
    assert gate.factor() == 2
    present = won.headers["etag"]
    for form in ("*", "{}", '"0", {}'):
        right = form.format(present)
        answer = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"2": 1}}, if_match=right)
        assert answer.status == 200, right
        present = answer.headers["etag"]
    for wrong, status in ((f"W/{present}", 412), ('"x", "y"', 412), ("7", 400)):
        assert gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"2": 1}}, if_match=wrong).status == status
    unchanged = gate.admin.get("/models/scale/traffic", if_none_match=present)
    assert (unchanged.status, unchanged.body) == (304, b"")


def test_a_refused_rollback_changes_nothing(gate):
    gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"1": 1}})
    gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"2": 1}})
    refused = gate.admin.call("POST", "/models/scale:rollback", if_match='"0"')
    assert (refused.status, refused.code) == (412, "stale")
    assert {gate.factor() for _ in range(20)} == {2}
    assert gate.admin.ok("GET", "/models/scale/traffic")["traffic"]["weights"] == {"2": 1}
    gate.admin.ok("POST", "/models/scale:rollback")
    assert gate.factor() == 1


def test_wrong_tables_say_everything_at_once(gate):
    cases = [
        ({"weights": {"1": 1}, "wieghts": {}}, "wieghts"),
        ({"weights": {"1": 1}, "rules": [{"name": "a", "header": "h", "equal": "x", "version": "1"}]}, "rules[0].equal"),
        ({"weights": {"1": -1}}, "weights.1"),
        ({"weights": {"1": 0}}, "weights"),
        ({"weights": {}}, "weights"),
        (b'{"weights": {"1": 1, "1": 2}}', "duplicate"),
        (b'{"weights": {"1": 1e400}}', ""),
        (b'{"weights": {"1": NaN}}', ""),
        (b"[" * 1000, ""),
        (b"", "weights"),
    ]
    for body, said in cases:
        answer = gate.admin.call("PUT", "/models/scale/traffic", body)
        assert (answer.status, answer.code) == (400, "invalid"), body
        assert said in answer.json["problems"][0], answer.json
    many = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"1": -1, "2": -1}})
    assert len(many.json["problems"]) == 2
    missing = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"9": 1}})
    assert missing.status in (400, 409) and "9" in missing.json["detail"]
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        answer = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"1": 1}}, content_type=content_type)
        assert (answer.status, answer.code) == (415, "unsupported_media")
    assert gate.admin.call("PUT", "/models/scale/traffic", b" " * (1 << 20) + b"{}").status == 413
    assert gate.admin.ok("GET", "/models/scale/traffic")["follow"] == "latest", "nothing was changed"


def test_load_and_unload(gate):
    busy = gate.admin.call("POST", "/models/scale/versions/3:unload")
    assert (busy.status, busy.code) == (409, "conflict"), "it takes traffic"
    gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"1": 1}})
    tag = gate.admin.get("/models/scale/versions/3").headers["etag"]
    for verb in ("load", "unload"):
        stale = gate.admin.call("POST", f"/models/scale/versions/3:{verb}", if_match='"x"')
        assert (stale.status, stale.code) == (412, "stale"), verb
    gone = gate.admin.ok("POST", "/models/scale/versions/3:unload", {"reason": "not needed"}, if_match=tag)
    assert gone["state"] == "retired"
    back = gate.admin.ok("POST", "/models/scale/versions/3:load")
    assert back["state"] == "ready"
    words = [step["state"] for step in gate.admin.ok("GET", "/models/scale/versions/3")["history"]]
    assert words[-1] == "ready" and "retired" in words
    assert gate.admin.call("POST", "/models/scale/versions/99:load").status in (404, 409)


def test_browsers_have_no_effect(gate):
    before = gate.admin.ok("GET", "/models/scale/traffic")
    cases = [
        {"host": "evil.example"},
        {"host": f"{gate.server.admin}.evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"origin": "http://evil.example", "content_type": "text/plain"},
        {"origin": "http://evil.example", "upgrade": "websocket", "connection": "upgrade"},
    ]
    for headers in cases:
        answer = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"1": 1}}, **headers)
        assert answer.status in (400, 403, 421), headers
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    preflight = gate.admin.call("OPTIONS", "/models/scale/traffic", origin="http://evil.example")
    assert preflight.status == 403
    assert gate.admin.ok("GET", "/models/scale/traffic") == before


# Journal and events


def test_the_journal(gate):
    gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"1": 1}, "reason": "because"}, x_request_id="my-id")
    gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"99": 1}})
    refused, done = gate.admin.ok("GET", "/journal?model=scale&action=traffic.put&limit=2")["events"]
    assert (done["reason"], done["request_id"], done["actor"], done["outcome"]) == ("because", "my-id", "admin-token", "done")
    assert done["after"] and refused["outcome"] == "refused" and refused["detail"]
    seqs, cursor = [], None
    while True:
        before = f"&before={cursor}" if cursor else ""
        page = gate.admin.ok("GET", f"/journal?limit=3{before}")
        seqs += [event["seq"] for event in page["events"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seqs == sorted(set(seqs), reverse=True)
    whole = [event["seq"] for event in gate.admin.ok("GET", "/journal?after=0&limit=500")["events"]]
    assert whole == seqs[::-1][:500]
    for wrong in ("limit=0", "limit=501", "nothing=1", "outcome=maybe", "after=x"):
        assert gate.admin.get(f"/journal?{wrong}").status == 400


class Events:
    """A stream of server-sent events."""

    def __init__(self, caller, last=None):
        host, port = caller.address.split(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=WITHIN_S)
        headers = {"authorization": f"Bearer {caller.token}"}
        if last is not None:
            headers["last-event-id"] = str(last)
        self.connection.request("GET", f"{PREFIX}/events", headers=headers)
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200, self.answer.read()

    def __iter__(self):
        event = {}
        for line in self.answer:
            line = line.decode().rstrip("\n")
            if ": " in line and not line.startswith(":"):
                key, value = line.split(": ", 1)
                event[key] = value
            elif not line:
                if "data" in event:
                    yield event
                event = {}


def test_events_follow_the_journal(gate):
    start = gate.admin.ok("GET", "/journal?limit=1")["events"][0]["seq"]
    for version in (1, 2, 3):
        gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {str(version): 1}})
    events = iter(Events(gate.admin, start))
    missed = list(itertools.islice(events, 3))
    assert [event["event"] for event in missed] == ["traffic.put"] * 3
    gate.admin.ok("POST", "/models/scale:rollback", {"reason": "live"})
    live = next(events)
    assert live["event"] == "traffic.rollback" and json.loads(live["data"])["reason"] == "live"
    again = list(itertools.islice(Events(gate.admin, missed[1]["id"]), 2))
    assert [event["id"] for event in again] == [missed[2]["id"], live["id"]], "from the cursor, nothing twice"
    narrow = gate.key("viewer", "other")
    seen = iter(Events(narrow))
    gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"1": 1}})
    gate.admin.ok("PUT", "/models/other/traffic", {"weights": {"1": 1}})
    assert json.loads(next(seen)["data"])["model"] == "other"


# The document


def test_the_document_has_what_the_contract_has(gate):
    document = gate.admin.ok("GET", "/openapi.json")
    assert document["openapi"] == "3.1.0"
    operations = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    assert set(CONTRACT) <= operations, set(CONTRACT) - operations


def test_schemathesis(tmp_path):
    """What the document allows is answered as it says, and what it does not allow is refused, never with a 500."""
    assert SCHEMATHESIS.exists(), "make test-clients installs it"
    with running(models(tmp_path), tmp_path) as server:
        gate = Gate(server)
        gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"1": 1}})
        rollout = gate.admin.ok("POST", "/models/scale/rollouts", {"candidate": "2", "dry_run": True})["id"]
        # Names of what is there, so that what is behind them is reached.
        names = {"model": "scale", "version": "2", "label": "canary", "rollout": rollout}
        lines = [f'"path.{name}" = "{value}"' for name, value in names.items()]
        (tmp_path / "schemathesis.toml").write_text("\n".join(["[parameters]", *lines]))
        command = [
            *(str(SCHEMATHESIS), "run", f"http://{server.admin}{PREFIX}/openapi.json"),
            *("--header", f"Authorization: Bearer {gate.token}", "--checks", "all", "--seed", "1", "--max-examples", "20"),
            # Whether versions and weights exist is for no schema to say; a stream of events has no end.
            *("--exclude-checks", "positive_data_acceptance", "--exclude-path", "/events", "--exclude-path", "/drain"),
            *("--suppress-health-check", "all", "--workers", "1", "--request-timeout", "30", "--no-color"),
        ]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=540)
        assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
        print(*re.findall(r"^  \d+ generated.*$", run.stdout, re.MULTILINE))
        assert gate.factor() in (1, 2, 3), "and it serves as before"
        assert "panicked" not in server.log.read_text()


# Commands


def test_traffic_from_a_terminal(gate, tmp_path):
    run = gate.cli("traffic", "set", "scale", "1=95", "2=5", "--sticky-header", "x-user", "--shadow", "3=10",
                   "--rule", "beta:x-beta==1:2", "--reason", "a canary")  # fmt: skip
    assert run.returncode == 0, run.stderr
    for said in ("95 %", "5 %", "sticky: header x-user", "rule beta: x-beta == '1' gets version 2", "shadow: version 3"):
        assert said in run.stdout, run.stdout
    got = gate.cli("traffic", "get", "scale", "--json")
    table = json.loads(got.stdout)["traffic"]
    assert table["weights"] == {"1": 95, "2": 5} and table["shadows"][0]["percent"] == 10
    kept = gate.cli("traffic", "set", "scale", "1=90", "2=10", "--keep")
    assert kept.returncode == 0 and "sticky: header x-user" in kept.stdout
    (tmp_path / "table.json").write_text(json.dumps({"weights": {"3": 1}}))
    for place, stdin in ((str(tmp_path / "table.json"), None), ("-", '{"weights": {"3": 1}}')):
        run = gate.cli("traffic", "set", "scale", "--file", place, stdin=stdin)
        assert run.returncode == 0 and gate.factor() == 3, run.stderr
    back = gate.cli("traffic", "rollback", "scale", "--reason", "errors")
    assert back.returncode == 0 and gate.factor() in (1, 2, 3), back.stderr
    assert gate.cli("traffic", "shadow", "scale").returncode == 0
    assert gate.cli("traffic", "clear", "scale").returncode == 0
    journalled = gate.cli("journal", "--model", "scale", "--action", "traffic.", "--limit", "5")
    assert "traffic.rollback" in journalled.stdout and "errors" in journalled.stdout, journalled.stdout


def test_versions_and_labels_from_a_terminal(gate):
    listed = gate.cli("versions", "list")
    assert listed.returncode == 0, listed.stderr
    rows = [line.split() for line in listed.stdout.splitlines()]
    assert ["scale", "1", "ready"] in [row[:3] for row in rows]
    assert gate.cli("labels", "set", "scale", "stable", "1", "--reason", "why").returncode == 0
    assert gate.cli("labels", "list", "scale").stdout.split() == ["label", "version", "stable", "1"]
    unloaded = gate.cli("versions", "unload", "scale", "3")
    assert unloaded.returncode == 0 and "retired" in unloaded.stdout, unloaded.stderr
    loaded = gate.cli("versions", "load", "scale", "3", "--json")
    assert json.loads(loaded.stdout)["state"] == "ready"
    shown = gate.cli("versions", "show", "scale", "3")
    assert "digest" in shown.stdout and "retired" in shown.stdout
    refused = gate.cli("versions", "unload", "scale", "1")
    assert refused.returncode == 1 and "what to do: " in refused.stderr and not refused.stdout
    assert gate.cli("labels", "delete", "scale", "stable").returncode == 0


def test_approvals_from_a_terminal(gate):
    run = gate.cli("approvals", "approve", "scale", "2", "--comment", "looked at")
    assert run.returncode == 0 and "looked at" in run.stdout, run.stderr
    assert gate.cli("approvals", "reject", "scale", "2", "--comment", "no").returncode == 0
    listed = json.loads(gate.cli("approvals", "list", "scale", "2", "--json").stdout)
    assert [each["decision"] for each in listed["approvals"]][-1] == "reject"


def test_rollouts_from_a_terminal(gate):
    gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"1": 1}})
    steps = ("--steps", "50,100", "--bake", "3600", "--reason", "new data")
    begun = gate.cli("rollout", "start", "scale", "2", *steps)
    assert begun.returncode == 0 and "step 1 of 2" in begun.stdout, begun.stderr
    assert gate.cli("rollout", "start", "scale", "3", *steps).returncode == 1, "one at a time"
    paused = gate.cli("rollout", "pause", "scale", "--reason", "lunch")
    assert "paused at step 1 of 2" in paused.stdout, paused.stderr
    assert gate.cli("rollout", "resume", "scale").returncode == 0
    assert "lunch" in gate.cli("rollout", "status", "scale").stdout
    rollout = json.loads(gate.cli("rollout", "list", "scale", "--json").stdout)["rollouts"][0]
    assert (rollout["candidate"], rollout["weight"]) == ("2", 50)

    places = ("--address", f"http://{gate.server.admin}", "--state-dir", str(gate.server.state))
    command = [str(BINARY), "rollout", "watch", "scale", *places]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    first = watch.stdout.readline()
    assert "step 1 of 2, weight 50 %" in first
    aborted = gate.cli("rollout", "abort", "scale", "--reason", "changed my mind")
    assert aborted.returncode == 0, aborted.stderr
    out, err = watch.communicate(timeout=WITHIN_S)
    assert watch.returncode == 1, "it did not end with a promotion"
    assert "aborted" in out and "changed my mind" in out and "\x1b" not in out, out + err
    assert gate.factor() == 1

    promoted = gate.cli("rollout", "start", "scale", "2", *steps)
    assert promoted.returncode == 0, promoted.stderr
    watch = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert json.loads(watch.stdout.readline())["state"] == "step"
    assert gate.cli("rollout", "promote", "scale", "--reason", "it is fine").returncode == 0
    out, _ = watch.communicate(timeout=WITHIN_S)
    assert watch.returncode == 0 and json.loads(out.splitlines()[-1])["state"] == "promoted"
    assert gate.factor() == 2


def test_a_dry_run_changes_nothing(gate):
    gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"1": 1}})
    begun = gate.cli("rollout", "start", "scale", "2", "--dry-run", "--json")
    assert begun.returncode == 0, begun.stderr
    assert json.loads(begun.stdout)["plan"]["dry_run"] is True
    assert {gate.factor() for _ in range(20)} == {1}
    wrong = gate.cli("rollout", "start", "scale", "--file", "-", stdin='{"candidate": "2", "steps": [{"wieght": 1}]}')
    assert wrong.returncode == 1 and "steps[0].wieght" in wrong.stderr


@pytest.mark.skipif(not shutil.which("script"), reason="needs script(1) for a terminal")
def test_watch_redraws_a_terminal(gate):
    gate.admin.ok("PUT", "/models/scale/traffic", {"weights": {"1": 1}})
    assert gate.cli("rollout", "start", "scale", "2", "--steps", "50,100", "--bake", "3600").returncode == 0
    command = f"{BINARY} rollout watch scale --address http://{gate.server.admin} --state-dir {gate.server.state}"
    terminal = subprocess.Popen(["script", "-qec", command, "/dev/null"], stdout=subprocess.PIPE, cwd=ROOT)
    time.sleep(1)
    assert gate.cli("rollout", "abort", "scale").returncode == 0
    out, _ = terminal.communicate(timeout=WITHIN_S)
    assert terminal.returncode == 1
    own, after = out.split(b"\x1b[?1049l")
    assert own.startswith(b"\x1b[?1049h") and own.count(b"\x1b[H\x1b[2J") >= 2, "drawn again"
    assert b"aborted" in after and b"\x1b" not in after, "what is left is the end"


def test_exit_codes(gate, tmp_path):
    address = ("--address", f"http://{gate.server.admin}")
    state = ("--state-dir", str(gate.server.state))
    (tmp_path / "token").write_text("tg_0123456789abcdef.wrong")
    wrong_token = ("--token-file", str(tmp_path / "token"))
    cases = [
        (1, ["traffic", "get", "nothing", *address, *state], "not_found"),
        (1, ["traffic", "get", "scale", *address, *wrong_token], "unauthenticated"),
        (1, ["traffic", "get", "scale", "--address", f"http://{HOST}:1", *state], f"{HOST}:1"),
        (1, ["traffic", "get", "scale", "--address", f"http://{gate.server.http}", *state], "not as the admin API does"),
        (2, ["traffic", "get", "scale", *address, "--state-dir", str(tmp_path)], "admin-token"),
        (2, ["traffic", "get", "scale", "--address", "here", *state], "http://127.0.0.1:8003"),
        (2, ["traffic", "set", "scale", *address, *state], "VERSION=WEIGHT"),
        (2, ["traffic", "set", "scale", "1=x", *address, *state], "1=x"),
        (2, ["rollout", "start", "scale", *address, *state], "CANDIDATE"),
        (2, ["versions"], "Usage"),
    ]
    for code, arguments, says in cases:
        run = tidegate(*arguments)
        assert run.returncode == code, f"{arguments}: {run.stdout}{run.stderr}"
        assert says in run.stderr and not run.stdout, f"{arguments}: {run.stderr}"


def test_the_token_may_be_in_the_environment(gate):
    env = {**os.environ, "TIDEGATE_ADMIN_TOKEN": gate.token}
    run = tidegate("versions", "list", "--address", f"http://{gate.server.admin}", env=env)
    assert run.returncode == 0, run.stderr
    # It is no key of the gateway's, and no reason for `--strict` to complain.
    run = tidegate("check-config", "--strict", env=env)
    assert "TIDEGATE_ADMIN_TOKEN" not in run.stdout + run.stderr


def test_every_command_has_an_example():
    groups = {
        "traffic": ["get", "set", "clear", "rollback", "shadow"],
        "versions": ["list", "show", "load", "unload"],
        "labels": ["list", "set", "delete"],
        "approvals": ["list", "approve", "reject"],
        "rollout": ["start", "status", "list", "watch", "pause", "resume", "promote", "abort"],
    }
    commands = [(group, verb) for group, verbs in groups.items() for verb in verbs] + [("journal",)]
    for command in commands:
        run = tidegate(*command, "--help")
        assert run.returncode == 0 and "Example" in run.stdout and "Exit code: 0" in run.stdout, command
        assert f"tidegate {' '.join(command)}" in run.stdout, command


# Documents


def shell_blocks():
    text = pathlib.Path(ROOT / "docs" / "admin-api.md").read_text()
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_what_the_page_shows_works(gate):
    """One block after the other, as a reader would type them."""
    script = "set -euo pipefail\n" + "\n".join(shell_blocks())
    script = script.replace("127.0.0.1:8003", gate.server.admin).replace("tidegate-state/", f"{gate.server.state}/")
    script = script.replace("models/iris", "models/scale").replace("curl -s", "curl -fs")
    # The stream has no end: a second of it.
    script = script.replace("curl -fsN", "timeout 1 curl -fsN").replace("after=0", "after=0 || [ $? = 124 ]")
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=WITHIN_S, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "canary of version 2" in run.stdout and "event: traffic.put" in run.stdout


def test_state_survives_a_kill(tmp_path):
    repository = models(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(AssertionError))
        server = stack.enter_context(running(repository, tmp_path))
        gate = Gate(server)
        answer = gate.admin.call("PUT", "/models/scale/traffic", {"weights": {"2": 1}, "reason": "before"})
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with running(repository, tmp_path) as server:
        gate = Gate(server)
        now = gate.admin.get("/models/scale/traffic")
        assert now.headers["etag"] == answer.headers["etag"] and now.json["changed"]["reason"] == "before"
        assert gate.factor() == 2


def test_drain_ends_it_as_a_signal_does(tmp_path):
    with running(models(tmp_path), tmp_path) as server:
        gate = Gate(server)
        assert gate.admin.call("POST", "/drain", {"reason": "moving"}).status == 202
        # The notice, during which it is seen as not ready, and still answers.
        assert server.get("/v2/health/ready")[0] != 200
        assert gate.admin.ok("GET", "/health")["status"] == "ok" and gate.factor() == 3
        assert server.process.wait(WITHIN_S) == 0
