#!/usr/bin/env bash
# Which submissions a pull request adds or changes: changed.sh REPOSITORY BEFORE AFTER ROOT prints ROOT/NAME, one a line.
#
# Exit 8 for a file that lies in no submission, and for a submission whose name is more than letters, digits, . _ and -.
set -euo pipefail
repository=$1 before=$2 after=$3 root=$4

git -C "$repository" diff --name-only --no-renames -z "$before" "$after" -- "$root" |
    while IFS= read -r -d '' path; do
        name=${path#"$root"/}
        if [[ $name != */* ]] || [[ ! ${name%%/*} =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$ ]]; then
            printf 'error: %q is no file of a submission\n' "$path" >&2
            printf 'cause: a submission is a folder below %s, named by letters, digits, dots, underscores and dashes\n' "$root" >&2
            printf 'fix: move it into such a folder\n' >&2
            exit 8
        fi
        if git -C "$repository" cat-file -e "$after:$root/${name%%/*}" 2>/dev/null; then # it was not removed
            printf '%s\n' "$root/${name%%/*}"
        fi
    done | sort -u
