"""What the ledger says of predictions, held against the clients' own books: by DuckDB, pyarrow and pandas, as they are."""

import base64
import hashlib
import json
import math
import shutil
import subprocess
import time
import uuid

import duckdb
import numpy as np
import pandas
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import BINARY, MODELS, ROOT, running
from test_admin import Admin

FIXTURES = ROOT / "tests" / "fixtures"
TYPES = ["fp32", "fp64", "fp16", "int64", "uint64", "int32", "bool", "bytes"]
NUMPY = {
    **{"FP32": "<f4", "FP64": "<f8", "FP16": "<f2", "INT64": "<i8", "UINT64": "<u8", "INT32": "<i4", "BOOL": "?"},
}


def tidegate(*arguments, code=0):
    """Runs a command; what it printed."""
    done = subprocess.run([str(BINARY), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def lines(state, *arguments):
    out = tidegate("audit", "export", state, "--format", "jsonl", "--out", "-", *arguments)
    return [json.loads(line) for line in out.split("\n") if line]


def repository(folder):
    shutil.copytree(MODELS / "iris", folder / "iris")
    for kind in TYPES:
        version = folder / f"identity_{kind}" / "1"
        version.mkdir(parents=True)
        shutil.copy(FIXTURES / f"identity_{kind}.onnx", version / "model.onnx")
    return folder


def value_of(datatype, element):
    """What an export says of one element, as what was sent: the words of NaN and infinity, large integers as text."""
    if datatype == "BYTES":
        if isinstance(element, dict):
            return base64.b64decode(element["base64"])
        return element.encode()
    if datatype.startswith("FP"):
        return float(element.split(":")[0]) if isinstance(element, str) else float(element)
    return int(element) if isinstance(element, str) else element


def same(datatype, exported, sent):
    got = [value_of(datatype, element) for element in exported]
    if datatype.startswith("FP"):
        as_sent = np.array(sent, NUMPY[datatype])
        return np.array_equal(np.array(got, NUMPY[datatype]), as_sent, equal_nan=True)
    return got == list(sent)


class Books:
    """What one client sent and was answered."""

    def __init__(self, server):
        self.server, self.entries = server, {}

    def infer(self, model, datatype, values, shape, request_id, name="x"):
        """Sends one tensor in binary form; notes what came."""
        if datatype == "BYTES":
            raw = b"".join(len(value).to_bytes(4, "little") + value for value in values)
        else:
            raw = np.array(values, NUMPY[datatype]).tobytes()
        about = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        # An answer in JSON could not say NaN.
        wanted = {"binary_data_output": True}
        head = json.dumps({"id": request_id, "inputs": [about], "parameters": wanted}).encode()
        status, headers, body = self.server.post(
            f"/v2/models/{model}/infer", head + raw, {"inference-header-content-length": str(len(head))}
        )
        self.entries[headers["tidegate-prediction-id"]] = {
            "model": model, "request_id": request_id, "status": status, "datatype": datatype, "values": values,
            "shape": shape, "name": name, "answer": body, "digest": headers.get("tidegate-model-digest"),
            "version": headers.get("tidegate-model-version"),
        }


HARD = {
    "FP32": [0.1, -0.0, math.nan, math.inf, -math.inf, 3.4e38],
    "FP64": [0.1, 1 / 3, math.nan, math.inf, 5e-324, 1.7e308],
    "FP16": [0.5, 65504.0, math.nan, -math.inf],
    "INT64": [0, 2**53 + 1, -(2**63), 2**63 - 1],
    "UINT64": [0, 2**53, 2**53 + 1, 2**64 - 1],
    "INT32": [-(2**31), 2**31 - 1],
    "BOOL": [True, False],
    "BYTES": [b"plain", b"", "h\u00e9 \u2028\n\"".encode(), b"x"],
}


def work(server, rounds=5):
    """Calls of many kinds, some of which are refused."""
    books = Books(server)
    for round_ in range(rounds):
        for row in range(10):
            books.infer("iris", "FP32", [5.1 + row, 3.5, 1.4, 0.2 * round_], [1, 4], f"iris-{round_}-{row}", "features")
        for kind in TYPES:
            datatype = kind.upper()
            values = HARD[datatype]
            books.infer(f"identity_{kind}", datatype, values, [len(values) // 2, 2], f'{kind} "{round_}" \u2603')
        books.infer("iris", "FP32", [1.0, 2.0, 3.0], [1, 3], f"wrong-{round_}", "features")
    return books.entries


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The state folder of a gateway that served and has ended, and the client's books."""
    folder = tmp_path_factory.mktemp("ledger")
    with running(repository(folder / "models"), folder) as server:
        books = work(server)
        state = server.state
    return state, books


def test_every_line_is_what_the_client_saw(kept):
    state, books = kept
    records = [record for record in lines(state) if record["kind"] == "prediction"]
    assert [record["seq"] for record in records] == sorted(record["seq"] for record in records)
    by_id = {record["prediction_id"]: record for record in records}
    assert len(by_id) == len(records) and by_id.keys() == books.keys()
    refused = {(entry["model"], entry["answer"]) for entry in books.values() if entry["status"] != 200}
    assert {model for model, _ in refused} == {"iris"}, refused
    for number, entry in books.items():
        record = by_id[number]
        assert record["model"] == entry["model"] and record["request_id"] == entry["request_id"]
        assert (record["status"] == "ok") == (entry["status"] == 200), record
        assert record["protocol"] == "http"
        assert uuid.UUID(number).version == 7
        if entry["status"] != 200:
            continue
        assert record["model_digest"] == entry["digest"] and str(record["version"]) == entry["version"]
        (tensor,) = record["inputs"]
        assert (tensor["datatype"], tensor["shape"]) == (entry["datatype"], entry["shape"])
        assert same(entry["datatype"], tensor["data"], entry["values"]), (tensor, entry)
        if entry["model"].startswith("identity"):
            assert same(entry["datatype"], record["outputs"][0]["data"], entry["values"])


def parquet(state, folder, *arguments):
    tidegate("audit", "export", state, "--format", "parquet", "--out", folder, *arguments)
    return folder


def agrees(rows, books):
    """Whether each row of a table is what a client saw, and every client's call is a row."""
    seen = set()
    for row in rows:
        entry = books[row["prediction_id"]]
        seen.add(row["prediction_id"])
        assert (row["model"], row["request_id"]) == (entry["model"], entry["request_id"])
        assert (row["status"] == "ok") == (entry["status"] == 200), row
        if entry["status"] != 200:
            continue
        (tensor,) = json.loads(row["inputs"])
        assert same(entry["datatype"], tensor["data"], entry["values"])
        column = row[f"in_{entry['name']}"]
        assert list(row[f"in_{entry['name']}_shape"]) == entry["shape"]
        if entry["datatype"] == "BYTES":
            assert list(column) == [value.decode() for value in entry["values"]]
        elif entry["datatype"].startswith("FP"):
            wide = "<f8" if entry["datatype"] == "FP64" else "<f4"
            sent = np.array(entry["values"], NUMPY[entry["datatype"]]).astype(wide)
            assert np.array_equal(np.array(list(column), wide), sent, equal_nan=True)
        else:
            assert [int(value) for value in column] == [int(value) for value in entry["values"]]
    assert seen == books.keys()


def test_duckdb_reads_the_parquet(kept, tmp_path):
    state, books = kept
    folder = parquet(state, tmp_path / "out")
    for kind in ["iris", *(f"identity_{kind}" for kind in TYPES)]:
        table = duckdb.sql(f"select * from read_parquet('{folder}/model={kind}/**/*.parquet', union_by_name = true)")
        rows = [dict(zip(table.columns, row)) for row in table.fetchall()]
        agrees(rows, {number: entry for number, entry in books.items() if entry["model"] == kind})
    whole = f"read_parquet('{folder}/**/*.parquet', hive_partitioning = true, union_by_name = true)"
    counted = duckdb.sql(f"select model, status, count(*) from {whole} where kind = 'prediction' group by all").fetchall()
    wanted = {}
    for entry in books.values():
        key = (entry["model"], entry["status"] == 200)
        wanted[key] = wanted.get(key, 0) + 1
    assert {(model, status == "ok"): count for model, status, count in counted} == wanted
    # Nanoseconds survive, and the features are numbers to compute with.
    ((some,),) = duckdb.sql(f"select max(epoch_ns(time)) from {whole}").fetchall()
    newest = max(record["time"] for record in lines(state))
    assert f"{some % 10**9:09}" == newest.split(".")[1][:9]
    mean = duckdb.sql(f"select avg(in_features[1]) from {whole} where model = 'iris' and status = 'ok'").fetchall()
    assert math.isclose(mean[0][0], np.float32([5.1 + row for row in range(10)]).mean(), rel_tol=1e-6)


def test_pandas_and_pyarrow_read_the_parquet(kept, tmp_path):
    state, books = kept
    folder = parquet(state, tmp_path / "out", "--model", "iris")
    of_iris = {number: entry for number, entry in books.items() if entry["model"] == "iris"}
    frame = pandas.read_parquet(folder)
    agrees(frame.to_dict("records"), of_iris)
    assert str(frame["time"].dtype) == "datetime64[ns, UTC]"
    dataset = pyarrow.dataset.dataset(folder, format="parquet", partitioning="hive")
    agrees(dataset.to_table().to_pylist(), of_iris)
    by_time = {record["prediction_id"]: record["time"] for record in lines(state)}
    for row in frame.to_dict("records"):
        assert row["time"].isoformat(timespec="nanoseconds").replace("+00:00", "Z") == by_time[row["prediction_id"]]
    # One file, with the model as a column.
    tidegate("audit", "export", state, "--format", "parquet", "--out", tmp_path / "all.parquet", "--model", "iris")
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet")
    assert set(table.column("model").to_pylist()) == {"iris"}
    agrees(table.to_pylist(), of_iris)


def test_parquet_and_lines_are_the_same_record_by_record(kept, tmp_path):
    state, _ = kept
    tidegate("audit", "export", state, "--format", "parquet", "--out", tmp_path / "all.parquet")
    rows = {row["seq"]: row for row in pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pylist()}
    records = lines(state)
    assert rows.keys() == {record["seq"] for record in records}
    for record in records:
        row = rows[record["seq"]]
        for name, value in record.items():
            if name in ("inputs", "outputs"):
                assert json.loads(row[name]) == value
            elif name not in ("time", "until", "body"):
                assert row[name] == value, (name, row[name], value)


def test_what_is_wanted_can_be_said(kept):
    state, books = kept
    assert len(lines(state, "--model", "iris", "--status", "ok")) == 50
    assert {record["status"] for record in lines(state, "--model", "iris", "--status", "invalid_input")} <= {"invalid_input"}
    assert lines(state, "--until", "2020-01-01") == [] and lines(state, "--since", "0s") == []
    assert len(lines(state, "--since", "1h")) == len(lines(state))
    number = next(iter(books))
    (one,) = lines(state, "--id", number)
    assert one["prediction_id"] == number
    assert lines(state, "--version", "999") == []
    tidegate("audit", "export", state / "nothing", "--format", "jsonl", "--out", "-", code=2)
    tidegate("audit", "export", state, "--format", "parquet", "--out", "-", code=2)


def test_show_and_stats_read_the_files(kept):
    state, books = kept
    number, entry = next((number, entry) for number, entry in books.items() if entry["model"] == "iris")
    shown = json.loads(tidegate("audit", "show", number, "--log", state, "--json"))
    assert shown["request_id"] == entry["request_id"] and shown["inputs"][0]["data"][0] == 5.1
    text = tidegate("audit", "show", number, "--log", state)
    assert f"prediction_id: {number}" in text and "input features FP32 [1,4]: 5.1, 3.5, 1.4, 0" in text
    tidegate("audit", "show", uuid.uuid4(), "--log", state, code=1)
    stats = json.loads(tidegate("audit", "stats", state, "--json"))
    counted = {(group["model"], group["status"]): group["records"] for group in stats["groups"]}
    assert counted["iris", "ok"] == 50
    assert stats["records"] == len(lines(state))
    assert "iris" in tidegate("audit", "stats", state)


def test_an_export_while_the_gateway_writes(tmp_path):
    with running(repository(tmp_path / "models"), tmp_path) as server:
        books = Books(server)
        tail = subprocess.Popen(
            [str(BINARY), "audit", "tail", str(server.state), "--from", "0", "--model", "iris", "--json"],
            stdout=subprocess.PIPE, text=True,
        )
        for row in range(30):
            books.infer("iris", "FP32", [5.1 + row, 3.5, 1.4, 0.2], [1, 4], f"live-{row}", "features")
            # What was answered is there.
            ids = {record["prediction_id"] for record in lines(server.state, "--model", "iris")}
            assert ids == books.entries.keys()
        folder = parquet(server.state, tmp_path / "out")
        agrees(duckdb_rows(folder, "iris"), books.entries)
        tailed = [json.loads(tail.stdout.readline())["prediction_id"] for _ in range(30)]
        assert tailed == list(books.entries)
        tail.kill()
        tail.wait()
        number = next(iter(books.entries))
        same_model = tidegate("audit", "show", number, "--log", server.state, "--reproduce", "--url", f"http://{server.http}")
        assert "the same outputs" in same_model
        report = json.loads(
            tidegate("replay", "--log", server.state, "--to", "iris", "--url", f"http://{server.http}", "--limit", "20",
                     "--fail-on", "different=0,flips=0,errors=0", "--json")
        )
        assert (report["sent"], report["different"], report["errors"]) == (20, 0, 0)
        other = tidegate("replay", "--log", server.state, "--to", "identity_fp32", "--model", "iris", "--url",
                         f"http://{server.http}", "--limit", "3", "--fail-on", "errors=0", code=1)
        assert "beyond its limit: errors" in other


def test_a_prediction_is_run_again_without_a_gateway(kept, tmp_path):
    state, books = kept
    again = lambda number, *arguments, code=0: tidegate(
        "audit", "show", number, "--reproduce", "--tolerance", "0", *arguments, code=code
    )
    answered = {entry["model"]: number for number, entry in books.items() if entry["status"] == 200}
    assert len(answered) == len(TYPES) + 1
    for number in answered.values():
        assert "the same outputs" in again(number, "--log", state, "--offline"), number
    iris = answered["iris"]
    # Nobody listens there: then here, and it says so.
    told = json.loads(again(iris, "--log", state, "--url", "http://127.0.0.1:1", "--json"))
    digest = books[iris]["digest"]
    assert told["same"] is True and told["reproduced_as"] is None and told["model_digest"] == digest
    assert told["ran"] == f"here, from {state.resolve() / 'cache' / 'models' / digest.removeprefix('sha256:')}"
    assert told["engine"] == told["recorded_engine"]
    # The records alone, on another machine.
    alone = tmp_path / "records"
    shutil.copytree(state / "ledger", alone)
    nowhere = again(iris, "--log", alone, "--offline", "--state-dir", tmp_path, code=1)
    assert nowhere == ""
    models = repository(tmp_path / "models")
    shown = again(iris, "--log", alone, "--offline", "--state-dir", tmp_path, "--model-repository", models)
    assert "the same outputs" in shown and f"ran here, from {models / 'iris'}" in shown
    assert "the same outputs" in again(
        iris, "--log", alone, "--offline", "--state-dir", tmp_path, "--model-repository", models / "iris"
    )
    # The right name and number, and other bytes: never run.
    for version in (models / "iris").iterdir():
        if version.is_dir():
            shutil.copy(FIXTURES / "identity_fp32.onnx", version / "model.onnx")
    done = subprocess.run(
        [str(BINARY), "audit", "show", iris, "--log", str(alone), "--reproduce", "--offline", "--state-dir", str(tmp_path),
         "--model-repository", str(models)], capture_output=True, text=True, timeout=120, check=False,
    )
    assert done.returncode == 1 and not done.stdout
    assert f"no model with {digest} is in the copies of {tmp_path} or the versions of 'iris' in {models}" in done.stderr
    # What was refused ran on nothing.
    refused = next(number for number, entry in books.items() if entry["status"] != 200)
    again(refused, "--log", state, "--offline", code=1)


def duckdb_rows(folder, model):
    table = duckdb.sql(f"select * from read_parquet('{folder}/model={model}/**/*.parquet', union_by_name = true)")
    return [dict(zip(table.columns, row)) for row in table.fetchall()]


def wait_for(what, within_s=60):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come")


def admin(server):
    return Admin(server.admin, (server.state / "admin-token").read_text().strip())


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """A gateway that was started twice, so that its first segment is sealed; and the client's books."""
    folder = tmp_path_factory.mktemp("again")
    models = repository(folder / "models")
    with running(models, folder) as server:
        books = work(server)
    with running(models, folder) as server:
        yield server, books


def test_sealed_segments_become_parquet_by_themselves(again):
    server, books = again
    root = server.state / "ledger" / "parquet"
    manifests = wait_for(lambda: sorted(root.glob("_segments/*.json")))
    rows = 0
    for path in manifests:
        manifest = json.loads(path.read_text())
        for entry in manifest["files"]:
            data = (root / entry["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry["sha256"] and len(data) == entry["bytes"]
            rows += entry["rows"]
    assert rows >= len(books)
    of_iris = {number: entry for number, entry in books.items() if entry["model"] == "iris"}
    found = [row for row in duckdb_rows(root, "iris") if row["prediction_id"] in books]
    agrees(found, of_iris)
    # The folder that names the model is above.
    frame = pandas.read_parquet(root / "model=iris").assign(model="iris")
    agrees(frame[frame["prediction_id"].isin(books)].to_dict("records"), of_iris)


def test_one_prediction_over_the_admin_api(again):
    server, books = again
    number, entry = next((number, entry) for number, entry in books.items() if entry["model"] == "iris")
    caller = admin(server)
    answer = caller.get(f"/predictions/{number}")
    assert answer.status == 200 and answer.json["request_id"] == entry["request_id"]
    assert answer.json == lines(server.state, "--id", number)[0]
    # Who read it is in the journal.
    events = caller.ok("GET", "/journal?action=prediction.read")["events"]
    assert [event["subject"] for event in events] == [number] and events[0]["model"] == "iris"
    for nothing in (uuid.uuid4(), "x", "0193e5a0-7c1d-7b7a-8d8e-2f4f7b1c9a10"):
        answer = caller.get(f"/predictions/{nothing}")
        assert (answer.status, answer.code) == (404, "not_found"), nothing
    shown = tidegate("audit", "show", number, "--address", f"http://{server.admin}", "--state-dir", server.state)
    assert f"prediction_id: {number}" in shown
    stats = tidegate("audit", "stats", "--address", f"http://{server.admin}", "--state-dir", server.state, "--json")
    assert json.loads(stats)["writer"]


def test_only_who_may_reads_a_prediction(again):
    server, books = again
    number, entry = next((number, entry) for number, entry in books.items() if entry["model"] == "iris")
    keys = [("viewer", [], 403), ("deployer", [], 403), ("auditor", [], 200), ("auditor", ["iris"], 200), ("auditor", ["other*"], 404)]
    for at, (role, models, status) in enumerate(keys):
        limits = [argument for model in models for argument in ("--models", model)]
        made = tidegate("keys", "create", "--name", f"reader-{at}", "--role", role, *limits, "--state-dir", server.state)
        caller = Admin(server.admin, made.strip())
        wait_for(lambda: caller.get("/models").status != 401)
        answer = caller.get(f"/predictions/{number}")
        assert answer.status == status, (role, models, answer.status)


def test_holds_are_put_and_lifted(again):
    server, _ = again
    where = ("--address", f"http://{server.admin}", "--state-dir", server.state)
    tidegate("audit", "hold", "case-17", "--model", "iris", "--since", "2026-01-01", *where, code=1)  # It takes a reason.
    tidegate("audit", "hold", "case-17", "--model", "iris", "--since", "2026-01-01", "--reason", "court", *where)
    (hold,) = json.loads(tidegate("audit", "holds", "--json", *where))["holds"]
    assert (hold["name"], hold["model"], hold["since"]) == ("case-17", "iris", "2026-01-01T00:00:00.000000000Z")
    assert "court" in tidegate("audit", "holds", *where)
    tidegate("audit", "hold", "case-17", "--reason", "of all models", *where, code=1)
    tidegate("audit", "hold", "case-17", "--lift", "--reason", "closed", *where)
    assert json.loads(tidegate("audit", "holds", "--json", *where))["holds"] == []
    changes = [record for record in lines(server.state / "ledger" / "admin") if record["kind"] == "retention"]
    assert [(change["action"], change["body"]["reason"]) for change in changes] == [
        ("hold.put", "court"), ("hold.lift", "closed"),
    ]
