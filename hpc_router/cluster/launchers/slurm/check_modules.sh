#!/bin/bash
# check_modules.sh MODULE...: loads the modules one after the other, as a batch job does.
# Prints the index of the first that fails (from 0) and its output. Exit status: 0 all load, 1 one fails, 3 this machine
# has no `module` command.

# shellcheck source-path=SCRIPTDIR source=modules.sh
. "${BASH_SOURCE[0]%/*}/modules.sh"
if ! type module >/dev/null 2>&1; then
    exit 3
fi
output=$(mktemp) || exit 3
trap 'rm -f "$output"' EXIT
number=0
for name in "$@"; do
    # Some versions of `module` always return 0.
    if ! module load "$name" >"$output" 2>&1 || grep -qE 'ERROR:|Unable to locate|following error' "$output"; then
        printf '%d\n' "$number"
        grep -v '^[[:space:]]*$' "$output"
        exit 1
    fi
    number=$((number + 1))
done
