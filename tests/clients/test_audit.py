"""The ledger's proofs, against a running gateway: its own commands, and a verifier that shares nothing with it."""

import contextlib
import http.server
import json
import pathlib
import shutil
import signal
import sys
import threading

import duckdb
import pytest
from conftest import HOST, ROOT, eventually, running, tidegate

sys.path.insert(0, str(ROOT / "tests" / "verifier"))
import verify_ledger  # noqa: E402

INFER = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}]}


class Gate:
    def __init__(self, server, model):
        self.server, self.model = server, model
        self.ledger = server.state / "ledger"
        self.log = self.ledger / "predictions"

    def predict(self, count=1):
        ids = []
        for _ in range(count):
            status, headers, body = self.server.post(f"/v2/models/{self.model}/infer", self.body)
            assert status == 200, body
            ids.append(headers["tidegate-prediction-id"])
        return ids

    def signed(self, log="predictions"):
        path = self.ledger / log / "checkpoint"
        return int(path.read_text().split("\n")[1]) if path.exists() else 0

    def erase(self, *arguments):
        return json.loads(tidegate(
            *("audit", "erase", *arguments, "--reason", "asked for", "--json"),
            *("--address", f"http://{self.server.admin}", "--state-dir", self.server.state),
        ))

    def verify(self, **options):
        """By both programs, which have to agree."""
        flags = [part for name, path in options.items() for part in (f"--{name.replace('_', '-')}", path)]
        ours = json.loads(tidegate("audit", "verify", self.ledger, "--json", *flags))["report"]["logs"]
        given = verify_ledger.read_keys(options["public_key"]) if "public_key" in options else []
        anchors = verify_ledger.read_notes(options["checkpoint"]) if "checkpoint" in options else []
        theirs = verify_ledger.verify_ledger(self.ledger, given, anchors)
        for log in ours:
            if log["log"] in theirs:
                found = theirs[log["log"]]
                assert found["erased"] == log["erased"] and found["signed"] <= log["signed"] + log["next_seq"]
        return theirs


@contextlib.contextmanager
def gate(tmp_path, config=""):
    settings = f"[ledger]\ncheckpoint_interval_s = 1\n{config}"
    with running(ROOT / "models", tmp_path / "gate", config=settings) as server:
        model = "iris"
        found = Gate(server, model)
        status, answer = server.get(f"/v2/models/{model}")
        assert status == 200, answer
        inputs = json.loads(answer)["inputs"]
        found.body = {"inputs": [
            {"name": each["name"], "datatype": each["datatype"], "shape": [1, *each["shape"][1:]],
             "data": [0.5] * max(1, abs(int(each["shape"][-1])))}
            for each in inputs
        ]}
        yield found


def stop(server):
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(40) == 0


def test_a_stranger_can_check_what_was_recorded(tmp_path):
    kept = tmp_path / "kept.pub"
    with gate(tmp_path, f"witness_file = '{tmp_path / 'witness'}'\n") as gateway:
        ids = gateway.predict(12)
        eventually(lambda: gateway.signed() >= 12)
        kept.write_text(tidegate("audit", "public-key", gateway.ledger))
        assert gateway.verify(public_key=kept)["predictions"]["records"] >= 12
        proof = tmp_path / "proof.json"
        proof.write_text(tidegate("audit", "prove", ids[3], "--log", gateway.log))
        shown = json.loads(tidegate("audit", "check-proof", proof, "--public-key", kept, "--json"))
        assert shown["prediction_id"] == ids[3] and shown["payload"] == "proven"
        assert verify_ledger.verify_proof(proof, verify_ledger.read_keys(kept))["seq"] == shown["seq"]
        changed = json.loads(proof.read_text())
        changed["seq"] += 1
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        tidegate("audit", "check-proof", tmp_path / "changed.json", "--public-key", kept, code=1)
        stop(gateway.server)
        # All that was there is sealed and signed, and the witness has it.
        found = gateway.verify(public_key=kept, checkpoint=tmp_path / "witness")
        assert found["predictions"]["signed"] == found["predictions"]["records"]
        # A stopped ledger cut to its first half, with whatever was derived from it: the witness knows better.
        copy = tmp_path / "copy"
        shutil.copytree(gateway.ledger, copy)
        for segment in (copy / "predictions" / "segments").iterdir():
            segment.write_bytes(segment.read_bytes()[:-40])
        complaint = tidegate("audit", "verify", copy, code=1)
        assert str(copy) in complaint and "at byte" in complaint
        with pytest.raises(verify_ledger.Fault):
            verify_ledger.verify_ledger(copy, [], [])


def test_what_was_erased_is_gone_and_proven_still(tmp_path):
    with gate(tmp_path) as gateway:
        ids = gateway.predict(5)
        erased = gateway.erase(ids[2])
        assert erased["records"] >= 1
        eventually(lambda: gateway.verify()["predictions"]["erased"] >= 1)
        eventually(lambda: gateway.signed() >= 5)
        proof = tmp_path / "proof.json"
        proof.write_text(tidegate("audit", "prove", ids[2], "--log", gateway.log))
        assert "payload" not in json.loads(proof.read_text())
        kept = tmp_path / "kept.pub"
        kept.write_text(tidegate("audit", "public-key", gateway.ledger))
        shown = json.loads(tidegate("audit", "check-proof", proof, "--public-key", kept, "--json"))
        assert shown["prediction_id"] == ids[2] and shown["payload"] == "not in the proof"
        assert "no record here" in tidegate(
            *("audit", "erase", ids[2], "--reason", "again"),
            *("--address", f"http://{gateway.server.admin}", "--state-dir", gateway.server.state), code=1,
        )


