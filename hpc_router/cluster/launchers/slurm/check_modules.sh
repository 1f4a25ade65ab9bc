#!/bin/bash
# check_modules.sh MODULE...: whether these load one after the other, as they will in a batch job.
# Prints the place of the first that does not (0 for the first word) and what it said. Exit status: 0 all load, 1 one
# does not, 3 there is no `module` here.

# shellcheck source-path=SCRIPTDIR source=modules.sh
. "${BASH_SOURCE[0]%/*}/modules.sh"
if ! type module >/dev/null 2>&1; then
    exit 3
fi
said=$(mktemp) || exit 3
trap 'rm -f "$said"' EXIT
number=0
for name in "$@"; do
    # Some versions end with 0 whatever happens.
    if ! module load "$name" >"$said" 2>&1 || grep -qE 'ERROR:|Unable to locate|following error' "$said"; then
        printf '%d\n' "$number"
        grep -v '^[[:space:]]*$' "$said"
        exit 1
    fi
    number=$((number + 1))
done
