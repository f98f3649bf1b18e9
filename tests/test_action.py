"""The GitHub action: its scripts on good and hostile submissions, and workflows that give strangers nothing to hold."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / ".github"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
made = runpy.run_path(str(ROOT / "tests" / "evalsuite" / "board" / "test_submissions.py"))
submission, edit, cell = made["submission"], made["edit"], made["cell"]

WORKFLOWS = [ROOT / "action.yml", *sorted((SCRIPTS / "workflows").glob("*.yml"))]


def act(folder: Path, *submissions: Path | str, **variables: Any) -> tuple[int, str]:
    """Run the entry script in a folder; its exit code, and the Markdown that it wrote."""
    environment = os.environ | {
        "PATH": PATH, "SUBMISSIONS": "\n".join(map(str, submissions)), "SITE": "site", "COMMENT": "comment.md",
        "EVALSUITE_PLUGINS": "", **{name: str(value) for name, value in variables.items()},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, SCRIPTS / "submission.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    written = folder / "comment.md"
    return done.returncode, written.read_text(encoding="utf-8") if written.exists() else done.stderr


def other(root: Path, name: str) -> Path:
    """A second whole submission, of another backbone."""
    submission(root)
    for path in root.rglob("seed-?.json"):
        content = json.loads(path.read_text())
        content["backbone"] |= {"name": name, "identity": "cd" * 32}
        path.write_text(json.dumps(content))
    (folder,) = (root / "results").iterdir()
    folder.rename(folder.with_name(f"{name}-cdcdcdcd"))
    return root


def stand_in(folder: Path, script: str) -> str:
    """A PATH whose ``evalsuite`` is a few lines of shell: starting the real one many times takes too long."""
    program = folder / "bin" / "evalsuite"
    program.parent.mkdir()
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_a_good_submission_is_taken_ranked_and_compared(tmp_path: Path):
    accepted = tmp_path / "accepted"
    theirs = other(accepted / "theirs", "runs-b.safetensors")
    name = "it's $(touch hacked) `touch hacked`"
    submission(accepted / name, seeds=1)  # is replaced
    ours, summary = submission(tmp_path / "proposed" / name), tmp_path / "summary.md"
    code, comment = act(tmp_path, ours, RESULTS=accepted, BASELINE=theirs, GITHUB_STEP_SUMMARY=summary)
    assert code == 0, comment
    assert comment.startswith("The submission can be taken.")
    assert "| `runs-a.safetensors` less `runs-b.safetensors` |" in comment
    assert "Not separable: `runs-b.safetensors`, `runs-a.safetensors`" in comment
    assert re.search(r"## `cifar10@knn-\d`: `top1`, higher is better", comment)
    assert "there twice" not in comment
    assert summary.read_text(encoding="utf-8") == comment
    board = json.loads((tmp_path / "site" / "leaderboard.json").read_text())
    (standings,) = board["standings"].values()
    assert {label: standing["seeds"] for label, standing in standings.items()} == {
        "runs-a.safetensors": 2, "runs-b.safetensors": 2,
    }  # fmt: skip
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.slow
def test_a_hostile_submission_is_refused_and_its_words_stay_words(tmp_path: Path):
    ours = submission(tmp_path / "ours")
    edit("backbone", "name", value="</pre>\n\n# [x](https://evil.example) @everyone ```<script>")(ours, cell(ours))
    (ours / "results" / "$(touch hacked).sh").write_text("touch hacked")
    (ours / "results" / "a\n\n# @everyone\n.png").write_bytes(b"")
    code, comment = act(tmp_path, ours, RESULTS=tmp_path)
    assert code == 8
    told = [line for line in comment.splitlines() if line and not line.startswith("    ")]
    assert told[0] == "This submission cannot be taken:"
    assert re.fullmatch(r"\d+ faults?\.", told[1])
    assert len(told) == 2  # all else is indented code
    assert "characters that are not taken" in comment
    assert not list(tmp_path.rglob("hacked"))
    assert not (tmp_path / "site").exists()


def test_every_submission_is_checked_and_one_bad_one_is_enough(tmp_path: Path):
    faults = 'echo "${@: -1}" >>asked; [ "${@: -1}" != bad ] || { echo "a.json: doctored"; exit 8; }'
    code, comment = act(tmp_path, "bad", "-good", PATH=stand_in(tmp_path, faults))
    assert code == 8
    assert (tmp_path / "asked").read_text() == "bad\n-good\n"
    assert comment == "This submission cannot be taken:\n\n    bad\n\n    a.json: doctored\n\n1 fault.\n\n"


@pytest.mark.parametrize("step", ["submit", "leaderboard", "compare"])
@pytest.mark.parametrize("exits", [1, 3])
def test_what_breaks_is_told_and_blames_no_submission(tmp_path: Path, step: str, exits: int):
    (tmp_path / "seed-0.json").write_text("{}")
    path = stand_in(tmp_path, f'[ "$1" != {step} ] || {{ echo "error: it is gone" >&2; exit {exits}; }}')
    code, comment = act(tmp_path, "x", RESULTS=".", PATH=path)
    assert (code, comment) == (exits, "The check did not come to its end:\n\n    error: it is gone\n\n")


def test_what_breaks_without_a_word_is_told_too(tmp_path: Path):
    code, comment = act(tmp_path, "x", PATH=stand_in(tmp_path, "exit 1"))
    assert (code, comment) == (
        1,
        "The check did not come to its end:\n\n    evalsuite submit ended with exit code 1\n\n",
    )


@pytest.mark.parametrize(
    ("backbones", "exits", "told"),
    [
        (0, 0, "nothing to compare with yet"),
        (1, 2, "no task, protocol and data in common"),
        (9, 0, "holds more backbones than"),
    ],
)
def test_it_is_told_why_nothing_was_compared(tmp_path: Path, backbones: int, exits: int, told: str):
    for number in range(backbones):
        cell = tmp_path / "accepted" / "old" / "results" / f"net {number}" / "voc@c4-1" / "seed-0.json"
        cell.parent.mkdir(parents=True)
        cell.write_text("{}")
    path = stand_in(tmp_path, f'[ "$1" != compare ] || exit {exits}')
    code, comment = act(tmp_path, "ours", RESULTS="accepted", PATH=path)
    assert code == 0
    assert told in comment


def test_github_obeys_no_line_of_a_stranger(tmp_path: Path):
    path = stand_in(tmp_path, 'echo "::error::x"; exit 8')
    words = {"PATH": path, "SUBMISSIONS": "x", "SITE": "s", "COMMENT": "c", "GITHUB_ACTIONS": "true"}
    done = subprocess.run(
        [sys.executable, SCRIPTS / "submission.py"],
        cwd=tmp_path,
        env=words,
        capture_output=True,
        text=True,
        check=False,
    )
    first, *between, last = done.stdout.splitlines()
    token = first.removeprefix("::stop-commands::")
    assert re.fullmatch("[0-9a-f]{32}", token)
    assert last == f"::{token}::"
    assert "    ::error::x" in between


def test_a_long_comment_is_cut(tmp_path: Path):
    code, comment = act(tmp_path, *["x" * 300] * 300, PATH=stand_in(tmp_path, "seq 9; exit 8"))
    assert code == 8
    assert comment.endswith("(cut: it was longer)\n")
    assert len(comment) < 65_536  # what GitHub takes


def git(folder: Path, *words: str) -> None:
    settings = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True)


def changed(folder: Path, files: dict[str, str], removed: str | None = None) -> subprocess.CompletedProcess[str]:
    """What the script says of a commit that adds files after one that holds submissions/old."""
    git(folder, "init", "-q")
    for name, text in {"submissions/old/submission.json": "{}", "README.md": "x"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "before")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if removed:
        (folder / removed).unlink()
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "after")
    command = ["bash", SCRIPTS / "changed.sh", folder, "HEAD^1", "HEAD", "submissions"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_changed_submissions_are_found(tmp_path: Path):
    done = changed(tmp_path, {"submissions/new/a.json": "", "submissions/new/b/c.json": "", "README.md": "y"})
    assert (done.returncode, done.stdout) == (0, "submissions/new\n")


def test_a_removed_submission_is_not_checked(tmp_path: Path):
    done = changed(tmp_path, {"README.md": "y"}, removed="submissions/old/submission.json")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "name",
    ["submissions/stray.json", "submissions/$(touch x)/a.json", "submissions/-o/a.json", "submissions/a\nb/c.json"],
)
def test_names_that_mean_something_to_a_shell_are_refused(tmp_path: Path, name: str):
    done = changed(tmp_path, {name: ""})
    assert done.returncode == 8
    assert "is no file of a submission" in done.stderr


REFUSED = json.dumps({"refused": [{"name": "x", "faults": ["$(touch hacked) text"]}], "errors": []})


def comment(
    tmp_path: Path, number: str, head: str = "a" * 40, known: str = "", outcome: str = REFUSED
) -> tuple[int, list[str], str]:
    """Run the comment's script with a stand-in for ``gh`` that writes down what it was asked."""
    program = tmp_path / "bin" / "gh"
    program.parent.mkdir()
    program.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>"$LOG"\n'
        'case "$*" in\n*/pulls/*) echo "$HEAD_OF_PULL" ;;\n*--paginate*) printf "%s" "$KNOWN" ;;\n'
        '*) last=${*: -1}; cat "${last#body=@}" >"$LOG.body" ;;\nesac\n'
    )
    program.chmod(0o755)
    (tmp_path / "number").write_text(number)
    (tmp_path / "outcome.json").write_text(outcome)
    log = tmp_path / "log"
    environment = {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "LOG": str(log), "HEAD_OF_PULL": head,
        "KNOWN": known, "HEAD_SHA": "a" * 40, "REPOSITORY": "o/r", "GH_TOKEN": "none",
    }  # fmt: skip
    done = subprocess.run(["bash", SCRIPTS / "comment.sh", tmp_path], env=environment, cwd=tmp_path, check=False)
    body = log.with_name("log.body")
    return (
        done.returncode,
        log.read_text().splitlines() if log.exists() else [],
        body.read_text() if body.exists() else "",
    )