def test_a_ledger_that_nobody_uses_is_erased_in_place(tmp_path):
    with gate(tmp_path) as gateway:
        ids = gateway.predict(5)
        arguments = ("audit", "erase", ids[1], "--ledger", gateway.ledger, "--reason", "request 17")
        assert "a gateway uses this ledger" in tidegate(*arguments, code=1)
        stop(gateway.server)
        assert json.loads(tidegate(*arguments, "--json")) == {
            "records": 1, "key_destroyed": False, "unreadable": 0, "done": True,
        }
        assert "no record here" in tidegate(*arguments, code=1)
        assert "expected why" in tidegate("audit", "erase", ids[2], "--ledger", gateway.ledger, code=2)
        assert "is no ledger" in tidegate("audit", "erase", ids[2], "--ledger", tmp_path, "--reason", "x", code=2)
        assert gateway.verify()["predictions"]["erased"] == 1
        # Who and why, signed; and gone from the Parquet too.
        said = [json.loads(line) for line in tidegate(
            "audit", "export", gateway.ledger / "admin", "--format", "jsonl", "--out", "-"
        ).splitlines()]
        erasure = next(record for record in said if record["kind"] == "erasure")
        assert erasure["principal"].startswith("local:uid ") and erasure["body"]["reason"] == "request 17"
        root = gateway.ledger / "parquet"
        rows = duckdb.sql(f"SELECT prediction_id, erased, inputs FROM read_parquet('{root}/*/*/*.parquet')").fetchall()
        assert [(number, inputs is None) for number, erased, inputs in rows if erased] == [(ids[1], True)]
        assert len(rows) == 5 and ids[1] not in {number for number, erased, _ in rows if not erased}
        report = json.loads(tidegate("audit", "verify", gateway.ledger, "--json"))["report"]
        assert report["parquet"]["stale"] == report["parquet"]["waiting"] == 0
        assert all(log["signed"] == log["next_seq"] for log in report["logs"])
    # The gateway goes on with it.
    with gate(tmp_path) as gateway:
        gateway.predict(2)
        eventually(lambda: gateway.signed() >= 7)
        assert gateway.verify()["predictions"]["erased"] == 1


def test_a_new_key_is_named_by_the_old_one(tmp_path):
    old = tmp_path / "old.pub"
    with gate(tmp_path) as gateway:
        gateway.predict(3)
        eventually(lambda: gateway.signed() >= 3)
        old.write_text(tidegate("audit", "public-key", gateway.ledger))
        admin = ("--address", f"http://{gateway.server.admin}", "--state-dir", gateway.server.state)
        new = tidegate("audit", "rotate-key", *admin).splitlines()
        assert len(new) == 3 and new[0] not in old.read_text()
        eventually(lambda: not (gateway.ledger / "keys" / "0001.key").exists())
        ids = gateway.predict(3)
        eventually(lambda: gateway.signed() >= 6)
        gateway.verify(public_key=old)
        proof = tmp_path / "proof.json"
        proof.write_text(tidegate("audit", "prove", ids[0], "--log", gateway.log))
        assert tidegate("audit", "check-proof", proof, "--public-key", old)
        verify_ledger.verify_proof(proof, verify_ledger.read_keys(old))
        stop(gateway.server)
    # In a stopped ledger: the next start names it.
    tidegate("audit", "rotate-key", "--ledger", gateway.ledger)
    with gate(tmp_path) as gateway:
        eventually(lambda: not (gateway.ledger / "keys" / "0002.key").exists())
        gateway.verify(public_key=old)


def test_a_witness_gets_each_checkpoint(tmp_path):
    got = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(self.rfile.read(int(self.headers["content-length"])).decode())
            # The first one is to be given again.
            self.send_response(503 if len(got) == 1 else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        url = f"http://{HOST}:{receiver.server_port}/checkpoints"
        with gate(tmp_path, f"witness_url = '{url}'\n") as gateway:
            gateway.predict(4)
            sizes = lambda: [verify_ledger.Note(text, "posted").size for text in got if "/predictions" in text]
            eventually(lambda: len(got) > 1 and 4 in sizes())
            key = verify_ledger.read_keys(pathlib.Path(gateway.ledger / "keys" / "0001.pub"))[0]
            note = next(note for text in got if (note := verify_ledger.Note(text, "posted")).origin == key.name)
            assert note.signed_by(key)
            status, page = gateway.server.get("/metrics", gateway.server.metrics)
            assert status == 200 and b'tidegate_ledger_witness_checkpoints_total{witness="url",outcome="taken"}' in page
            stop(gateway.server)
        receiver.shutdown()
