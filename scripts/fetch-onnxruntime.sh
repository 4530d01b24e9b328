#!/usr/bin/env bash
# Puts ONNX Runtime's shared library where the gateway looks for it.
#
#   scripts/fetch-onnxruntime.sh [DESTINATION]      default: .cache/onnxruntime
#
# The library comes out of the published Python wheel, taken by the ordinary package client and checked
# against the SHA-256 below. Nothing is compiled and nothing is installed. Where it cannot be had, this
# says why and exits 0: the gateway then serves with its built-in engine (tract).
set -euo pipefail

VERSION=1.31.1
SHA256_X86_64=5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f
SHA256_AARCH64=da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dest=${1:-"$root/.cache/onnxruntime"}
library="$dest/lib/libonnxruntime.so"
stamp="$dest/VERSION"

without() {
    printf 'warning: no ONNX Runtime: %s\n' "$1" >&2
    printf 'warning: going on with the built-in engine (tract); some models need ONNX Runtime, see README.md\n' >&2
    exit 0
}

if [[ -s $library && -f $stamp && $(<"$stamp") == "$VERSION" ]]; then
    exit 0
fi

[[ $(uname -s) == Linux ]] || without "the pinned library is for Linux, this is $(uname -s); set ORT_DYLIB_PATH to use your own"
case $(uname -m) in
    x86_64 | amd64) platform=manylinux_2_28_x86_64 sha256=$SHA256_X86_64 ;;
    aarch64 | arm64) platform=manylinux_2_28_aarch64 sha256=$SHA256_AARCH64 ;;
    *) without "no published library for $(uname -m)" ;;
esac
command -v python3 >/dev/null || without "python3 is not installed"
python3 -m pip --version >/dev/null 2>&1 || without "python3 has no pip (on Debian: apt-get install python3-pip)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf 'onnxruntime==%s --hash=sha256:%s\n' "$VERSION" "$sha256" >"$work/requirements.txt"
printf 'fetching ONNX Runtime %s (%s, about 20 MB)\n' "$VERSION" "$platform" >&2
python3 -m pip --disable-pip-version-check download --quiet --require-hashes --no-deps --only-binary=:all: \
    --implementation cp --python-version 311 --abi cp311 --platform "$platform" \
    --dest "$work" --requirement "$work/requirements.txt" \
    || without "the package client could not download onnxruntime==$VERSION (see above)"

# Python's zipfile, because unzip is not on every machine. The library is renamed into place last, so a
# half-written one is never seen.
python3 - "$work" "$dest" "$VERSION" <<'PY' || without "the downloaded wheel could not be unpacked into $dest"
import glob, os, pathlib, shutil, sys, zipfile

work, dest, version = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
(wheel,) = glob.glob(f"{work}/onnxruntime-*.whl")
(dest / "lib").mkdir(parents=True, exist_ok=True)
library = dest / "lib" / "libonnxruntime.so"
with zipfile.ZipFile(wheel) as archive:
    for member in ("onnxruntime/LICENSE", "onnxruntime/ThirdPartyNotices.txt"):
        (dest / pathlib.PurePath(member).name).write_bytes(archive.read(member))
    partial = library.with_name(f".{library.name}.{os.getpid()}")
    with archive.open(f"onnxruntime/capi/libonnxruntime.so.{version}") as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target)
partial.chmod(0o755)
partial.replace(library)
(dest / "VERSION").write_text(version + "\n")
PY
printf 'ONNX Runtime %s is in %s\n' "$VERSION" "$library" >&2
