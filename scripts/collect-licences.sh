#!/usr/bin/env bash
# Writes the licence texts of every crate that is linked into the program, each text once.
#
#   scripts/collect-licences.sh FILE [cargo tree flags…]
#
# Takes them from the sources that cargo has fetched. A crate whose package brings no text is listed with the name of
# its licence; a crate with neither is an error.
set -euo pipefail

out=$1
shift
home=${CARGO_HOME:-$HOME/.cargo}
declare -A crates=() texts=()
without=()

while IFS='|' read -r name version licence; do
    found=()
    for folder in "$home"/registry/src/*/"$name-${version#v}"; do
        while IFS= read -r -d '' file; do found+=("$file"); done < <(
            find "$folder" -maxdepth 2 -type f \( -iname 'licen[sc]e*' -o -iname 'copying*' -o -iname 'notice*' -o -iname 'unlicense*' \) \
                ! -name '*.rs' -print0 | sort -z
        )
        break
    done
    [[ ${#found[@]} -gt 0 || -n $licence ]] || { echo "no licence is known for $name $version" >&2; exit 1; }
    [[ ${#found[@]} -gt 0 ]] || without+=("$name $version: $licence")
    for file in "${found[@]}"; do
        read -r sum _ < <(sha256sum "$file")
        texts[$sum]=$file
        crates[$sum]+="$name $version, "
    done
done < <(cargo tree --locked --edges normal --prefix none --format '{p}|{l}' "$@" | sed -E 's/ \(\*\)$//; s/ \(proc-macro\)//' \
    | sed -nE 's/^([^ ]+) (v[^ |]+)\|(.*)$/\1|\2|\3/p' | sort -u)

[[ ${#texts[@]} -gt 0 ]] || { echo "cargo listed no crate" >&2; exit 1; }
{
    echo 'The program contains the crates below, each under the licence that its authors chose.'
    for sum in $(printf '%s\n' "${!texts[@]}" | sort); do
        printf '\n%s\n%s\n%s\n\n' "$(printf '=%.0s' {1..80})" "${crates[$sum]%, }" "$(printf '=%.0s' {1..80})"
        cat "${texts[$sum]}"
    done
    printf '\n%s\nCrates whose packages bring no licence text\n\n' "$(printf '=%.0s' {1..80})"
    printf '%s\n' "${without[@]}"
} >"$out"
printf '%s crates’ licences are in %s\n' "$(printf '%s' "${crates[@]}" | tr ',' '\n' | sort -u | grep -c .)" "$out" >&2
