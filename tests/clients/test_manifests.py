"""The Kubernetes and KServe manifests: against the schemas of the versions we support, against one another, and against
what the gateway itself says of its configuration, ports, routes and metrics."""

import copy
import json
import pathlib
import re
import shutil
import subprocess
import tomllib
import urllib.request

import kubernetes_validate
import pytest
import yaml
from conftest import BINARY, MODELS, ROOT, running
from image import stages
from test_kserve import PYTHON

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
# The oldest where every field that we use is stable, and the newest whose schema is at hand.
VERSIONS = ("1.27", "1.37")
# Kinds of operators that are not part of Kubernetes.
FOREIGN = {"PodMonitor", "ClusterServingRuntime", "InferenceService"}
FLUSH_S = 3


def documents(path):
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def resources():
    """Every Kubernetes resource in `deploy/`, as written."""
    found = []
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        if path.name in ("kustomization.yaml", "prometheus-adapter-values.yaml"):
            continue
        found += [(path, each) for each in documents(path)]
    return found


def kustomizations():
    return {path.parent: documents(path)[0] for path in KUBERNETES.rglob("kustomization.yaml")}


def built(overlay):
    """What is applied: by kustomize where there is one, otherwise the files that it would put together."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        return [each for each in yaml.safe_load_all(run.stdout) if each]
    found = [each for path, each in resources() if "overlays" not in path.parts and each["kind"] not in FOREIGN]
    for patch in kustomizations()[KUBERNETES / "overlays" / overlay].get("patches", ()):
        (change,) = documents(KUBERNETES / "overlays" / overlay / patch["path"])
        merge(one(found, change["kind"], change["metadata"]["name"]), change)
    return found


def merge(there, change):
    """A patch's fields over a resource's, as kustomize does it: maps by key, lists of named things by name."""
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(there.get(key), dict):
            merge(there[key], value)
        elif isinstance(value, list) and key in there and all("name" in each for each in value):
            for each in value:
                (same,) = (old for old in there[key] if old["name"] == each["name"])
                merge(same, each)
        else:
            there[key] = value


def one(found, kind, name="tidegate"):
    (match,) = (each for each in found if each["kind"] == kind and each["metadata"]["name"] == name)
    return match


def valid(resource, version):
    kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", ["cpu", "cuda"])
def test_every_resource_fits_its_schema(version, overlay):
    written = [each for path, each in resources() if each["kind"] not in FOREIGN and path.name != "gpu.yaml"]
    for resource in [*written, *built(overlay)]:
        valid(resource, version)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Deployment", lambda spec: spec["template"]["spec"]["containers"][0].update(readinesProbe={})),
        ("Deployment", lambda spec: spec["template"]["spec"]["containers"][0]["ports"][0].update(containerPort="http")),
        ("Deployment", lambda spec: spec.pop("selector")),
        ("HorizontalPodAutoscaler", lambda spec: spec["metrics"][0]["pods"].pop("metric")),
        ("NetworkPolicy", lambda spec: spec["ingress"][0]["from"][0].update(podSelector=[])),
        ("PodDisruptionBudget", lambda spec: spec.update(maxUnavailible=1)),
        ("Service", lambda spec: spec["ports"][0].update(appProtocol=1)),
    ],
)
def test_a_wrong_field_is_found(kind, change):
    resource = copy.deepcopy(
        next(each for path, each in resources() if each["kind"] == kind and path.name != "gpu.yaml")
    )
    valid(resource, VERSIONS[-1])
    change(resource["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(resource, VERSIONS[-1])


def test_kustomizations_name_files_that_exist_and_leave_none_out():
    known = {"apiVersion", "kind", "labels", "resources", "components", "configMapGenerator", "images", "patches"}
    for folder, kustomization in kustomizations().items():
        assert set(kustomization) <= known
        named = {
            *kustomization.get("resources", ()),
            *(each["path"] for each in kustomization.get("patches", ()) if "path" in each),
        }
        for path in [*named, *kustomization.get("components", ())]:
            assert (folder / path).exists(), f"{folder}: {path}"
        for generator in kustomization.get("configMapGenerator", ()):
            assert all((folder / file).exists() for file in generator["files"])
        there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml", "prometheus-adapter-values.yaml"}
        assert there <= named, f"{folder} has files that nothing applies"


@pytest.mark.parametrize("overlay", ["cpu", "cuda"])
def test_the_pod_is_confined(overlay):
    pod = one(built(overlay), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    security = pod["securityContext"]
    uid, _, gid = stages()["cpu"].last("USER").partition(":")
    assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, int(uid), int(gid))
    assert security["seccompProfile"]["type"] == "RuntimeDefault"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == set(volumes)
    writable = [each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")]
    assert writable == [stages()["cpu"].environment["TIDEGATE_SERVER_STATE_DIR"]]
    assert not any("hostPath" in each for each in volumes.values())
    limits = container["resources"]["limits"]
    assert limits["memory"].endswith("Gi") and limits["cpu"]
    assert ("nvidia.com/gpu" in limits) == (overlay == "cuda")


@pytest.mark.parametrize("overlay", ["cpu", "cuda"])
def test_resources_fit_together(overlay):
    found = built(overlay)
    deployment = one(found, "Deployment")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    (container,) = template["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    image = stages()[overlay].environment
    for name in ("http", "grpc", "metrics"):
        assert image[f"TIDEGATE_SERVER_{name.upper()}_ADDRESS"] == f"0.0.0.0:{ports[name]}"
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])

    def selects(selector):
        return selector and selector.items() <= labels.items()

    assert selects(deployment["spec"]["selector"]["matchLabels"])
    for service in (each for each in found if each["kind"] == "Service"):
        assert selects(service["spec"]["selector"])
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= set(ports)
    assert selects(one(found, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    policy = one(found, "NetworkPolicy")["spec"]
    assert selects(policy["podSelector"]["matchLabels"])
    # Who may call is said by this label alone: kustomize adds common labels to selectors when it is asked for it.
    assert policy["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"tidegate-client": "true"}}}]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == set(ports)
    assert policy["egress"] == []
    autoscaler = one(found, "HorizontalPodAutoscaler")["spec"]
    assert autoscaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    volumes = {each["name"]: each for each in template["spec"]["volumes"]}
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert one(found, "PersistentVolumeClaim", claim)
    assert template["spec"]["serviceAccountName"] == one(found, "ServiceAccount")["metadata"]["name"]
    if shutil.which("kubectl"):
        assert "replicas" not in deployment["spec"], "or an apply undoes the autoscaler's number"
        config = volumes["config"]["configMap"]["name"]
        assert re.fullmatch(r"tidegate-config-\w+", config) and one(found, "ConfigMap", config)


def test_the_seccomp_component_replaces_the_profile():
    (patch,) = kustomizations()[KUBERNETES / "components" / "seccomp"]["patches"]
    (operation,) = yaml.safe_load(patch["patch"])
    deployment = one([each for path, each in resources() if path.name == "deployment.yaml"], "Deployment")
    place = deployment
    *path, last = operation["path"].strip("/").split("/")
    for step in path:
        place = place[step]
    assert last in place
    place[last] = operation["value"]
    valid(deployment, VERSIONS[-1])
    assert operation["value"]["localhostProfile"] == "profiles/tidegate.json"
    assert (DEPLOY / "seccomp" / "tidegate.json").exists()


def settings():
    """The gateway's configuration in the cluster: the file, under the image's and the Deployment's variables."""
    deployment = one([each for path, each in resources() if path.name == "deployment.yaml"], "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    return deployment, container, {**stages()["cpu"].environment, **variables}


def test_the_gateway_accepts_its_configuration():
    _, container, variables = settings()
    command, config = container["args"]
    assert (command, config) == ("serve", "--config=/etc/tidegate/tidegate.toml")
    arguments = [
        "check-config",
        "--config",
        str(KUBERNETES / "base" / "tidegate.toml"),
        "--model-repository",
        str(MODELS),
        "--json",
    ]
    run = subprocess.run([BINARY, *arguments], env=variables, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert found["ok"] and not found["warnings"], found
    # What is unsafe about it is what the network policy is there for, and nothing else.
    assert {each.partition(":")[0] for each in found["unsafe"]} == {
        "server.http_address",
        "server.grpc_address",
        "server.metrics_address",
    }
    del variables["TIDEGATE_SERVER_ALLOW_UNAUTHENTICATED"]
    run = subprocess.run([BINARY, *arguments], env=variables, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2


def test_a_pod_has_time_to_drain_and_memory_to_try_a_model():
    deployment, container, _ = settings()
    config = tomllib.loads((KUBERNETES / "base" / "tidegate.toml").read_text())
    needed = (config["server"]["drain_notice_ms"] + config["server"]["drain_grace_ms"]) / 1000 + FLUSH_S
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= needed
    # At least one probe sees the notice.
    ready = container["readinessProbe"]
    assert config["server"]["drain_notice_ms"] / 1000 >= ready["periodSeconds"] + ready["timeoutSeconds"]
    memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * 1024
    assert config["probe"]["memory_max_mb"] < memory


def test_probes_and_metrics_are_what_the_gateway_has(server):
    _, container, _ = settings()
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        get = container[probe]["httpGet"]
        assert get["port"] == "metrics"
        assert server.get(get["path"], server.metrics)[0] == 200
    autoscaler = one([each for _, each in resources()], "HorizontalPodAutoscaler")
    wanted = {each["pods"]["metric"]["name"] for each in autoscaler["spec"]["metrics"]}
    page = server.get("/metrics", server.metrics)[1].decode()
    for name in wanted:
        assert f"# TYPE {name} gauge" in page
    values = documents(KUBERNETES / "components" / "autoscaling" / "prometheus-adapter-values.yaml")[0]
    (rule,) = values["rules"]["custom"]
    (pattern,) = re.findall(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert all(re.fullmatch(pattern, name) for name in wanted)
    assert {"<<.Series>>", "<<.LabelMatchers>>", "<<.GroupBy>>"} <= set(re.findall(r"<<[^>]+>>", rule["metricsQuery"]))
    monitor = one([each for _, each in resources()], "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {each["name"] for each in container["ports"]} and endpoint["path"] == "/metrics"


def operators_problems(found):
    """By the operators' own models, which live in an environment of their own."""
    run = subprocess.run(
        [PYTHON, pathlib.Path(__file__).with_name("kserve_schema.py")],
        input=json.dumps(found),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_pod_monitor_fits_its_schema():
    monitor = one([each for _, each in resources()], "PodMonitor")
    unknown, wrong = copy.deepcopy(monitor), copy.deepcopy(monitor)
    unknown["spec"]["podMetricEndpoints"] = []
    wrong["spec"]["podMetricsEndpoints"] = "metrics"
    right, *refused = operators_problems([monitor, unknown, wrong])
    assert not right and all(refused)


def kserve_documents():
    return documents(DEPLOY / "kserve" / "clusterservingruntime.yaml") + documents(
        DEPLOY / "kserve" / "inferenceservice.yaml"
    )


def test_kserve_resources_fit_kserves_own_models():
    found = kserve_documents()
    assert operators_problems(found) == [[] for _ in found]
    runtime, *services = found
    # KServe makes a pod of it: its containers and volumes fit Kubernetes too, which is the stricter of the two.
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {each: runtime["spec"][each] for each in ("containers", "volumes")},
    }
    for version in VERSIONS:
        valid(pod, version)
    for service in services:
        model = service["spec"]["predictor"]["model"]
        assert model["runtime"] == runtime["metadata"]["name"]
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
        assert model["modelFormat"]["name"] in {each["name"] for each in runtime["spec"]["supportedModelFormats"]}


@pytest.mark.parametrize(
    "change",
    [
        lambda runtime, service: runtime["spec"].update(supportedModelFormat=[]),
        lambda runtime, service: runtime["spec"].update(multiModel="false"),
        lambda runtime, service: runtime["spec"].update(protocolVersions="v2"),
        lambda runtime, service: runtime["spec"].pop("containers"),
        lambda runtime, service: runtime["spec"]["containers"][0]["ports"][0].update(containerPort="8080"),
        lambda runtime, service: service["spec"]["predictor"]["model"].pop("modelFormat"),
        lambda runtime, service: service["spec"]["predictor"].update(modell={}),
    ],
)
def test_a_wrong_field_is_found_by_kserves_models(change):
    found = kserve_documents()[:2]
    change(*found)
    assert any(operators_problems(found))


@pytest.mark.parametrize("layout", ["file", "versions", "repository"])
def test_the_kserve_runtime_serves_what_kserve_mounts(tmp_path, layout):
    """The runtime's own arguments, with its templated name filled in, over each layout that a storage URI may have."""
    mounted = tmp_path / "mnt" / "models"
    if layout == "file":
        shutil.copytree(MODELS / "iris" / "2", mounted)
    elif layout == "versions":
        shutil.copytree(MODELS / "iris", mounted)
    else:
        shutil.copytree(MODELS / "iris", mounted / "iris")
    (runtime,) = documents(DEPLOY / "kserve" / "clusterservingruntime.yaml")
    (container,) = runtime["spec"]["containers"]
    name = "iris" if layout == "repository" else "flowers"
    given = [each.replace("{{.Name}}", name) for each in container["args"]]
    assert given[0] == "serve" and "--model-repository=/mnt/models" in given and f"--model-name={name}" in given
    (port,) = (each["containerPort"] for each in container["ports"])
    assert f"--http-address=0.0.0.0:{port}" in given
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert variables["TIDEGATE_SERVER_HTTP_ADDRESS"] == f"0.0.0.0:{port}", "where the health check asks"
    check = subprocess.run(
        [
            BINARY,
            "check-config",
            *(each for each in given[1:] if not each.startswith("--model-repository")),
            f"--model-repository={mounted}",
            "--json",
        ],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert check.returncode == 0 and not json.loads(check.stdout)["warnings"], check.stdout + check.stderr

    with running(mounted, tmp_path / "server", config=f'[repository]\nmodel_name = "{name}"\n') as server:
        versions = {"file": ["1"], "versions": ["1", "2"], "repository": ["1", "2"]}[layout]
        index = json.loads(server.post("/v2/repository/index", b"{}")[2])
        assert [(each["name"], each["version"], each["state"]) for each in index] == [
            (name, version, "READY") for version in versions
        ]
        body = {"instances": [[5.1, 3.5, 1.4, 0.2]]}
        status, _, answer = server.post(f"/v1/models/{name}:predict", body, {"content-type": "application/json"})
        assert status == 200 and len(json.loads(answer)["predictions"]) == 1, answer
        with urllib.request.urlopen(f"http://{server.http}/v2/models/{name}/ready", timeout=10) as ready:
            assert ready.status == 200
