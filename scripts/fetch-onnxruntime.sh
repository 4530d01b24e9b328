#!/usr/bin/env bash
# Puts ONNX Runtime's shared library where the gateway looks for it.
#
#   scripts/fetch-onnxruntime.sh [--gpu] [DESTINATION]      default: .cache/onnxruntime, .cache/onnxruntime-gpu
#
# With --gpu it is the build with CUDA (x86-64 only), which also needs CUDA 13 and cuDNN 9 where it runs.
#
# The library comes out of the published Python wheel, taken by the ordinary package client and checked
# against the SHA-256 below. Nothing is compiled and nothing is installed. Where it cannot be had, this
# says why and exits 0: the gateway then serves with its built-in engine (tract).
set -euo pipefail

VERSION=1.31.1
SHA256_X86_64=5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f
SHA256_AARCH64=da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3

SHA256_GPU_X86_64=e26c475fe361b2015f45b4b824bd13f0bb20204e59b62814e6f0acd5f3d491a6

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
package=onnxruntime size='20 MB' providers=()
if [[ ${1:-} == --gpu ]]; then
    shift
    package=onnxruntime-gpu size='255 MB' providers=(shared cuda)
fi
dest=${1:-"$root/.cache/$package"}
library="$dest/lib/libonnxruntime.so"
stamp="$dest/VERSION"
stamped="$VERSION${providers:+ gpu}"

without() {
    printf 'warning: no ONNX Runtime: %s\n' "$1" >&2
    printf 'warning: going on with the built-in engine (tract); some models need ONNX Runtime, see README.md\n' >&2
    exit 0
}

if [[ -s $library && -f $stamp && $(<"$stamp") == "$stamped" ]]; then
    exit 0
fi

[[ $(uname -s) == Linux ]] || without "the pinned library is for Linux, this is $(uname -s); set ORT_DYLIB_PATH to use your own"
case $(uname -m)${providers:+-gpu} in
    x86_64-gpu | amd64-gpu) platform=manylinux_2_28_x86_64 sha256=$SHA256_GPU_X86_64 ;;
    x86_64 | amd64) platform=manylinux_2_28_x86_64 sha256=$SHA256_X86_64 ;;
    aarch64 | arm64) platform=manylinux_2_28_aarch64 sha256=$SHA256_AARCH64 ;;
    *) without "no published $package library for $(uname -m)" ;;
esac
command -v python3 >/dev/null || without "python3 is not installed"
python3 -m pip --version >/dev/null 2>&1 || without "python3 has no pip (on Debian: apt-get install python3-pip)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '%s==%s --hash=sha256:%s\n' "$package" "$VERSION" "$sha256" >"$work/requirements.txt"
printf 'fetching %s %s (%s, about %s)\n' "$package" "$VERSION" "$platform" "$size" >&2
python3 -m pip --disable-pip-version-check download --quiet --require-hashes --no-deps --only-binary=:all: \
    --implementation cp --python-version 311 --abi cp311 --platform "$platform" \
    --dest "$work" --requirement "$work/requirements.txt" \
    || without "the package client could not download $package==$VERSION (see above)"

# Python's zipfile, because unzip is not on every machine. The library is renamed into place last, so a
# half-written one is never seen.
python3 - "$work" "$dest" "$VERSION" "$stamped" "${providers[@]}" <<'PY' || without "the downloaded wheel could not be unpacked into $dest"
import glob, os, pathlib, shutil, sys, zipfile

work, dest, version, stamped, *providers = sys.argv[1:]
dest = pathlib.Path(dest)
(wheel,) = glob.glob(f"{work}/onnxruntime*.whl")
(dest / "lib").mkdir(parents=True, exist_ok=True)
# The library last: where it is, everything else is too.
libraries = [(f"libonnxruntime_providers_{name}.so",) * 2 for name in providers]
libraries.append((f"libonnxruntime.so.{version}", "libonnxruntime.so"))
with zipfile.ZipFile(wheel) as archive:
    for member in ("onnxruntime/LICENSE", "onnxruntime/ThirdPartyNotices.txt"):
        (dest / pathlib.PurePath(member).name).write_bytes(archive.read(member))
    for member, name in libraries:
        partial = dest / "lib" / f".{name}.{os.getpid()}"
        with archive.open(f"onnxruntime/capi/{member}") as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        partial.chmod(0o755)
        partial.replace(dest / "lib" / name)
(dest / "VERSION").write_text(stamped + "\n")
PY
printf 'ONNX Runtime %s is in %s\n' "$VERSION" "$library" >&2
