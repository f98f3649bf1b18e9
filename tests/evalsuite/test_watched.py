"""Plugins that hang, exit or print while they load, and readers of our output that leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evalsuite import hooks
from evalsuite.errors import PluginError, Refusal, UsageError, printable
from evalsuite.hooks import Registry, load

HOOK = """
from evalsuite import hookimpl

@hookimpl
def evalsuite_register(registry):
    registry.task("watched", "{module}:Task")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch, loaded):  # ours are loaded before, which takes longer than these times
    """Write a module and load it as a plugin."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def write(body: str, after: str = "") -> hooks.Loaded:
        name = f"watched_{os.getpid()}_{time.monotonic_ns()}"
        made.append(name)
        (tmp_path / f"{name}.py").write_text(body + HOOK.format(module=name) + after)
        return load([name], environ={"EVALSUITE_PLUGINS": ""})

    yield write
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "body", ["import time\ntime.sleep(60)\n", "while True: pass\n", "import threading\nthreading.Event().wait()\n"]
)
def test_a_hang_is_named(plugin, monkeypatch, body: str):
    monkeypatch.setenv("EVALSUITE_PLUGIN_TIMEOUT", "0.3")
    with pytest.raises(PluginError, match="does not finish loading") as refused:
        plugin(body)
    assert "watched_" in refused.value.cause
    assert "-p no:watched_" in refused.value.fix
    assert refused.value.code == 5


def test_a_hang_while_it_registers_or_is_asked_for_is_named(plugin, monkeypatch, tmp_path):
    monkeypatch.setenv("EVALSUITE_PLUGIN_TIMEOUT", "0.3")
    with pytest.raises(PluginError, match="does not finish"):
        plugin("", "    import time; time.sleep(60)\n")
    registry = Registry()
    (tmp_path / "slow_target_of_the_test.py").write_text("import time\ntime.sleep(60)\n")
    registry.task("slow", "slow_target_of_the_test:Task")
    with pytest.raises(PluginError, match="does not finish"):
        registry.get("task", "slow")


def test_a_hang_that_swallows_what_interrupts_it_ends_the_process_in_the_same_words(tmp_path):
    body = "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass\n"
    (tmp_path / "deaf.py").write_text(body)
    code = (
        "import os, evalsuite.hooks as h; h.GRACE = 0.3; nobody = {'EVALSUITE_PLUGINS': ''}; h.load(environ=nobody); "
        "os.environ['EVALSUITE_PLUGIN_TIMEOUT'] = '0.3'; h.load(['deaf'], environ=nobody)"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 3
    assert "'deaf'" in done.stderr


def test_a_plugin_cannot_end_the_process(plugin):
    for body in ("import os\nos._exit(0)\n", "from os import _exit\n_exit(3)\n"):
        (fault,) = plugin(body).faults
        assert "it calls os._exit(" in fault.reason
    assert os._exit.__module__ == "posix"
    children = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)\n"
    forks = "import os\nchild = os.fork()\nif not child: os._exit(7)\nassert os.waitpid(child, 0)[1] == 7 << 8\n"
    assert not plugin(children + forks).faults


def test_what_plugins_print_is_no_output_of_ours(plugin, capsys):
    loaded = plugin("print('hello')\n", "    print('again')\n")
    assert not loaded.faults
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "hello\nagain\n"


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(plugin, monkeypatch, value: str):
    monkeypatch.setenv("EVALSUITE_PLUGIN_TIMEOUT", value)
    with pytest.raises(UsageError, match="is no time"):
        plugin("")


def test_nothing_of_the_watch_stays(plugin):
    import signal

    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    plugin("")
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0) == before


def test_a_reader_that_leaves_ends_the_command_quietly():
    left, right = os.pipe()
    os.close(left)
    for words in (["list"], ["plugins", "list", "--json"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "evalsuite", *words], stdout=right, stderr=subprocess.PIPE, text=True, timeout=600
        )
        assert done.returncode == 141
        assert all(line.startswith("loading plugins") for line in done.stderr.splitlines())  # of a slow machine
    os.close(right)


EVIL = "a\x1b[2J\x9b31mb\r\n\u202egpj\u2028\ud800\x00\x7f"


def test_no_text_of_strangers_acts_on_a_terminal():
    shown = printable(EVIL)
    assert shown == r"a\x1b[2J\x9b31mb\r\n\u202egpj\u2028\ud800\x00\x7f"
    assert printable(shown) == shown
    assert printable("Ünïcode 漢字\tx\n", keep="\n\t") == "Ünïcode 漢字\tx\n"
    told = str(Refusal(EVIL, cause=EVIL, fix=EVIL))
    assert len(told.splitlines()) == 3
    assert told.encode().isascii()


def test_inspect_shows_names_of_tensors_without_their_effect(tmp_path, monkeypatch, capsys, registry):
    import torch

    from evalsuite import cli
    from evalsuite.backbone import build

    state = build("small:resnet10", registry, width=4).net.state_dict()
    path = tmp_path / "x.pth"
    torch.save({**state, EVIL.replace("\ud800", ""): torch.ones(3, 3)}, path)
    monkeypatch.setattr(sys, "argv", ["evalsuite", "inspect", str(path)])
    with pytest.raises(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out
    assert not set(out) & set("\x1b\x9b\r\u202e\u2028\x00\x7f")


def test_json_is_json_whatever_files_say(tmp_path: Path):
    assert json.loads(json.dumps(EVIL)) == EVIL
