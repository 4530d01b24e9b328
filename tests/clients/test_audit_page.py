"""docs/audit.md, executed: every command, query and script of the page, in its order, as it stands there."""

import json
import os
import re
import shutil
import subprocess
import tomllib

import duckdb
import pytest
from conftest import BINARY, ROOT, running
from test_audit import eventually, tidegate
from test_ledger import repository, work

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.S | re.M)


def blocks(page):
    """Language and content of each; one that is not closed, or has no language, is a fault of the page."""
    found = [(language, content) for _, language, content in FENCE.findall(page)]
    assert len(found) * 2 == len(re.findall(r"^ *```", page, re.M)), "a block that is not closed"
    return found


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """What the page takes for granted: a gateway that has been stopped and started, in the reader's folder."""
    config = "[ledger]\ncheckpoint_interval_s = 1\n"
    models = repository(tmp_path / "models")
    with running(models, tmp_path / "gate", config=config) as server:
        work(server, rounds=2)
    with running(models, tmp_path / "gate", config=config) as server:
        books = work(server, rounds=1)
        for name in ("state", "tidegate-state"):
            (tmp_path / name).symlink_to(server.state)
        # The second verifier, and ONNX Runtime where the gateway finds it.
        for name in ("tests", ".cache"):
            (tmp_path / name).symlink_to(ROOT / name)
        request = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}]}
        (tmp_path / "request.json").write_text(json.dumps(request))
        checkpoint = server.state / "ledger" / "predictions" / "checkpoint"
        eventually(lambda: checkpoint.exists() and int(checkpoint.read_text().split("\n")[1]) >= len(books))
        monkeypatch.chdir(tmp_path)
        server.id = next(number for number, entry in books.items() if entry["model"] == "iris" and entry["status"] == 200)
        yield server


def shell(server, block):
    # Where this test's gateway is; all else is as on the page.
    where = f"""
tidegate() {{
  local where=()
  case "$*" in
    "audit erase"*|"audit rotate-key"*|"audit hold"*|"audit show $ID") where=(--address http://{server.admin}) ;;
    replay*|*--reproduce) where=(--url http://{server.http}) ;;
  esac
  "{BINARY}" "$@" "${{where[@]}}"
}}
"""
    block = block.replace("http://127.0.0.1:8000/", f"http://{server.http}/")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", where + block], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "ID": server.id},
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def sql(_, block):
    for query in filter(str.strip, block.split(";")):
        assert duckdb.sql(query).fetchall(), query


def python(_, block):
    names = {}
    exec(block, names)  # noqa: S102
    assert len(names["frame"]) > 0


def toml(server, block):
    """A model's settings: a model that fits them is loaded."""
    names = {tensor["name"].replace("*", "x") for tensor in tomllib.loads(block)["ledger"].get("tensors", [])}
    folder = server.state.parent.parent / "checked" / "m"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(wide(sorted(names) or ["x"]))
    (folder / "tidegate.toml").write_text(block)
    told = json.loads(tidegate("models", "validate", folder.parent, "--json"))
    assert [each["state"] for each in told] == ["ok"], told


def wide(names):
    """A model with these inputs, of eight columns each."""
    from onnx import TensorProto, helper

    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in [*names, "sum"]]
    graph = helper.make_graph([helper.make_node("Sum", names, ["sum"])], "g", infos[:-1], infos[-1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


# `text` is a form, and nothing to run.
RUN = {"sh": shell, "sql": sql, "python": python, "toml": toml, "text": lambda *_: None}


def test_every_block_of_the_page_runs(reader):
    found = blocks((ROOT / "docs" / "audit.md").read_text())
    assert {language for language, _ in found} == set(RUN), "a language that nothing here runs, or that is gone"
    for language, block in found:
        RUN[language](reader, block)
    # What the page says comes of it.
    ledger = reader.state / "ledger"
    assert len(list((ledger / "keys").glob("*.pub"))) == 2, "the key was rotated"
    told = json.loads(tidegate("audit", "verify", ledger, "--json"))["report"]
    assert sum(log["erased"] for log in told["logs"]) == 1 and told["parquet"]["files"] > 0
    for written in ("auditor.pub", "proof.json", "iris.jsonl", "exported", "one.parquet"):
        assert (reader.state.parent.parent / written).exists(), written


def test_a_block_that_cannot_be_run_is_a_fault():
    assert blocks("a\n```sh\nb\n```\n\n  ```sql\n  c\n  ```\n") == [("sh", "b\n"), ("sql", "  c\n")]
    with pytest.raises(AssertionError):
        blocks("```sh\nno end\n")
