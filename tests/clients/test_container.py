"""The Dockerfile, as far as that goes without a container engine: linted, its steps checked against this checkout, and
what its default target would hold run as the image asks for, confined as a container is and under the shipped profile.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request

import pytest
from conftest import BINARY, HOST, MODELS, READY_WITHIN_S, ROOT, STOPPED_WITHIN_S, free_ports, latest
from image import Container, children, ignored, lay_out, lay_out_base, stages

SECCOMP = ROOT / "deploy" / "seccomp" / "tidegate.json"
FINAL = ("cpu", "cuda")


@pytest.fixture(scope="module")
def dockerfile():
    return stages()


def test_hadolint_has_nothing_to_say():
    hadolint = pathlib.Path(sys.executable).with_name("hadolint")
    run = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


def test_bases_are_pinned_and_the_default_is_the_small_one(dockerfile):
    for stage in dockerfile.values():
        tag = stage.base.rpartition(":")[2]
        assert "/" not in tag and tag != "latest" and tag != stage.base, f"{stage.name} is not pinned: {stage.base}"
        assert not [name for name, _ in stage.instructions if name == "ADD"], "ADD may fetch and unpack; COPY does not"
    assert list(dockerfile)[-1] == "cpu"
    assert "distroless" in dockerfile["cpu"].base


@pytest.mark.parametrize("name", FINAL)
def test_final_stages_run_as_nobody_in_particular(dockerfile, name):
    stage = dockerfile[name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage.last("USER")), (
        "a number, so that Kubernetes can tell that it is not root"
    )
    assert json.loads(stage.last("ENTRYPOINT")) == ["/usr/local/bin/tidegate"]
    assert json.loads(stage.last("CMD")) == ["serve"]
    assert json.loads(stage.last("HEALTHCHECK").partition("CMD ")[2]) == ["/usr/local/bin/tidegate", "health"]
    assert stage.last("STOPSIGNAL") == "SIGTERM"
    assert json.loads(stage.last("VOLUME")) == [stage.environment["TIDEGATE_SERVER_STATE_DIR"]]
    ports = {
        stage.environment[f"TIDEGATE_SERVER_{each}_ADDRESS"].partition(":")[2] for each in ("HTTP", "GRPC", "METRICS")
    }
    assert ports == set(stage.last("EXPOSE").split())
    # Nothing is installed or run in what ships.
    assert not [value for instruction, value in stage.instructions if instruction in ("RUN", "SHELL")]


def test_both_targets_differ_only_where_they_must(dockerfile):
    cpu, cuda = (dict(dockerfile[name].environment) for name in FINAL)
    for variable in ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"):
        cuda.pop(variable)
    assert cpu == cuda
    plain = [
        [
            (name, value.replace("cuda", "cpu"))
            for name, value in dockerfile[each].instructions
            if name not in ("LABEL", "ENV")
        ]
        for each in FINAL
    ]
    assert plain[0] == plain[1]


def test_what_is_copied_is_there_and_nothing_else_is_sent(dockerfile):
    for stage in dockerfile.values():
        for source, paths, _ in stage.copies():
            if source is not None:
                assert source in dockerfile
                continue
            for path in paths:
                assert (ROOT / path).exists(), f"{stage.name} copies {path}, which is not there"
                assert not ignored(path), f".dockerignore leaves out {path}, which {stage.name} copies"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        copied = [
            path
            for stage in dockerfile.values()
            for source, paths, _ in stage.copies()
            if source is None
            for path in paths
        ]
        for path in tracked.stdout.splitlines():
            if not any(path == each or path.startswith(each + "/") for each in copied):
                assert ignored(path), f"{path} is sent to the build and not used by it"
    for path in ("target/debug/tidegate", ".git/config", ".cache/onnxruntime/VERSION", "tests/.venv/bin/python"):
        assert ignored(path)


def test_the_build_stage_has_all_that_cargo_needs(dockerfile, tmp_path):
    """Cargo refuses a manifest that names a file which was not copied; and the code includes no other file."""
    for source, paths, destination in dockerfile["build"].copies():
        assert source is None
        for path in paths:
            target = tmp_path / destination / (pathlib.PurePath(path).name if destination.endswith("/") else "")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(ROOT / path, target) if (ROOT / path).is_dir() else shutil.copy2(ROOT / path, target)
    command = ["cargo", "metadata", "--locked", "--offline", "--no-deps", "--format-version", "1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    (package,) = (each for each in json.loads(run.stdout)["packages"] if each["name"] == "tidegate")
    for target in package["targets"]:
        assert pathlib.Path(target["src_path"]).exists(), target
    built = [value for name, value in dockerfile["build"].instructions if name == "RUN"]
    (profile,) = re.findall(r"--profile (\w+)", built[0])
    assert profile in tomllib.loads((tmp_path / "Cargo.toml").read_text())["profile"]
    assert f"target/{profile}/tidegate" in built[0]
    for file in (tmp_path / "src").rglob("*.rs"):
        code = file.read_text().partition("#[cfg(test)]")[0]
        if file.name == "tests.rs" or file.parent.name == "tests":
            continue
        for included in re.findall(r'include_(?:str|bytes)!\("([^"]+)"\)', code):
            assert (file.parent / included).exists(), f"{file.name} includes {included}, which is not copied"


def test_the_build_image_is_new_enough(dockerfile):
    """For this package and for every crate that it is locked to."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    packages = {each["name"]: each["rust_version"] or "1.0" for each in json.loads(run.stdout)["packages"]}
    (there,) = re.findall(r"rust:(\d+)\.(\d+)", dockerfile["build"].base)
    too_new = {
        name: wanted for name, wanted in packages.items() if [*map(int, wanted.split("."))][:2] > [*map(int, there)]
    }
    assert not too_new and packages["tidegate"]


