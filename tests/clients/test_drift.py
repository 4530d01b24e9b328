"""Scores of drift: `tidegate drift` beside Evidently and scipy, on files and on what a gateway recorded."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import onnxruntime
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import BINARY, MODELS, ROOT, eventually, running

PYTHON = pathlib.Path(sys.prefix) / "evidently" / "bin" / "python"
SCRIPT = pathlib.Path(__file__).with_name("evidently_scores.py")
WITHIN_S = 120
# Evidently takes two-sided p-values as 2 (1 - cdf), which has no digits left below this.
P_FLOOR = 1e-12


def tidegate(*arguments, code=0):
    run = subprocess.run([str(BINARY), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=WITHIN_S)
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout


def drift(reference, current):
    return json.loads(tidegate("drift", "--reference", reference, "--current", current, "--json"))


def evidently(reference, current):
    run = subprocess.run([PYTHON, SCRIPT, reference, current], capture_output=True, text=True, timeout=WITHIN_S)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def table(rows, shift, seed):
    """Columns of many forms; `shift` is how far they have moved."""
    random = np.random.default_rng(seed)
    gaps = random.normal(5, 2, rows)
    gone = random.random(rows) < 0.02 + 0.1 * shift
    return pyarrow.table({
        "age": random.integers(18, 90, rows) + int(4 * shift),
        "income": random.lognormal(10, 0.6, rows) * (1 + shift),
        "zeros": np.where(random.random(rows) < 0.3, 0.0, random.normal(shift, 1, rows)),
        "halves": np.round(random.normal(3 + shift, 1, rows) * 2) / 2,
        "few": random.integers(0, 5, rows) / 4,
        "level": random.integers(0, 4, rows),
        "flag": random.random(rows) < 0.4 + 0.1 * shift,
        "colour": random.choice(["red", "green", "blue"], rows, p=[0.5 - 0.1 * shift, 0.3, 0.2 + 0.1 * shift]),
        "side": random.choice(["left", "right"], rows, p=[0.5 + 0.1 * shift, 0.5 - 0.1 * shift]),
        "gap": pyarrow.array(gaps, mask=gone),
    })


def close(name, got, want):
    assert got == pytest.approx(want, rel=1e-6, abs=P_FLOOR if name.endswith("_p") else 1e-12), name


def agree(ours, theirs):
    """Every score that they have, their verdicts, and the bounds."""
    features = {each["name"]: each for each in ours["features"]}
    assert set(features) == set(theirs["scores"])
    for column, scores in theirs["scores"].items():
        own = features[column]["scores"]
        for name, value in scores.items():
            close(f"{column}: {name}", own[name], value)
        if "ks" in scores:
            assert own["ks_low"] - 1e-12 <= scores["ks"] <= own["ks_high"] + 1e-12, column
            assert own["wasserstein_low"] <= scores["wasserstein"] * (1 + 1e-9), column
    for column, value in theirs["verdicts"].items():
        if verdict := features[column]["evidently"]:
            close(f"{column}: {verdict['test']}_p", verdict["value"], value)
    return features


@pytest.mark.parametrize("extension", ["parquet", "csv"])
@pytest.mark.parametrize("rows", [900, 4000, 12000])
def test_files_are_scored_as_evidently_scores_them(tmp_path, rows, extension):
    write = {"parquet": pyarrow.parquet.write_table, "csv": pyarrow.csv.write_csv}[extension]
    reference, moved, still = (tmp_path / f"{name}.{extension}" for name in ("reference", "moved", "still"))
    for path, shift, seed, count in ((reference, 0, 1, rows), (moved, 0.4, 2, 3000), (still, 0, 3, 3000)):
        write(table(count, shift, seed), path)
    for current in (moved, still):
        ours, theirs = drift(reference, current), evidently(reference, current)
        agree(ours, theirs)
        assert ours["evidently"]["columns"] == len(theirs["verdicts"])
        assert ours["evidently"]["drifted"] == theirs["dataset"]["count"]
        assert ours["evidently"]["share"] == pytest.approx(theirs["dataset"]["share"])
    assert drift(reference, still)["drifted"] == 0
    assert drift(reference, moved)["drifted"] >= 1


def test_a_profile_scores_as_its_file(tmp_path):
    reference, current, profile = tmp_path / "reference.parquet", tmp_path / "current.parquet", tmp_path / "reference.json"
    pyarrow.parquet.write_table(table(5000, 0, 1), reference)
    pyarrow.parquet.write_table(table(2000, 0.5, 2), current)
    made = json.loads(tidegate("profile", reference, "--model", "loans", "--out", profile, "--keep-values", "--json"))
    assert made["rows"] == 5000 and len(made["features"]) == 10
    of_file, of_profile = drift(reference, current), drift(profile, current)
    for in_file, in_profile in zip(of_file["features"], of_profile["features"], strict=True):
        assert in_profile["scores"] == pytest.approx(in_file["scores"], rel=1e-9, abs=1e-12)
    # Without values what counters say stays.
    tidegate("profile", reference, "--model", "loans", "--out", profile)
    for with_values, without in zip(of_file["features"], drift(profile, current)["features"]):
        kept = {name: value for name, value in with_values["scores"].items() if name in without["scores"]}
        assert without["scores"] == pytest.approx(kept, rel=1e-9, abs=1e-12)
        assert "cell_psi" in kept and "missing" in kept


def test_a_gate_fails_with_a_report(tmp_path):
    reference, current, report = tmp_path / "reference.parquet", tmp_path / "current.parquet", tmp_path / "drift.xml"
    pyarrow.parquet.write_table(table(2000, 0, 1), reference)
    pyarrow.parquet.write_table(table(2000, 0.5, 2), current)
    files = ("--reference", reference, "--current", current)
    tidegate("drift", *files, "--fail-on", "wasserstein=9", "--fail-on", "ks_p=0", "--junit", report)
    assert xml.etree.ElementTree.parse(report).getroot().attrib["failures"] == "0"
    shown = tidegate("drift", *files, "--fail-on", "wasserstein=0.2", "--fail-on", "drifted=0", "--junit", report, code=1)
    assert "beyond: in income: wasserstein is" in shown
    suite = xml.etree.ElementTree.parse(report).getroot()
    failed = [case.attrib["name"] for case in suite if case.find("failure") is not None]
    assert "in income" in failed and "data set" in failed and "in age" not in failed
    assert int(suite.attrib["failures"]) == len(failed) and int(suite.attrib["tests"]) == len(suite) == 11
    # Too few rows are neither good nor bad, unless somebody minds.
    pyarrow.parquet.write_table(table(50, 3, 2), current)
    tidegate("drift", *files, "--fail-on", "drifted=0", "--fail-on", "psi=0.01", "--junit", report)
    assert xml.etree.ElementTree.parse(report).getroot().attrib["skipped"] == "10"
    tidegate("drift", *files, "--fail-on", "insufficient=0", code=1)
    tidegate("drift", *files, "--fail-on", "colour=1", code=2)
    tidegate("drift", "--reference", tmp_path / "none.parquet", "--current", current, code=2)
    (tmp_path / "bad.json").write_text("{}")
    tidegate("drift", "--reference", tmp_path / "bad.json", "--current", current, code=2)


FLOWER = {"name": "features", "datatype": "FP32"}


def test_what_a_gateway_recorded_is_scored_as_evidently_scores_it(tmp_path):
    """A stream that drifts, ten rows to a request; the ledger's Parquet of its halves."""
    random = np.random.default_rng(5)
    reference, current = tmp_path / "reference.parquet", tmp_path / "current.parquet"
    with running(MODELS, tmp_path / "gate") as server:

        def send(requests, shift):
            for _ in range(requests):
                rows = random.normal([5.8 + shift, 3.0, 3.7, 1.2], [0.8, 0.4, 1.7, 0.7], (10, 4)).astype(np.float32)
                tensor = {**FLOWER, "shape": [10, 4], "data": rows.ravel().tolist()}
                status, _, body = server.post("/v2/models/iris/infer", {"inputs": [tensor]})
                assert status == 200, body

        send(130, 0.0)
        # Refused, and so no part of any score.
        assert server.post("/v2/models/iris/infer", {"inputs": []})[0] == 400
        send(60, 0.6)
        export = ("--format", "parquet", "--out", tmp_path / "all.parquet", "--model", "iris")
        tidegate("audit", "export", server.state, *export)
    whole = pyarrow.parquet.read_table(tmp_path / "all.parquet")
    answered = [at for at, status in enumerate(whole["status"].to_pylist()) if status == "ok"]
    assert len(answered) == 190
    pyarrow.parquet.write_table(whole.slice(0, answered[130]), reference)
    pyarrow.parquet.write_table(whole.slice(answered[130]), current)
    ours, theirs = drift(reference, current), evidently(reference, current)
    features = agree(ours, theirs)
    assert set(features) >= {"features[0]", "probabilities[2]", "class(probabilities)", "entropy(probabilities)"}
    assert (ours["reference"]["rows"], ours["current"]["rows"]) == (1300, 600)
    assert features["features[0]"]["state"] == "drifted" and features["features[3]"]["state"] == "steady"
    # A profile by the model's graph has the same features, in the same order as the gateway has them.
    profile = tmp_path / "reference.json"
    made = json.loads(tidegate(
        *("profile", reference, "--model", "iris", "--repository", MODELS, "--out", profile, "--keep-values", "--json")
    ))
    assert made["version"] in (2, "2") and made["notes"] == []
    by_profile = {each["name"]: each["scores"] for each in drift(profile, current)["features"]}
    for name, each in features.items():
        assert by_profile[name] == pytest.approx(each["scores"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("columns", ["names", "lists", "order"])
def test_a_table_of_inputs_alone_is_predicted(tmp_path, columns):
    """The profile is that of a table to which Python's onnxruntime added what the model says."""
    inputs, whole, current, profile = (
        tmp_path / name for name in ("inputs.parquet", "whole.parquet", "current.parquet", "reference.json")
    )
    session = onnxruntime.InferenceSession(MODELS / "iris" / "2" / "model.onnx", providers=["CPUExecutionProvider"])

    def rows(count, shift, seed):
        random = np.random.default_rng(seed)
        flowers = random.normal([5.8, 3.0, 3.7 + shift, 1.2 + shift], [0.8, 0.4, 1.7, 0.7], (count, 4)).astype(np.float32)
        flowers[::100, 1] = np.nan
        (probabilities,) = session.run(["probabilities"], {"features": flowers})
        return flowers, probabilities

    flowers, said = rows(3000, 0.0, 1)
    lists = {"features": flowers.tolist(), "probabilities": said.tolist()}
    pyarrow.parquet.write_table(pyarrow.table(lists), whole)
    named = {
        "names": {"label": ["a"] * 3000} | {f"features[{at}]": flowers[:, at] for at in range(4)},
        "lists": {"features": lists["features"]},
        "order": dict(zip(("sepal_length", "sepal_width", "petal_length", "petal_width"), flowers.T)),
    }
    pyarrow.parquet.write_table(pyarrow.table(named[columns]), inputs)
    moved, said = rows(2000, 0.6, 2)
    pyarrow.parquet.write_table(
        pyarrow.table({"features": moved.tolist(), "probabilities": said.tolist()}), current
    )
    make = ("profile", inputs, "--model", "iris", "--repository", MODELS, "--out", profile, "--keep-values")
    without = json.loads(tidegate(*make, "--json"))
    assert {each["role"] for each in without["features"]} == {"input"}
    assert any("have no column" in note for note in without["notes"])
    made = json.loads(tidegate(*make, "--predict", "--json"))
    assert any("what iris/2 says of 3000 rows" in note for note in made["notes"]), made["notes"]
    assert not any("have no column" in note for note in made["notes"])
    wanted = tmp_path / "wanted.json"
    of_whole = ("profile", whole, "--model", "iris", "--repository", MODELS, "--out", wanted, "--keep-values", "--json")
    assert json.loads(tidegate(*of_whole))["notes"] == []
    by_file = {each["name"]: each for each in drift(wanted, current)["features"]}
    by_profile = {each["name"]: each for each in drift(profile, current)["features"]}
    assert set(by_profile) == set(by_file) >= {"probabilities[2]", "class(probabilities)", "entropy(probabilities)"}
    for name, each in by_file.items():
        assert by_profile[name]["scores"] == pytest.approx(each["scores"], rel=1e-4, abs=1e-6), name
        assert by_profile[name]["state"] == each["state"]
    assert by_profile["class(probabilities)"]["state"] == "drifted"
    tract = json.loads(tidegate(*make, "--predict", "--engine", "tract", "--json"))
    assert any("(tract)" in note for note in tract["notes"]), tract["notes"]
    refused = subprocess.run([BINARY, *map(str, (*make[:4], *make[6:], "--predict"))], capture_output=True, text=True)
    assert refused.returncode == 2 and "--repository" in refused.stderr


def test_a_gateway_tells_what_its_reference_lacks(tmp_path):
    models, inputs = tmp_path / "models", tmp_path / "inputs.parquet"
    shutil.copytree(MODELS / "iris", models / "iris")
    random = np.random.default_rng(3)
    flowers = random.normal([5.8, 3.0, 3.7, 1.2], [0.8, 0.4, 1.7, 0.7], (3000, 4)).astype(np.float32)
    pyarrow.parquet.write_table(pyarrow.table({"features": flowers.tolist()}), inputs)
    make = ("profile", inputs, "--model", "iris", "--repository", models, "--out", models / "iris" / "2" / "reference.json")
    for predict, lacks in (((), True), (("--predict",), False)):
        tidegate(*make, *predict)
        with running(models, tmp_path / f"gate-{lacks}", environment={"TIDEGATE_MONITOR_INTERVAL_S": "1"}) as server:
            for row in flowers[:300]:
                tensor = {**FLOWER, "shape": [1, 4], "data": row.tolist()}
                assert server.post("/v2/models/iris/versions/2/infer", {"inputs": [tensor]})[0] == 200

            def shown():
                text = tidegate("versions", "drift", "iris", "--address", f"http://{server.admin}", "--state-dir", server.state)
                return text if "features[0]" in text else None

            text = eventually(shown)
            assert ("not in the reference, not watched: probabilities" in text) == lacks, text
            assert ("class(probabilities)" in text) != lacks, text


def test_the_page_shows_commands_that_work(tmp_path):
    """The shell blocks of docs/monitor.md, one after the other in one folder, with its example's files."""
    pyarrow.parquet.write_table(table(5000, 0, 1), tmp_path / "train.parquet")
    pyarrow.parquet.write_table(table(2000, 0.0, 2), tmp_path / "june.parquet")
    flowers = np.random.default_rng(4).normal(3, 1, (500, 4))
    pyarrow.csv.write_csv(pyarrow.table({f"features[{at}]": flowers[:, at] for at in range(4)}), tmp_path / "flowers.csv")
    shutil.copytree(MODELS / "iris", tmp_path / "models" / "iris")
    # What needs a gateway is run by test_monitor.
    page = (ROOT / "docs" / "monitor.md").read_text().split("## Online")[0]
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    path = tmp_path / "bin"
    path.mkdir()
    (path / "tidegate").symlink_to(BINARY)
    for block in blocks:
        run = subprocess.run(
            ["bash", "-euc", block], capture_output=True, text=True, cwd=tmp_path, timeout=WITHIN_S,
            env={"PATH": f"{path}:/usr/bin:/bin"},
        )
        assert run.returncode == 0, block + run.stdout + run.stderr