def test_a_comment_is_written_once_and_then_replaced(tmp_path: Path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    code, asked, body = comment(tmp_path / "first", "7")
    assert code == 0
    assert "--method POST repos/o/r/issues/7/comments" in asked[-1]
    assert body.startswith("<!-- evalsuite submission -->\nThis submission cannot be taken:\n\n    x\n")
    assert "\n    $(touch hacked) text\n" in body
    code, asked, _ = comment(tmp_path / "second", "7", known="99")
    assert code == 0
    assert "--method PATCH repos/o/r/issues/comments/99" in asked[-1]
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize("number", ["", "0", "7; touch hacked", "../7", "$(touch hacked)"])
def test_what_is_no_number_is_not_believed(tmp_path: Path, number: str):
    assert comment(tmp_path, number) == (1, [], "")
    assert not list(tmp_path.rglob("hacked"))


def test_another_pull_request_cannot_be_commented_on(tmp_path: Path):
    code, asked, body = comment(tmp_path, "8", head="b" * 40)
    assert (code, len(asked), body) == (1, 1, "")


PAIR = {"first": "a", "second": "b", "difference": 0.1, "low": None, "high": None, "adjusted": 0.2, "separable": False}
COMPARED = {
    "refused": [], "errors": [], "left_out": ["not ranked: x"],
    "comparison": {
        "skipped": ["y"],
        "comparisons": [
            {
                "task": "t", "protocol": "p-1", "metric": "m", "higher_is_better": True, "groups": [["a", "b"]],
                "scores": {"a": {"value": 0.5, "low": 0.4, "high": 0.6, "seeds": 1}}, "pairs": [PAIR],
            }
        ],
    },
}  # fmt: skip
EVIL = "</pre>\n\n# [x](https://evil.example) @everyone #1 ```<script>|![](https://evil.example/x.png)"
render = runpy.run_path(str(SCRIPTS / "comment.py"))["rendered"]


def everywhere(value: Any, new: Any) -> list[Any]:
    """Copies of a JSON tree, each with another one of its values, or names, replaced by ``new``."""
    if isinstance(value, dict):
        copies = [{**value, key: inner} for key in value for inner in everywhere(value[key], new)]
        named = [{new if k == key else k: v for k, v in value.items()} for key in value] if isinstance(new, str) else []
        return [new, *copies, *named]
    if isinstance(value, list):
        return [
            new,
            *([*value[:i], inner, *value[i + 1 :]] for i in range(len(value)) for inner in everywhere(value[i], new)),
        ]
    return [new]


@pytest.mark.parametrize("new", [EVIL, None, 10**400, 1e308, [], {}, True, [[EVIL]], {EVIL: EVIL}], ids=repr)
def test_a_made_up_outcome_is_refused_or_stays_data(new: Any):
    for made_up in everywhere(COMPARED, new):
        try:
            text = render(made_up)
        except ValueError:
            continue
        for line in text.splitlines():
            outside = "" if line.startswith("    ") else re.sub(r"`[^`]*`", "", line)  # of code, indented or in a line
            assert not re.search(r"[<@\[]x|https?:|@everyone|#1|!\[|<", outside), line


def test_what_is_no_outcome_is_not_posted(tmp_path: Path):
    for number, outcome in enumerate(
        ["", "[]", "[" * 100_000, '{"refused": "x"}', '{"refused": [], "errors": [], "why": 1}']
    ):
        (tmp_path / str(number)).mkdir()
        code, asked, body = comment(tmp_path / str(number), "7", outcome=outcome)
        assert (code, len(asked), body) == (1, 1, "")


# --- workflows --------------------------------------------------------------------------------------------------


def steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    jobs = content["jobs"].values() if "jobs" in content else [content["runs"]]
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_value_becomes_text_of_a_command(path: Path):
    for step in steps(yaml.safe_load(path.read_text())):
        assert "${{" not in step.get("run", "")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_other_peoples_actions_are_pinned_to_a_commit(path: Path):
    used = [step["uses"] for step in steps(yaml.safe_load(path.read_text())) if "uses" in step]
    assert all(name == "./base" or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name) for name in used)


@pytest.mark.parametrize("path", WORKFLOWS[1:], ids=lambda path: path.stem)
def test_rights_are_no_more_than_needed(path: Path):
    content = yaml.safe_load(path.read_text())
    events = content[True]  # what YAML takes "on" for
    assert "pull_request_target" not in events
    assert all(right == "read" for right in content["permissions"].values())
    for job in content["jobs"].values():
        rights = {name for name, right in job.get("permissions", {}).items() if right != "read"}
        assert rights == ({"pull-requests"} if "workflow_run" in events else set())
    for step in steps(content):
        if "actions/checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
            assert (
                "workflow_run" not in events or "ref" not in step["with"]
            )  # the right to write never meets their code


def test_what_workflows_call_is_there():
    for path in WORKFLOWS:
        for name in re.findall(r"\.github/[\w.]+\.(?:sh|py)|\.ci/run", path.read_text()):
            assert os.access(ROOT / name, os.R_OK if name.endswith(".py") else os.X_OK), name
