"""Runs inside the environment that has Evidently and scipy; prints what they say of two files as JSON.

    python evidently_scores.py REFERENCE CURRENT
"""

import json
import math
import pathlib
import sys
import warnings

import numpy as np
import pandas as pd
import scipy.special
import scipy.stats
from evidently import DataDefinition, Dataset, Report
from evidently.core.datasets import infer_column_type
from evidently.legacy.calculations import stattests
from evidently.legacy.core import ColumnType
from evidently.presets import DataDriftPreset

warnings.filterwarnings("ignore")

TESTS = {
    "psi": stattests.psi_stat_test,
    "kl_div": stattests.kl_div_stat_test,
    "jensenshannon": stattests.jensenshannon_stat_test,
    "hellinger": stattests.hellinger_stat_test,
}


def frame(path):
    """A file as it is; the ledger's lists of numbers as a column for each element, doubles as our scores are of."""
    path = pathlib.Path(path)
    table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    if "prediction_id" not in table:
        return table
    table = table[(table.kind == "prediction") & (table.status == "ok")]
    columns = {}
    for name in [name for name in table if name.startswith(("in_", "out_")) and not name.endswith("_shape")]:
        shapes = np.vstack(table[name + "_shape"].to_list())
        rows = np.concatenate(table[name].to_list()).reshape(-1, *shapes[0][1:])
        tensor = name.split("_", 1)[1]
        if rows.ndim == 1:
            columns[tensor] = rows
            continue
        columns |= {f"{tensor}[{at}]": column.astype(np.float64) for at, column in enumerate(rows.T)}
        if name.startswith("out_") and np.allclose(rows.sum(axis=1), 1, atol=1e-3):
            rows = rows.astype(np.float64)
            best = np.sort(rows, axis=1)[:, ::-1]
            columns[f"class({tensor})"] = rows.argmax(axis=1).astype(str)
            columns[f"confidence({tensor})"] = best[:, 0]
            columns[f"margin({tensor})"] = best[:, 0] - best[:, 1]
            columns[f"entropy({tensor})"] = scipy.special.entr(rows).sum(axis=1)
    return pd.DataFrame(columns)


def scores(reference, current, kind):
    numeric = kind == ColumnType.Numerical
    clean = [side.replace([np.inf, -np.inf], np.nan).dropna() if numeric else side.dropna() for side in (reference, current)]
    found = {name: test(*(side.copy() for side in clean), kind, None).drift_score for name, test in TESTS.items()}
    if numeric:
        found["wasserstein"] = stattests.wasserstein_stat_test(*clean, kind, None).drift_score
        found["ks"], found["ks_p"] = scipy.stats.ks_2samp(*clean)
    else:
        found["chisquare_p"] = stattests.chi_stat_test(*clean, kind, None).drift_score
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def main(reference, current):
    reference, current = frame(reference), frame(current)
    kinds = {name: infer_column_type(reference[name]) for name in reference}
    definition = DataDefinition(
        numerical_columns=[name for name, kind in kinds.items() if kind == ColumnType.Numerical],
        categorical_columns=[name for name, kind in kinds.items() if kind == ColumnType.Categorical],
    )
    sides = [Dataset.from_pandas(side, data_definition=definition) for side in (reference, current)]
    result = json.loads(Report([DataDriftPreset()]).run(sides[1], sides[0]).json())
    verdicts, dataset = {}, None
    for metric in result["metrics"]:
        if metric["metric_name"].startswith("ValueDrift("):
            verdicts[metric["config"]["column"]] = metric["value"]
        elif metric["metric_name"].startswith("DriftedColumnsCount"):
            dataset = metric["value"]
    print(json.dumps({
        "scores": {name: scores(reference[name], current[name], kind) for name, kind in kinds.items()},
        "verdicts": verdicts,
        "dataset": dataset,
    }))


main(*sys.argv[1:])