def test_onnxruntimes_script_fails_the_image_when_it_fetches_nothing(dockerfile, tmp_path):
    """The script goes on without the library where it cannot be had; the stage's second command is what stops then."""
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "uname", "cat"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    script = ROOT / "scripts" / "fetch-onnxruntime.sh"
    run = subprocess.run(
        [shutil.which("bash"), script, "--gpu", tmp_path / "ort"],
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "python3 is not installed" in run.stderr
    for name in ("onnxruntime-cpu", "onnxruntime-cuda"):
        (command,) = (value for instruction, value in dockerfile[name].instructions if instruction == "RUN")
        (checked,) = re.findall(r"&& test -s (\S+)$", command)
        assert not (tmp_path / "ort" / pathlib.PurePath(checked).relative_to("/opt/onnxruntime")).exists()


class Image:
    """The default target's files, and how the image says that they run."""

    def __init__(self, stage, folder):
        self.stage, self.folder = stage, folder
        self.root = folder / "root"
        self.root.mkdir(parents=True)
        lay_out_base(self.root)
        lay_out(stage, self.root)
        shutil.copytree(MODELS, self.root / "models", dirs_exist_ok=True)
        self.http, self.grpc, self.metrics = (f"{HOST}:{port}" for port in free_ports(3))
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            **stage.environment,
            # Ports of this machine, because the network is its own; addresses as in the image.
            "TIDEGATE_SERVER_HTTP_ADDRESS": self.http.replace(HOST, "0.0.0.0"),
            "TIDEGATE_SERVER_GRPC_ADDRESS": self.grpc.replace(HOST, "0.0.0.0"),
            "TIDEGATE_SERVER_METRICS_ADDRESS": self.metrics.replace(HOST, "0.0.0.0"),
        }
        self.started = 0

    def run(self, arguments, seccomp=True, **environment):
        self.started += 1
        (state,) = json.loads(self.stage.last("VOLUME"))
        return Container(
            root=self.root,
            folder=self.folder / str(self.started),
            argv=arguments,
            environment=self.environment | environment,
            seccomp=json.loads(SECCOMP.read_text()) if seccomp else None,
            writable=[state],
            uid=int(self.stage.last("USER").partition(":")[0]),
        )

    def command(self):
        return json.loads(self.stage.last("ENTRYPOINT")) + json.loads(self.stage.last("CMD"))

    def health(self):
        check = self.run(json.loads(self.stage.last("HEALTHCHECK").partition("CMD ")[2]))
        return check.wait(30), check.output


