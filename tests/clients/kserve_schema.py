"""Checks resources of operators, KServe's and Prometheus's, against Python models of their definitions. Run in KServe's
environment; reads a JSON list.

KServe's models are generated from the resource definitions: each class lists its attributes, their names on the wire and
their types. The generated code takes anything, so this walks the types itself. Prints a list of problems per document.
"""

import json
import re
import sys

import kserve
import kubernetes.client

PLAIN = {"str": (str,), "int": (int,), "bool": (bool,), "float": (float, int), "object": (object,), "datetime": (str,)}
LIST, DICT = re.compile(r"^[Ll]ist\[(.+)\]$"), re.compile(r"^[Dd]ict[\[(](\w+), (.+)[\])]$")


def model(name):
    for module in (kserve, kserve.models, kubernetes.client):
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(name)


def check(value, kind, path, problems):
    if match := LIST.match(kind):
        if not isinstance(value, list):
            problems.append(f"{path}: expected a list, got {value!r}")
            return
        for at, each in enumerate(value):
            check(each, match[1], f"{path}[{at}]", problems)
    elif match := DICT.match(kind):
        if not isinstance(value, dict):
            problems.append(f"{path}: expected a map, got {value!r}")
            return
        for name, each in value.items():
            check(each, match[2], f"{path}.{name}", problems)
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind in ("int", "float")):
            problems.append(f"{path}: expected {kind}, got {value!r}")
    else:
        check_model(value, model(kind), path, problems)


def check_model(value, kind, path, problems):
    if not hasattr(kind, "openapi_types"):
        return  # A quantity or the like: a scalar with a class of its own.
    if not isinstance(value, dict):
        problems.append(f"{path}: expected a map, got {value!r}")
        return
    wire = {on_wire: attribute for attribute, on_wire in kind.attribute_map.items()}
    for name, each in value.items():
        if name in wire:
            check(each, kind.openapi_types[wire[name]], f"{path}.{name}", problems)
        else:
            problems.append(f"{path}.{name}: no field of {kind.__name__}")
    try:
        # The constructor knows which fields must be there.
        kind(**{wire[name]: each for name, each in value.items() if name in wire})
    except (TypeError, ValueError) as error:
        problems.append(f"{path}: {error}")


def check_pod_monitor(value, problems):
    """These models check types and drop what they do not know: then less comes out than went in."""
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    try:
        kept = PodMonitor.model_validate(value).model_dump(mode="json", by_alias=True, exclude_unset=True)
    except ValueError as error:
        problems.append(str(error))
    else:
        if kept != value:
            problems.append(f"not all of it is known; what is: {kept}")


KINDS = {
    ("serving.kserve.io/v1alpha1", "ClusterServingRuntime"): "V1alpha1ClusterServingRuntime",
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
}


def main():
    answers = []
    for document in json.load(sys.stdin):
        problems = []
        if document["kind"] == "PodMonitor":
            check_pod_monitor(document, problems)
        else:
            kind = KINDS[document["apiVersion"], document["kind"]]
            check_model(document, model(kind), document["kind"], problems)
        answers.append(problems)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
