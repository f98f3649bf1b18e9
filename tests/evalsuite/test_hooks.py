"""Plugins are found, isolated, blocked and named; the distributions are those in tests/fixtures/site."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evalsuite.errors import DataError, PluginError, UsageError
from evalsuite.hooks import SHELVES, Entry, Loaded, Registry, load

SITE = Path(__file__).parents[1] / "fixtures" / "site"
FAULTY = ["exits", "exits_late", "misnamed", "partial", "raises", "signature", "silent"]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The fake distributions, as if they were installed."""
    monkeypatch.syspath_prepend(str(SITE))
    before = set(sys.modules)  # our own plugins stay: a second copy of their classes is no instance of the first
    yield SITE
    for name in [m for m in set(sys.modules) - before if m.startswith("evalsuite_")]:
        del sys.modules[name]


def plugins(*allowed: str, requests: tuple[str, ...] = ()) -> Loaded:
    return load(requests, environ={"EVALSUITE_PLUGINS": ",".join(allowed)})


def fault(loaded: Loaded, name: str) -> str:
    (found,) = [str(f) for f in loaded.faults if f.plugin.name == name]
    return found


def faults(loaded: Loaded) -> list[str]:
    return [f.plugin.name for f in loaded.faults if not f.plugin.ours]


def strangers(loaded: Loaded) -> list[str]:
    return [p.name for p in loaded.plugins if not p.ours]


def test_a_good_plugin_registers_and_its_distribution_is_known(site):
    loaded = plugins("demo")
    (demo,) = [p for p in loaded.plugins if p.name == "demo"]
    assert (demo.distribution, demo.version, demo.module) == ("evalsuite-demo", "1.2.3", "evalsuite_demo")
    assert not demo.ours
    entry = loaded.registry.entry("task", "counting")
    assert entry == Entry("task", "counting", "evalsuite_demo:Counting", "demo", "how many squares are there?")
    assert loaded.registry.get("task", "counting") is sys.modules["evalsuite_demo"].Counting
    assert not faults(loaded)


def test_registering_imports_no_target(site):
    before = set(sys.modules)
    plugins("dangling")
    assert "evalsuite_demo" not in set(sys.modules) - before


def test_broken_plugins_are_faults_and_leave_the_good_ones_alone(site):
    loaded = load(environ={})
    assert {f.plugin.name for f in loaded.faults} >= set(FAULTY)
    assert set(strangers(loaded)) >= {"demo", "dangling", "rival"}
    assert not set(strangers(loaded)) & set(FAULTY)
    assert loaded.registry.get("task", "abacus") is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "RuntimeError: the simulator is not installed"),
        ("exits", "it calls sys.exit(3)"),
        ("exits_late", "it calls sys.exit('no licence found')"),
        ("signature", "config"),
        ("misnamed", "evalsuite_regsiter"),
        ("silent", "mark evalsuite_register with @evalsuite.hookimpl"),
        ("partial", "needs a target of the form 'module:attr', not 'evalsuite_partial'"),
    ],
)
def test_a_fault_is_one_line_that_names_plugin_distribution_version_and_reason(site, name, reason):
    told = fault(plugins(name), name)
    assert told.startswith(f"plugin {name!r} (evalsuite-faulty 0.9.0) is broken and was left out: ")
    assert reason in told
    assert "\n" not in told


@pytest.mark.parametrize("name", FAULTY)
def test_a_broken_plugin_leaves_nothing_behind(site, name):
    loaded = plugins(name, "demo")
    assert [e for e in loaded.registry.entries() if e.owner == name] == []
    assert strangers(loaded) == ["demo"]
    assert loaded.registry.entries("task") != []


