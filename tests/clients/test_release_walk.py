"""Follows docs/release.md word for word: every command of its first chapter, in one shell, as a new user would."""

import os
import re
import shutil
import signal
import subprocess

import pytest
from conftest import BINARY, ROOT, free_ports

CHAPTER = "A first canary in ten minutes"
WALK_MAX_S = 300
PORTS = {"8000": "HTTP", "8001": "GRPC", "8002": "METRICS", "8003": "ADMIN"}


def commands():
    """The shell blocks of the chapter, in order."""
    text = (ROOT / "docs" / "release.md").read_text()
    chapter = re.search(rf"^## {CHAPTER}\n(.*?)(?=^## )", text, re.S | re.M).group(1)
    blocks = re.findall(r"^```sh\n(.*?)^```", chapter, re.S | re.M)
    assert len(blocks) >= 10, "the walk lost its commands"
    return blocks


@pytest.fixture
def clone(tmp_path):
    """What a fresh clone with `make build` has of what the walk touches."""
    (tmp_path / "target" / "release").mkdir(parents=True)
    (tmp_path / "target" / "release" / "tidegate").symlink_to(BINARY)
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    shutil.copytree(ROOT / "models", tmp_path / "models")
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    return tmp_path


def test_the_walk(clone):
    # Other ports than the defaults, which other tests and people use: by the environment, and in what is typed.
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS)))))
    environment = {**os.environ, "TIDEGATE_REPOSITORY_POLL_MS": "1000"}
    environment.update({f"TIDEGATE_SERVER_{name}_ADDRESS": f"127.0.0.1:{ports[port]}" for port, name in PORTS.items()})
    script = [
        *("set -euo pipefail", "set -m", "exec 2>&1"),
        "tidegate() { case $1 in",
        '    serve) exec tidegate "$@" ;;',
        '    health) command tidegate "$@" ;;',
        f'    *) command tidegate "$@" --address http://127.0.0.1:{ports["8003"]} ;;',
        "esac; }",
    ]
    for at, block in enumerate(commands()):
        for port, other in ports.items():
            block = block.replace(f"127.0.0.1:{port}", f"127.0.0.1:{other}")
        script += [f"echo '=== {at}'", block]
    (clone / "walk.sh").write_text("\n".join(script))
    shell = subprocess.Popen(
        ["bash", "walk.sh"],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = shell.communicate(timeout=WALK_MAX_S)
    finally:
        # `set -m` gives each job a group of its own; the gateway's and the users' ends here whatever happened.
        for group in subprocess.run(
            ["pgrep", "-s", str(shell.pid)], capture_output=True, text=True, check=False
        ).stdout.split():
            try:
                os.kill(int(group), signal.SIGKILL)
            except ProcessLookupError:
                pass
    log = (clone / "walk" / "log").read_text() if (clone / "walk" / "log").exists() else ""
    assert shell.returncode == 0, f"{printed}\n--- log\n{log}"
    parts = dict(enumerate(re.split(r"^=== \d+\n", printed, flags=re.M)[1:]))
    whole = "\n".join(parts.values())
    # The hand-made canary: the pinned request says so, and the answer names its version.
    assert re.search(r"tidegate-arm: pinned", whole) and re.search(r"tidegate-model-version: 2", whole)
    # The bad version never got a request that somebody waited for, and is back where it was.
    assert "rolled back, as it should be" in whole
    assert re.search(r"^state +rolled back$", whole, re.M), printed
    # The good one has everything.
    assert re.search(r"^2 +100 +100 %", whole, re.M)
    for action in ("traffic.put", "traffic.rollback", "rollout.start", "rollout.roll_back", "rollout.promote"):
        assert action in whole, f"{action} is not in the journal:\n{printed}"
    assert "canary of version 2" in whole
