#!/usr/bin/env bash
# Installs what the tests use and neither Rust nor Python brings: libb64 (perf_analyzer links to it), strace (the telemetry
# test watches system calls), libseccomp (the container test loads the profile), curl and openssl (the commands of
# docs/secure.md are run), prometheus (it scrapes a gateway that drifts). Where that is not possible it says so, and those
# tests fail and say it too.
set -euo pipefail

missing=()
ldconfig -p | grep -q 'libb64\.so' || missing+=(libb64-0d)
ldconfig -p | grep -q 'libseccomp\.so\.2' || missing+=(libseccomp2)
for program in strace curl openssl prometheus; do
    command -v "$program" >/dev/null || missing+=("$program")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

as_root=()
[[ $(id -u) -eq 0 ]] || as_root=(sudo -n)
if command -v apt-get >/dev/null; then
    "${as_root[@]}" apt-get update -qq && "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" && exit 0
fi
echo "warning: could not install ${missing[*]}; the tests that need them will fail" >&2