def test_an_interrupt_is_not_taken_for_a_broken_plugin(site, tmp_path, monkeypatch):
    (tmp_path / "evalsuite_interrupted.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        plugins(requests=("evalsuite_interrupted",))


def test_a_clash_names_both_owners_and_spares_their_other_names(site):
    loaded = plugins("demo", "rival")
    with pytest.raises(PluginError) as refused:
        loaded.registry.get("task", "counting")
    assert refused.value.problem == "task 'counting' is offered twice"
    assert refused.value.cause == "by demo (evalsuite_demo:Counting) and rival (evalsuite_rival:Counting)"
    assert refused.value.fix == "leave one out: -p no:rival"
    assert "offered twice" in fault(loaded, "rival")
    assert loaded.registry.get("task", "abacus") is sys.modules["evalsuite_rival"].Counting
    assert loaded.registry.names("task").count("counting") == 1
    settled = plugins("demo", "rival", requests=("no:rival",))
    assert settled.registry.get("task", "counting") is sys.modules["evalsuite_demo"].Counting
    assert settled.registry.clashes() == []


def test_two_distributions_with_one_plugin_name_keep_the_first(site, tmp_path, monkeypatch):
    info = tmp_path / "evalsuite_twin-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evalsuite-twin\nVersion: 3.0\n")
    (info / "entry_points.txt").write_text("[evalsuite]\ndemo = evalsuite_unpackaged\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = plugins("demo")
    assert "(evalsuite-twin 3.0)" in fault(loaded, "demo")
    assert loaded.registry.entry("task", "counting").owner == "demo"
    assert "paper" not in loaded.registry.names("backbone")


@pytest.mark.parametrize(
    ("name", "cause", "fix"),
    [
        ("no-module", "No module named 'evalsuite_nowhere'", "pip install what provides 'evalsuite_nowhere'"),
        ("no-attribute", "has no attribute 'Absent'", "mend or leave out: -p no:dangling"),
        ("raising", "RuntimeError: the simulator is not installed", "mend or leave out: -p no:dangling"),
        ("exiting", "it calls sys.exit(3)", "mend or leave out: -p no:dangling"),
    ],
)
def test_a_target_that_cannot_be_imported_is_the_plugins_fault(site, name, cause, fix):
    loaded = plugins("dangling")
    assert not faults(loaded)
    with pytest.raises(PluginError) as refused:
        loaded.registry.get("task", name)
    assert refused.value.code == 5
    assert refused.value.problem == f"task {name!r} cannot be imported"
    assert cause in refused.value.cause
    assert "dangling binds it to" in refused.value.cause
    assert refused.value.fix == fix


def test_a_refusal_at_import_reaches_the_user_as_it_is(tmp_path, monkeypatch):
    source = "from evalsuite.errors import DataError\nraise DataError('no scenes', cause='lost', fix='fetch')"
    (tmp_path / "evalsuite_refusing.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry()
    registry.task("scenes", "evalsuite_refusing:Task")
    with pytest.raises(DataError, match="no scenes"):
        registry.get("task", "scenes")


def test_p_loads_a_module_nobody_packaged(site):
    loaded = plugins(requests=("evalsuite_unpackaged", "evalsuite_unpackaged"))
    assert strangers(loaded) == ["evalsuite_unpackaged"]
    assert not faults(loaded)
    assert loaded.registry.get("backbone", "paper")("crane") == "folded crane"


def test_p_of_a_module_that_does_not_exist_is_a_fault(site):
    told = fault(plugins(requests=("evalsuite_nowhere",)), "evalsuite_nowhere")
    assert told.endswith("left out: ModuleNotFoundError: No module named 'evalsuite_nowhere'")


def test_p_no_leaves_out_a_plugin_a_module_or_all_of_a_distribution(site):
    loaded = load(["no:demo", "no:evalsuite-faulty", "evalsuite_unpackaged", "no:evalsuite_unpackaged"], environ={})
    assert not {"demo", "dangling", "evalsuite_unpackaged", *FAULTY} & {p.name for p in loaded.plugins}
    assert not set(FAULTY) & {f.plugin.name for f in loaded.faults}
    assert {p.name for p in loaded.blocked} >= {"demo", "dangling", "evalsuite_unpackaged", *FAULTY}


def test_a_blocked_plugin_is_not_even_imported(site):
    plugins("demo", requests=("no:demo",))
    assert "evalsuite_demo" not in sys.modules


@pytest.mark.parametrize(
    ("listed", "loads"),
    [("", []), (" ", []), ("demo", ["demo"]), (" rival , demo,", ["demo", "rival"]), ("backbones", [])],
)
def test_the_allow_list_is_over_other_peoples_plugins(site, listed, loads):
    loaded = load(environ={"EVALSUITE_PLUGINS": listed})
    assert strangers(loaded) == loads
    assert "backbones" in [p.name for p in loaded.plugins if p.ours]


def test_without_an_allow_list_every_plugin_loads_and_with_one_p_still_adds(site):
    assert "demo" in strangers(load(environ={}))
    assert strangers(plugins("rival", requests=("demo",))) == ["demo", "rival"]


def test_the_allow_list_is_read_from_the_environment(site, monkeypatch):
    monkeypatch.setenv("EVALSUITE_PLUGINS", "rival")
    assert strangers(load()) == ["rival"]


def test_our_own_plugins_have_no_fault():
    assert plugins().faults == []


def test_our_own_plugins_come_through_the_same_door_and_can_be_blocked():
    loaded = plugins(requests=("no:backbones",))
    assert "backbones" in [p.name for p in loaded.blocked]
    assert plugins().registry.names("backbone") == ["objects", "rotnet", "small", "timm", "torchvision"]
    assert loaded.registry.names("backbone") == ["objects", "rotnet"]  # those of other plugins
    assert plugins(requests=("no:evalsuite",)).plugins == []


@pytest.mark.parametrize(
    ("shelf", "name", "problem", "fix"),
    [
        ("task", "countin", "no task named 'countin'", "did you mean 'counting'?"),
        ("task", "xylophone", "no task named 'xylophone'", "see: evalsuite list task"),
        ("tsak", "counting", "no shelf named 'tsak'", "did you mean 'task'?"),
        ("method", "any", "no method named 'any'", "see: evalsuite list method"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_known_one(shelf, name, problem, fix):
    registry = Registry()
    registry.task("counting", "evalsuite_demo:Counting")
    registry.task("abacus", "evalsuite_demo:Counting")
    with pytest.raises(UsageError) as refused:
        registry.get(shelf, name)
    assert (refused.value.problem, refused.value.fix) == (problem, fix)
    assert ("known: abacus, counting" if shelf == "task" else "known: ") in refused.value.cause


@pytest.mark.parametrize("shelf", SHELVES)
def test_every_shelf_has_its_verb(shelf):
    registry = Registry()
    getattr(registry, shelf)("thing", "json:dumps", "a summary")
    assert (
        registry.entries()
        == registry.entries(shelf)
        == [Entry(shelf, "thing", "json:dumps", "this program", "a summary")]
    )
    assert registry.names(shelf) == ["thing"]


def test_dotted_attributes_are_followed():
    registry = Registry()
    registry.task("thing", "json:JSONDecoder.decode")
    assert registry.get("task", "thing").__qualname__ == "JSONDecoder.decode"


@pytest.mark.parametrize(("name", "target"), [("", "a:b"), ("x", ""), ("x", "a"), ("x", "a:"), ("x", ":b")])
def test_a_target_without_module_and_attribute_is_refused(name, target):
    with pytest.raises(ValueError, match="of the form 'module:attr'"):
        Registry().task(name, target)


def test_what_is_bound_after_loading_is_the_programs_own(site):
    registry = plugins("demo").registry
    registry.task("mine", "json:dumps")
    assert registry.entry("task", "mine").owner == "this program"


def test_entries_come_by_shelf_and_name_whatever_the_order_of_registration():
    registry = Registry()
    registry.checkpoint("b", "m:x")
    registry.task("z", "m:x")
    registry.checkpoint("a", "m:x")
    registry.task("y", "m:x")
    assert [(e.shelf, e.name) for e in registry.entries()] == [
        ("task", "y"),
        ("task", "z"),
        ("checkpoint", "a"),
        ("checkpoint", "b"),
    ]


def test_a_misspelt_name_to_leave_out_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'tasks'"):
        load(["no:task"], environ={"EVALSUITE_PLUGINS": ""})
    assert "tasks" in [plugin.name for plugin in load(["no:tasks"], environ={"EVALSUITE_PLUGINS": ""}).blocked]
