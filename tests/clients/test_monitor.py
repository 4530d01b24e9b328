"""The monitor as its users meet it: a profile beside a version, traffic that moves, a restart, and a real Prometheus."""

import json
import re
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request

import numpy as np
import pyarrow.parquet
import pytest
from conftest import BINARY, HOST, MODELS, ROOT, Server, eventually, free_ports, running, tidegate
from test_drift import close, drift, evidently

SEED = 11
ROWS = 600
FAST = {"TIDEGATE_MONITOR_INTERVAL_S": "1"}


def flowers(rows, seed, shift=0.0):
    """Rows like those that iris was trained on; `shift` moves the first feature."""
    generator = np.random.default_rng(seed)
    centres = np.array([[5.0, 3.4, 1.5, 0.2], [5.9, 2.8, 4.3, 1.3], [6.6, 3.0, 5.6, 2.0]])
    made = centres[generator.integers(0, 3, rows)] + generator.normal(0, 0.3, (rows, 4))
    made[:, 0] += shift
    return made.astype(np.float32)


def send(server, rows, model="iris", batch=20):
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        tensor = {"name": "features", "datatype": "FP32", "shape": list(part.shape), "data": part.ravel().tolist()}
        status, _, body = server.post(f"/v2/models/{model}/infer", {"inputs": [tensor]})
        assert status == 200, body


def admin(server, path, body=None, method=None):
    token = (server.state / "admin-token").read_text().strip()
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{server.admin}/admin/v1{path}", data, method=method)
    request.add_header("Authorization", f"Bearer {token}")
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def version(server, number="2"):
    status, body = admin(server, "/models/iris/drift")
    assert status == 200, body
    return next((each for each in body["versions"] if each["version"] == number), None)


def stable(server, rows):
    """The arm `stable` once it has so many rows, and they are in the window."""

    def there():
        found = version(server)
        arms = [each for each in found["arms"] if each["arm"] == "stable"] if found else []
        return arms and arms[0]["rows"] == rows and arms[0]

    return eventually(there)


def window(arm, name):
    found = next(each for each in arm["windows"] if each["window"] == name)
    return found, {each["feature"]: each for each in found["features"]}


def blocks(language):
    """Of the part of docs/monitor.md that needs a gateway."""
    page = (ROOT / "docs" / "monitor.md").read_text().split("## Online")[1]
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def repository(tmp_path):
    """The repository's iris, version 2 with a profile of its own rows."""
    models = tmp_path / "models"
    shutil.copytree(MODELS / "iris", models / "iris")
    train = tmp_path / "train.csv"
    rows = flowers(ROWS, SEED)
    names = ",".join(f"features[{at}]" for at in range(4))
    train.write_text("\n".join([names, *(",".join(map(repr, map(float, row))) for row in rows)]) + "\n")
    out = models / "iris" / "2" / "reference.json"
    tidegate("profile", train, "--model", "iris", "--out", out, "--keep-values")
    return models


