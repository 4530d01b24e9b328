"""Reads the Dockerfile and lays out what its stages copy, as far as that goes without a container engine."""

import fnmatch
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

from conftest import BINARY, ROOT
from dockerfile_parse import DockerfileParser

CONFINE = pathlib.Path(__file__).with_name("confine.py")
ONNXRUNTIME = ROOT / ".cache" / "onnxruntime"
# The libraries of gcr.io/distroless/cc-debian12: packages libc6, libgcc-s1, libgomp1 and libstdc++6.
BASE_LIBRARIES = (
    "ld-linux-x86-64.so.2 ld-linux-aarch64.so.1 libc.so.6 libdl.so.2 libm.so.6 libpthread.so.0 libresolv.so.2 "
    "librt.so.1 libgcc_s.so.1 libgomp.so.1 libstdc++.so.6 libnss_dns.so.2 libnss_files.so.2"
).split()


class Stage:
    """One FROM and what follows it, with build arguments filled in."""

    def __init__(self, name, base, arguments):
        self.name, self.base, self.arguments = name, base, dict(arguments)
        self.instructions, self.environment, self.labels = [], {}, {}
        self.user = self.entrypoint = self.command = self.health = None

    def last(self, instruction):
        values = [value for name, value in self.instructions if name == instruction]
        return values[-1] if values else None

    def copies(self):
        """Each COPY: stage or None, sources, destination."""
        for name, value in self.instructions:
            if name == "COPY":
                words = value.split()
                flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
                words = [word for word in words if not word.startswith("--")]
                yield flags.get("from"), words[:-1], words[-1]


def filled(text, arguments):
    for name, value in arguments.items():
        text = text.replace("${" + name + "}", value)
    return text


def stages():
    with (ROOT / "Dockerfile").open("rb") as file:
        parser = DockerfileParser(fileobj=file)
        structure = parser.structure
    found, outside = [], {}
    for each in structure:
        name, value = each["instruction"], each["value"]
        if name == "FROM":
            words = filled(value, outside).split()
            found.append(Stage(words[2] if len(words) > 2 else str(len(found)), words[0], outside))
        elif name == "ARG" and not found:
            key, _, default = value.partition("=")
            outside[key] = default
        elif name != "COMMENT":
            found[-1].instructions.append((name, value))
            if name == "ENV":
                found[-1].environment.update(word.split("=", 1) for word in value.split())
    return {stage.name: stage for stage in found}


def ignored(path):
    """What .dockerignore says of a path: the last pattern that matches it or a folder above it wins."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").strip("/")
        parts = pathlib.PurePath(path).parts
        above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if any(fnmatch.fnmatchcase(each, pattern) for each in above):
            verdict = not line.startswith("!")
    return verdict


def place(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def collect_licences(file):
    """As the build stage does, from the crates that the tested binary was built of."""
    script = ROOT / "scripts" / "collect-licences.sh"
    run = subprocess.run([script, file], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def lay_out(stage, root):
    """Does the stage's COPY instructions; other stages' results come from where this checkout keeps the like."""
    notices = root.parent / "THIRD-PARTY-NOTICES.txt"
    collect_licences(notices)
    results = {"build": {"/out/tidegate": BINARY, "/out/state": None, "/out/THIRD-PARTY-NOTICES.txt": notices}}
    for source, paths, destination in stage.copies():
        for path in paths:
            target = root / destination.lstrip("/")
            if source is None:
                found = ROOT / path
            elif source.startswith("onnxruntime"):
                found = ONNXRUNTIME / pathlib.PurePath(path).relative_to("/opt/onnxruntime")
            else:
                found = results[source][path]
            if found is None:
                target.mkdir(parents=True)
                target.chmod(0o700)
                continue
            into = target / found.name if destination.endswith("/") else target
            place(found, into)


def system_library(name):
    table = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    paths = [line.rpartition("=> ")[2] for line in table.splitlines() if line.split() and line.split()[0] == name]
    return pathlib.Path(paths[0]) if paths else None


def lay_out_base(root):
    """The base image's folders and libraries, which come from this machine."""
    for folder in ("dev", "proc", "etc", "tmp", "models", "home/nonroot"):
        (root / folder).mkdir(parents=True)
    for device in ("null", "zero", "urandom"):
        (root / "dev" / device).touch()
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n"
    )
    for name in BASE_LIBRARIES:
        if path := system_library(name):
            # The C library's loader looks where Debian keeps libraries; the loader itself is named by its whole path.
            place(path.resolve(), root / str(path).lstrip("/"))
            if name.startswith("ld-linux"):
                place(path.resolve(), root / ("lib64" if "x86" in name else "lib") / name)


class Container:
    """A process started by `confine.py`, with its output collected."""

    def __init__(self, root, folder, argv, environment, seccomp, writable=(), uid=65532):
        folder.mkdir(parents=True, exist_ok=True)
        self.pid_file = folder / "pid"
        order = folder / "order.json"
        order.write_text(
            json.dumps(
                {
                    "root": str(root),
                    "writable": list(writable),
                    "uid": uid,
                    "argv": argv,
                    "env": environment,
                    "seccomp": seccomp,
                    "pid_file": str(self.pid_file),
                }
            )
        )
        self.process = subprocess.Popen(
            [sys.executable, str(CONFINE), str(order)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    @property
    def pid(self):
        """The program's process id, as it is seen from here."""
        return int(self.pid_file.read_text())

    @property
    def output(self):
        return "".join(self.lines)

    def wait(self, seconds):
        code = self.process.wait(seconds)
        self.reader.join(10)
        return code

    def kill(self):
        self.process.kill()  # The program asked to die with it.
        self.process.wait()


def children(pid):
    """Process ids and states of a process's children."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == pid:
                found[int(entry)] = stat[0]
    return found
