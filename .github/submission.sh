#!/usr/bin/env bash
# Checks submissions to a leaderboard, builds the board they would make, and compares them with what is there.
#
#   SUBMISSIONS  folders to check, one a line
#   RESULTS      the folder of accepted submissions (may be empty or missing); one of a submission's name is replaced
#   BASELINE     results to compare with; where it is empty, RESULTS
#   SITE         where the leaderboard goes
#   COMMENT      the Markdown file to write: faults, or what was left out and the comparison
#
# Exit 0: all can be taken; 8: one cannot; anything else: the machinery failed.
# Submissions are data of strangers. They are read by evalsuite and by nothing else, their names are never more than
# quoted arguments, and their text stands in the comment as indented code or with its links and mentions taken apart.
set -euo pipefail

: "${SUBMISSIONS:?folders, one a line}" "${COMMENT:?a file}" "${SITE:?a folder}"
RESULTS=${RESULTS:-} BASELINE=${BASELINE:-${RESULTS:-}}
readonly LINES_SHOWN=100 BACKBONES=8 BYTES=60000
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# GitHub obeys lines of a log that begin with two colons: none of a stranger's is, between these two.
if [ -n "${GITHUB_ACTIONS:-}" ]; then
    token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    echo "::stop-commands::$token"
    trap 'rm -rf "$work"; echo "::$token::"' EXIT
fi

mapfile -t submissions < <(sed '/^[[:space:]]*$/d' <<<"$SUBMISSIONS")

# Every line of a stranger's as indented code: no line of it can end the block, and nothing in it is a link.
quoted() { head -n "$LINES_SHOWN" | cut -c 1-400 | sed 's/^/    /'; }

# Markdown that evalsuite wrote around strangers' names: nobody is called by it, and nothing is linked.
harmless() {
    local gap=$'\xe2\x80\x8b'
    sed -e "s/@/@$gap/g" -e "s|://|:$gap//|g" -e "s/www\./www$gap./g" -e "s/#\([0-9]\)/#$gap\1/g"
}

check() {
    local submission code refused=0
    for submission in "${submissions[@]}"; do
        code=0
        evalsuite submit check -- "$submission" >"$work/faults" 2>"$work/errors" || code=$?
        [ "$code" != 0 ] || continue
        printf 'This submission cannot be taken:\n\n'
        printf '%s\n' "$submission" | quoted
        printf '\n'
        if [ "$code" != 8 ]; then # it could not be read at all
            quoted <"$work/errors"
            return "$code"
        fi
        quoted <"$work/faults"
        printf '\n%d faults.\n\n' "$(wc -l <"$work/faults")"
        refused=8
    done
    return "$refused"
}

# Accepted submissions but for those that are replaced.
others() {
    local accepted submission
    [ -n "$RESULTS" ] || return 0
    for accepted in "$RESULTS"/*/; do
        [ -d "$accepted" ] || continue
        for submission in "${submissions[@]}"; do
            [ "$(basename -- "$accepted")" != "$(basename -- "$submission")" ] || continue 2
        done
        printf '%s\0' "$accepted"
    done
}

build() {
    local accepted
    mapfile -d '' -t accepted < <(others)
    evalsuite leaderboard build --out "$SITE" -- "${accepted[@]}" "${submissions[@]}" >"$work/built" 2>"$work/left"
    printf 'The submission can be taken.\n\n'
    if [ -s "$work/left" ]; then
        printf 'Left out of the leaderboard:\n\n'
        quoted <"$work/left"
        echo
    fi
}

compare() {
    local code=0 backbones
    if [ -z "$BASELINE" ] || [ ! -d "$BASELINE" ] || [ -z "$(find "$BASELINE" -name 'seed-*.json' -print -quit)" ]; then
        echo "There is nothing to compare with yet."
        return
    fi
    backbones=$(find "$BASELINE" -name 'seed-*.json' -printf '%h\0' | xargs -0 dirname -z -- | sort -zu | tr -cd '\0' | wc -c)
    if [ "$backbones" -gt "$BACKBONES" ]; then
        echo "Not compared: the baseline holds $backbones backbones, and $BACKBONES make a table that can be read. Name a smaller one."
        return
    fi
    evalsuite compare -- "$BASELINE" "${submissions[@]}" >"$work/compared" 2>"$work/errors" || code=$?
    case $code in
    0) harmless <"$work/compared" ;;
    2) echo "The submission has no task, protocol and data in common with the baseline." ;;
    *) cat "$work/errors" >&2; return "$code" ;;
    esac
}

write() {
    head -c "$BYTES" "$work/comment" >"$COMMENT"
    [ "$(wc -c <"$work/comment")" -le "$BYTES" ] || printf '\n\n(cut: it was longer)\n' >>"$COMMENT"
    [ -z "${GITHUB_STEP_SUMMARY:-}" ] || cat "$COMMENT" >>"$GITHUB_STEP_SUMMARY"
}

code=0
check >"$work/comment" || code=$?
if [ "$code" = 0 ]; then
    build >>"$work/comment"
    compare >>"$work/comment"
fi
write
cat "$COMMENT"
exit "$code"
