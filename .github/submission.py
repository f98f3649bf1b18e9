"""Checks submissions to a leaderboard, builds the board they would make, and compares them with what is there.

Environment:
  SUBMISSIONS  folders to check, one a line
  RESULTS      the folder of accepted submissions (may be empty or missing); one of a submission's name is replaced
  BASELINE     results to compare with; where it is empty, RESULTS
  SITE         where the leaderboard goes
  OUTCOME      the JSON file to write: faults, what was left out, the comparison, and what broke
  COMMENT      the same in Markdown (comment.py)

Exit 0: all can be taken; 8: one cannot; anything else: the machinery failed, and the outcome says how.
Submissions are data of strangers: evalsuite reads them and nothing else does, and their names are arguments, no text.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from comment import rendered

BACKBONES = 8  # that are compared at most
SHOWN = 2000  # lines of output that are kept


class Broken(Exception):
    """A command of the suite that ended in a way that says nothing of the submission: its code, and its last lines."""

    def __init__(self, code: int, lines: list[str]) -> None:
        self.code, self.lines = code, lines


def suite(*words: str | Path, may: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run evalsuite. Raises :class:`Broken` for an exit code that is none of ``may``."""
    command = ["evalsuite", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode not in may:
        lines = [line for line in done.stderr.splitlines() if line.strip()][-20:]
        raise Broken(done.returncode, lines or [f"evalsuite {words[0]} ended with exit code {done.returncode}"])
    return done


def refused(submissions: list[str]) -> list[dict[str, Any]]:
    """Those that cannot be taken, with their faults."""
    found = []
    for submission in submissions:
        done = suite("submit", "check", "--", submission, may=(0, 8))
        if done.returncode:
            found.append({"name": submission, "faults": done.stdout.splitlines()[:SHOWN]})
    return found


def built(submissions: list[str], results: str, site: str) -> list[str]:
    """Build the board of what was accepted and of these, which replace those of their names; what was left out."""
    names = {Path(submission).name for submission in submissions}
    accepted = sorted(p for p in Path(results).iterdir() if p.is_dir()) if results and Path(results).is_dir() else []
    others = [p for p in accepted if p.name not in names]
    done = suite("leaderboard", "build", "--out", site, "--", *others, *submissions)
    return done.stderr.splitlines()[:SHOWN]


def compared(submissions: list[str], baseline: str) -> dict[str, Any]:
    """The comparison, or why there is none."""
    cells = list(Path(baseline).rglob("seed-*.json")) if baseline and Path(baseline).is_dir() else []
    if not cells:
        return {"why": "nothing"}
    if len({cell.parent.parent for cell in cells}) > BACKBONES:
        return {"why": "many"}
    done = suite("compare", "--json", "--", baseline, *submissions, may=(0, 2))
    return {"comparison": json.loads(done.stdout)} if done.returncode == 0 else {"why": "disjoint"}


def outcome(environment: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was found."""
    submissions = [line for line in environment["SUBMISSIONS"].splitlines() if line.strip()]
    results = environment.get("RESULTS", "")
    found: dict[str, Any] = {"refused": [], "errors": [], "left_out": []}
    try:
        found["refused"] = refused(submissions)
        if found["refused"]:
            return 8, found
        found["left_out"] = built(submissions, results, environment["SITE"])
        found |= compared(submissions, environment.get("BASELINE") or results)
    except Broken as broken:
        return broken.code, found | {"errors": broken.lines}
    return 0, found


def main() -> int:
    """Write the outcome and the comment, and print it where GitHub obeys no line of a stranger's."""
    code, found = outcome(dict(os.environ))
    text = rendered(found)
    Path(os.environ.get("OUTCOME") or "outcome.json").write_text(json.dumps(found), encoding="utf-8")
    Path(os.environ["COMMENT"]).write_text(text, encoding="utf-8")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(text)
    token = secrets.token_hex(16) if os.environ.get("GITHUB_ACTIONS") else ""
    sys.stdout.write(f"::stop-commands::{token}\n{text}::{token}::\n" if token else text)
    return code


if __name__ == "__main__":
    sys.exit(main())