@pytest.fixture
def image(dockerfile, tmp_path):
    assert BINARY.exists(), f"{BINARY} is not built: cargo build"
    made = Image(dockerfile["cpu"], tmp_path)
    yield made
    shutil.rmtree(made.root)  # A debug build is large.


@contextlib.contextmanager
def serving(image, **environment):
    container = image.run(image.command(), TIDEGATE_SERVER_ALLOW_UNAUTHENTICATED="true", **environment)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while image.health()[0] != 0:
            assert container.process.poll() is None, container.output
            assert time.monotonic() < deadline, container.output
        yield container
    finally:
        container.kill()


def status_of(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_image_brings_the_licences_of_what_is_in_it(image):
    documents = image.root / "usr/share/doc"
    assert "Apache License" in (documents / "tidegate/LICENSE").read_text()
    assert "MIT" in (documents / "onnxruntime/LICENSE").read_text()
    assert (documents / "onnxruntime/ThirdPartyNotices.txt").stat().st_size > 100_000
    notices = (documents / "tidegate/THIRD-PARTY-NOTICES.txt").read_text()
    for crate in ("tokio v", "hyper v", "tract-onnx v", "ort v"):
        assert crate in notices, crate
    assert "tidegate v" not in notices and str(ROOT) not in notices


def test_the_image_alone_refuses_to_serve_everyone(image):
    container = image.run(image.command())
    assert container.wait(60) == 2, container.output
    assert "server.allow_unauthenticated" in container.output
    assert image.health()[0] == 1, "nothing listens"


def test_the_image_checks_before_it_serves(image):
    """The documented pre-flight: the configuration, and each model on the engines that the image has."""
    program = json.loads(image.stage.last("ENTRYPOINT"))
    check = image.run([*program, "check-config", "--json"], TIDEGATE_SERVER_ALLOW_UNAUTHENTICATED="true")
    assert check.wait(60) == 0, check.output
    assert json.loads(check.output)["ok"]
    validate = image.run([*program, "models", "validate", "/models", "--json"], TMPDIR="/var/lib/tidegate")
    assert validate.wait(120) == 0, validate.output
    assert len(json.loads(validate.output)) == 5


def test_the_image_serves_confined_and_stops_cleanly(image):
    with serving(image) as container:
        status = status_of(container.pid)
        assert status["NSpid"].split()[-1] == "1"
        assert pathlib.Path(f"/proc/{container.pid}/uid_map").read_text().split()[0] == "65532"
        assert {int(status[each], 16) for each in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        mounts = [line.split() for line in pathlib.Path(f"/proc/{container.pid}/mountinfo").read_text().splitlines()]
        writable = {mount[4] for mount in mounts if "rw" in mount[5].split(",")}
        assert writable == {"/var/lib/tidegate", "/proc", "/dev/null", "/dev/zero", "/dev/urandom"}

        # Every model was tried in a child process, which needs the profile too, and on ONNX Runtime: risk has trees.
        assert "serving without ONNX Runtime" not in container.output, container.output
        for model in ("iris", "digits", "risk", "topics"):
            case = latest(model)
            inputs = [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": case.datatypes[name],
                    "data": array.ravel().tolist(),
                }
                for name, array in case.feed.items()
            ]
            request = urllib.request.Request(
                f"http://{image.http}/v2/models/{model}/infer", json.dumps({"inputs": inputs}).encode(), method="POST"
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert json.loads(answer.read())["model_name"] == model
        assert set(children(container.pid).values()) <= {"R", "S", "D"}, "PID 1 waits for what it starts"

        code, output = image.health()
        assert (code, output.split(":")[0]) == (0, "ok")
        os.kill(container.pid, signal.SIGTERM)
        assert container.wait(STOPPED_WITHIN_S) == 0, container.output
    assert (image.root / "var/lib/tidegate/cache/models").is_dir()
    assert not list((image.root / "tmp").iterdir())
    assert image.health()[0] == 1


def give_processors(image, count):
    """Control group files for the container's /sys, of the version that this kernel has."""
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = "sys/fs/cgroup", {"cgroup.controllers": "cpu", "cpu.max": f"{count}00000 100000"}
        elif "cpu" in controllers.split(","):
            base, files = "sys/fs/cgroup/cpu", {"cpu.cfs_quota_us": f"{count}00000", "cpu.cfs_period_us": "100000"}
        else:
            continue
        for folder in {image.root / base, image.root / base / path.lstrip("/")}:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text + "\n")


@pytest.mark.parametrize("count", [1, 2])
def test_the_processor_quota_says_how_many_threads_compute(image, count):
    give_processors(image, count)
    with serving(image) as container:
        tasks = pathlib.Path(f"/proc/{container.pid}/task").iterdir()
        lanes = [name for task in tasks if (name := (task / "comm").read_text().strip()).startswith("lane-iris-2")]
        assert len(lanes) == min(count, len(os.sched_getaffinity(0)))


def test_the_health_check_tells_alive_from_ready(image):
    """Alive while draining and while models load, which is when a restart would be wrong; ready is neither."""
    with serving(image, TIDEGATE_SERVER_DRAIN_NOTICE_MS="8000") as container:
        os.kill(container.pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while image.health()[0] == 0:
            assert time.monotonic() < deadline, "still ready"
        live = image.run(["/usr/local/bin/tidegate", "health", "--live", "--json"])
        assert live.wait(30) == 0, live.output
        assert json.loads(live.output)["status"] == 200
        assert container.wait(STOPPED_WITHIN_S) == 0, container.output


def test_the_profile_forbids_what_the_gateway_never_does(tmp_path):
    """With this machine's Python as the program: new namespaces, raw sockets, tracing and mounts are refused."""
    script = tmp_path / "try.py"
    script.write_text(
        """
import ctypes, json, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def refused(call, *arguments):
    ctypes.set_errno(0)
    return getattr(libc, call)(*arguments) == -1 and ctypes.get_errno() == 1
found = {
    "unshare": refused("unshare", 0x10000000),
    "ptrace": refused("ptrace", 0, 0, 0, 0),
    "mount": refused("mount", None, b"/", None, 32, None),
    "setns": refused("setns", 0, 0),
}
for family in (socket.AF_PACKET, socket.AF_ALG, socket.AF_VSOCK):
    try:
        socket.socket(family, socket.SOCK_DGRAM).close()
    except PermissionError:
        found[str(int(family))] = True
socket.socket().close()
thread = threading.Thread(target=lambda: found.update(thread=True))
thread.start(); thread.join()
print(json.dumps(found))
"""
    )
    runner = tmp_path / "run.py"
    runner.write_text(
        f"import sys, os, json; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); import confine\n"
        f"load = confine.seccomp(json.load(open({str(SECCOMP)!r})))\n"
        "confine.drop_everything()\n"
        "load()\n"
        f"os.execv(sys.executable, [sys.executable, {str(script)!r}])\n"
    )
    run = subprocess.run([sys.executable, runner], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found) == {"unshare", "ptrace", "mount", "setns", "17", "38", "40", "thread"} and all(found.values()), (
        found
    )
