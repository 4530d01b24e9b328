#!/usr/bin/env bash
# Installs what the client tests use and Python cannot bring: libb64 (perf_analyzer links to it), strace (the telemetry
# test watches system calls) and libseccomp (the container test loads the profile). Where that is not possible it says
# so, and those tests fail and say it too.
set -euo pipefail

missing=()
ldconfig -p | grep -q 'libb64\.so' || missing+=(libb64-0d)
ldconfig -p | grep -q 'libseccomp\.so\.2' || missing+=(libseccomp2)
command -v strace >/dev/null || missing+=(strace)
[[ ${#missing[@]} -gt 0 ]] || exit 0

as_root=()
[[ $(id -u) -eq 0 ]] || as_root=(sudo -n)
if command -v apt-get >/dev/null; then
    "${as_root[@]}" apt-get update -qq && "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" && exit 0
fi
echo "warning: could not install ${missing[*]}; the tests that need them will fail" >&2
