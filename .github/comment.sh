#!/usr/bin/env bash
# Puts what FOLDER/outcome.json says under the pull request FOLDER/number, once: a later one replaces it. comment.sh FOLDER
#
# Both files come from a run that a stranger can shape, workflow and all. So the number is believed only if that pull
# request's head is the commit the run was of (HEAD_SHA), and the outcome is data: comment.py beside this file, which is
# the default branch's, makes the text of it, or refuses it.
set -euo pipefail
: "${HEAD_SHA:?}" "${REPOSITORY:?}" "${GH_TOKEN:?}"
folder=$1
readonly MARK="<!-- evalsuite submission -->"

number=$(head -c 20 "$folder/number")
if [[ ! $number =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the run names no pull request" >&2
    exit 1
fi
head=$(gh api "repos/$REPOSITORY/pulls/$number" --jq .head.sha)
if [ "$head" != "$HEAD_SHA" ]; then
    echo "error: pull request $number is not of the commit that was checked" >&2
    exit 1
fi

body=$(mktemp)
trap 'rm -f "$body"' EXIT
echo "$MARK" >"$body"
python3 "$(dirname "$0")/comment.py" "$folder/outcome.json" >>"$body"
known=$(gh api --paginate "repos/$REPOSITORY/issues/$number/comments" \
    --jq ".[] | select(.user.login == \"github-actions[bot]\" and (.body | startswith(\"$MARK\"))) | .id" | head -n 1)
if [ -n "$known" ]; then
    gh api --silent --method PATCH "repos/$REPOSITORY/issues/comments/$known" -F "body=@$body"
else
    gh api --silent --method POST "repos/$REPOSITORY/issues/$number/comments" -F "body=@$body"
fi