def test_rows_that_move_are_seen(repository, tmp_path):
    """Steady rows are steady; moved ones drift, by numbers that numpy agrees with; a restart in the middle loses nothing."""
    now = flowers(ROWS, SEED + 1, shift=1.0)
    with running(repository, tmp_path / "gate", environment=FAST) as server:
        send(server, flowers(ROWS, SEED + 2))
        arm = stable(server, ROWS)
        hour, features = window(arm, "hour")
        assert hour["state"] == "steady" and hour["drifted"] == 0 and hour["rows"] == ROWS, hour
        assert version(server)["reference"]["kind"] == "file"
        assert not any(each["alarm"] for each in features.values())
        send(server, now[: ROWS // 2])
        stable(server, ROWS + ROWS // 2)
    with running(repository, tmp_path / "gate", environment=FAST) as server:
        stable(server, ROWS + ROWS // 2)
        send(server, now[ROWS // 2 :])
        send(server, now)
        hour, features = window(stable(server, 3 * ROWS), "hour")
        assert hour["state"] == "drifted" and features["features[0]"]["state"] == "drifted", hour
        assert features["features[0]"]["alarm"], features["features[0]"]
        assert features["features[1]"]["state"] == "steady", features["features[1]"]
        # The latest values begin anew with a restart: half of `now`, and all of it.
        seen = np.concatenate([now[ROWS // 2 :], now])[:, 0].astype(np.float64)
        reference = np.sort(flowers(ROWS, SEED)[:, 0].astype(np.float64))
        _, latest = window(version(server)["arms"][0], "latest")
        scores = latest["features[0]"]["scores"]
        assert latest["features[0]"]["rows"] == len(seen)
        both = np.sort(np.concatenate([reference, seen]))
        share = lambda rows: np.searchsorted(np.sort(rows), both, side="right") / len(rows)  # noqa: E731
        apart = np.abs(share(reference) - share(seen))
        assert scores["ks"] == pytest.approx(apart.max(), rel=1e-9)
        distance = np.sum(apart[:-1] * np.diff(both)) / reference.std()
        assert scores["wasserstein"] == pytest.approx(distance, rel=1e-6)
        low, high = features["features[0]"]["scores"]["ks_low"], features["features[0]"]["scores"]["ks_high"]
        assert 0 < low <= high <= 1
        text = tidegate("versions", "drift", "iris", "--address", f"http://{server.admin}", "--state-dir", server.state)
        assert "drifted" in text and "reference file" in text, text


def answered(server, path):
    """The ledger's Parquet of what was answered."""
    tidegate("audit", "export", server.state, "--format", "parquet", "--out", path, "--model", "iris")
    whole = pyarrow.parquet.read_table(path)
    return whole.filter([status == "ok" for status in whole["status"].to_pylist()])


def as_theirs(latest, hour, theirs):
    """The gateway's scores of the latest values are Evidently's and scipy's; the bounds of counters hold."""
    assert set(latest) == set(theirs["scores"])
    seen = set()
    for name, scores in theirs["scores"].items():
        own, counted = latest[name]["scores"], hour[name]["scores"]
        for score, value in scores.items():
            close(f"{name}: {score}", own[score], value)
            seen.add(score)
        if "ks" in scores:
            assert counted["ks_low"] - 1e-12 <= scores["ks"] <= counted["ks_high"] + 1e-12, name
            assert counted["wasserstein_low"] <= scores["wasserstein"] * (1 + 1e-9), name
    assert seen == {"psi", "kl_div", "jensenshannon", "hellinger", "wasserstein", "ks", "ks_p", "chisquare_p"}


def test_a_stream_is_scored_as_evidently_and_scipy_score_its_record(tmp_path):
    """A stream that drifts, with a restart in the middle: the gateway's numbers beside those of the ledger's Parquet."""
    reference, first, second, both = (tmp_path / f"{name}.parquet" for name in ("reference", "first", "second", "both"))
    models = tmp_path / "models"
    shutil.copytree(MODELS / "iris", models / "iris")
    with running(models, tmp_path / "before") as server:
        send(server, flowers(1400, SEED), batch=10)
        pyarrow.parquet.write_table(answered(server, tmp_path / "all.parquet"), reference)
    tidegate(
        *("profile", reference, "--model", "iris", "--repository", models, "--keep-values"),
        *("--out", models / "iris" / "2" / "reference.json"),
    )
    stream = flowers(1000, SEED + 1)
    stream[:, 0] += np.linspace(0, 1.5, len(stream), dtype=np.float32)
    stream[:, 2] += np.linspace(0, 2, len(stream), dtype=np.float32)
    with running(models, tmp_path / "gate", environment=FAST) as server:
        send(server, stream[:640], batch=10)
        arm = stable(server, 640)
        pyarrow.parquet.write_table(answered(server, tmp_path / "all.parquet"), first)
        (found, latest), (_, hour) = window(arm, "latest"), window(arm, "hour")
        assert found["rows"] == 640
        as_theirs(latest, hour, evidently(reference, first))
    with running(models, tmp_path / "gate", environment=FAST) as server:
        send(server, stream[640:], batch=10)
        arm = stable(server, 1000)
        record = answered(server, tmp_path / "all.parquet")
        assert record.num_rows == 100
        pyarrow.parquet.write_table(record.slice(64), second)
        pyarrow.parquet.write_table(record, both)
        (found, latest), (_, hour) = window(arm, "latest"), window(arm, "hour")
        # The latest values begin anew with a restart.
        assert found["rows"] == 360
        assert set(latest) == set(hour)
        theirs = evidently(reference, second)
        for name, scores in theirs["scores"].items():
            for score, value in scores.items():
                close(f"{name}: {score}", latest[name]["scores"][score], value)
    # The hour's counters, half of them from before the restart, are those of the whole record.
    offline = {each["name"]: each for each in drift(models / "iris" / "2" / "reference.json", both)["features"]}
    for name, each in hour.items():
        assert each["rows"] == 1000
        assert each["state"] == offline[name]["state"], name
        counted = {score: offline[name]["scores"][score] for score in each["scores"]}
        assert each["scores"] == pytest.approx(counted, rel=1e-9, abs=1e-12), name
    assert hour["features[0]"]["state"] == "drifted" and hour["features[1]"]["state"] == "steady"
    # And its bounds are those of the values of the whole.
    for name, scores in evidently(reference, both)["scores"].items():
        if "ks" in scores:
            assert hour[name]["scores"]["ks_low"] - 1e-12 <= scores["ks"] <= hour[name]["scores"]["ks_high"] + 1e-12
            assert hour[name]["scores"]["wasserstein_low"] <= scores["wasserstein"] * (1 + 1e-9)


def test_categories_that_the_reference_lacks_are_named(tmp_path):
    """Classes that the reference never had; with a capture policy that keeps the tensor back it is counted and not named."""
    models, reference = tmp_path / "models", tmp_path / "reference.parquet"
    shutil.copytree(MODELS / "iris", models / "iris")
    rows = flowers(ROWS, SEED)
    small = rows[rows[:, 2] < 2.8]
    with running(models, tmp_path / "before") as server:
        send(server, small)
        record = answered(server, tmp_path / "all.parquet")
        pyarrow.parquet.write_table(record, reference)
    seen = {int(np.argmax(row)) for each in record["out_probabilities"].to_pylist() for row in np.reshape(each, (-1, 3))}
    assert seen == {0}
    out = models / "iris" / "2" / "reference.json"
    tidegate("profile", reference, "--model", "iris", "--repository", models, "--out", out)
    with running(models, tmp_path / "gate", environment=FAST) as server:
        send(server, rows)
        arm = stable(server, ROWS)
        (new,) = arm["new_categories"]
        first, second = new["values"]
        assert (new["feature"], new["role"]) == ("class(probabilities)", "output")
        assert {first["value"], second["value"]} == {"1", "2"} and first["over_count"] == second["over_count"] == 0
        unseen = first["count"] + second["count"]
        assert first["count"] >= second["count"] > 0 and unseen == arm["quality"]["unseen_category"]
        text = tidegate("versions", "drift", "iris", "--address", f"http://{server.admin}", "--state-dir", server.state)
        assert f"new in class(probabilities) (stable): '{first['value']}' {first['count']}, " in text, text
    (models / "iris" / "tidegate.toml").write_text('[[ledger.tensors]]\nname = "probabilities"\naction = "hash"\n')
    with running(models, tmp_path / "gate", environment=FAST) as server:
        send(server, rows[:20])
        arm = stable(server, ROWS + 20)
        assert arm["new_categories"] == [] and arm["quality"]["unseen_category"] >= unseen, arm


def test_a_reference_is_learnt_and_frozen(tmp_path):
    models = tmp_path / "models"
    shutil.copytree(MODELS / "iris", models / "iris")
    server = Server(models, tmp_path / "gate", environment=FAST | {"TIDEGATE_MONITOR_PROVISIONAL_ROWS": "1000"})
    try:
        send(server, flowers(500, 1))
        eventually(lambda: (found := version(server)) and found["reference"]["rows"] == 500)
        status, body = admin(server, "/models/iris/versions/2:freeze", {"reason": "too soon"}, "POST")
        assert status == 409 and "500 rows of 1000" in body["detail"], body
        send(server, flowers(500, 2))
        eventually(lambda: version(server)["reference"]["kind"] == "provisional")
        send(server, flowers(300, 3))
        stable(server, 300)
        # The page's commands, at this gateway.
        (tmp_path / "bin").mkdir()
        command = tmp_path / "bin" / "tidegate"
        command.write_text(f'#!/bin/sh\nexec {BINARY} "$@" --address http://{server.admin} --state-dir {server.state}\n')
        command.chmod(0o755)
        said = ""
        for block in blocks("sh"):
            run = subprocess.run(
                ["bash", "-euc", block], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
                env={"PATH": f"{command.parent}:/usr/bin:/bin"},
            )
            assert run.returncode == 0, block + run.stdout + run.stderr
            said += run.stdout
        assert "version 2: 1000 rows are the reference" in said and "reference provisional" in said, said
        _, journal = admin(server, "/journal?action=reference.freeze")
        taken = [event for event in journal["events"] if event["outcome"] != "refused"]
        assert [event["reason"] for event in taken] == ["a week without complaints"], journal
    finally:
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with running(models, tmp_path / "gate", environment=FAST) as server:
        assert eventually(lambda: version(server))["reference"]["kind"] == "frozen"


def test_a_broken_profile_is_refused(repository, tmp_path):
    (repository / "iris" / "2" / "reference.json").write_text('{"schema_version": 1}')
    with running(repository, tmp_path / "gate") as server:
        _, body = admin(server, "/models/iris")
        states = {each["version"]: (each["state"], each["reason"]) for each in body["versions"]}
        assert states["2"][0] == "failed" and "reference.json" in states["2"][1], states
        assert states["1"][0] == "ready"


def test_nobody_looks_where_it_is_off(tmp_path):
    with running(MODELS, tmp_path / "gate", environment={"TIDEGATE_MONITOR_ENABLED": "false"}) as server:
        status, body = admin(server, "/models/iris/drift")
        assert status == 501 and "monitor.enabled" in body["detail"], body


def test_prometheus_fires_on_a_stream_that_drifts(repository, tmp_path):
    """A real Prometheus scrapes the gateway and fires by the rule of docs/monitor.md."""
    (port,) = free_ports(1)
    with running(repository, tmp_path / "gate", environment=FAST) as server:
        folder = tmp_path / "prometheus"
        folder.mkdir()
        (folder / "rules.yml").write_text(blocks("yaml")[0])
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            f"rule_files: [rules.yml]\nscrape_configs:\n- job_name: gate\n  static_configs:\n  - targets: ['{server.metrics}']\n"
        )
        arguments = [
            *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
            f"--web.listen-address={HOST}:{port}",
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(arguments, stdout=log, stderr=log)

        def ask(path):
            try:
                with urllib.request.urlopen(f"http://{HOST}:{port}/api/v1/{path}", timeout=5) as answer:
                    return json.load(answer)["data"]
            except OSError:
                return None

        def value(query):
            found = ask("query?" + urllib.parse.urlencode({"query": query}))
            return [float(each["value"][1]) for each in found["result"]] if found else []

        try:
            send(server, flowers(ROWS, SEED + 2))
            samples = 'tidegate_drift_samples{model="iris",version="2",arm="stable"}'
            eventually(lambda: value(samples) == [ROWS])
            assert ask("alerts")["alerts"] == []
            send(server, flowers(3 * ROWS, SEED + 3, shift=1.0))
            named = lambda: [each for each in ask("alerts")["alerts"] if each["labels"]["alertname"] == "TidegateDrift"]  # noqa: E731
            labels = eventually(named)[0]["labels"]
            assert (labels["alertname"], labels["model"], labels["version"]) == ("TidegateDrift", "iris", "2")
            psi = 'tidegate_drift_score{feature="features[0]",statistic="cell_psi"}'
            assert eventually(lambda: value(psi))[0] > 0.1
        finally:
            process.kill()
            process.wait()
