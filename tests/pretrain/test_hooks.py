"""Recipes: who answers which stage, and what is refused before any work."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from evalsuite import PluginError, UsageError, hookimpl
from pretrain import Method, Modifier, Recipe, Stages
from pretrain.testing import tiny_corpus


class Plain(Method):
    """Learns nothing, and says so."""

    @hookimpl
    def losses(self):
        return {"plain": torch.zeros(())}


class Paired(Plain):
    @hookimpl
    def pairs(self):
        return ["method"]


class Doubler(Modifier):
    @hookimpl(wrapper=True)
    def pairs(self):
        found = yield
        return [f"{type(self).__name__}({found[0]})"]


class Tripler(Doubler):
    pass


def test_a_stage_is_the_method_inside_its_modifiers_the_last_outermost():
    recipe = Recipe(Paired(), Doubler(), Tripler())
    assert recipe.pairs(None, None, []) == ["Tripler(Doubler(method))"]
    assert recipe.name == "paired+doubler+tripler"


def test_a_method_replaces_a_default_and_a_modifier_wraps_it():
    class Fewer(Modifier):
        @hookimpl(wrapper=True)
        def dataset(self):
            data = yield
            return [data[0]]

    data = tiny_corpus(8).train
    assert Recipe(Plain()).dataset(None, data) is data
    assert len(Recipe(Plain(), Fewer()).dataset(None, data)) == 1


def test_a_method_without_positives_has_no_pairs_and_refuses_who_wraps_them():
    assert Recipe(Plain()).pairs(None, None, []) == []
    with pytest.raises(UsageError, match="Doubler wraps 'pairs', which Plain does not offer") as refusal:
        Recipe(Plain(), Doubler())
    assert "offers losses" in refusal.value.cause


def test_a_method_without_a_loss_is_refused():
    class Idle(Method):
        pass

    with pytest.raises(PluginError, match="nothing gives 'losses'"):
        Recipe(Idle())


def test_an_unmarked_stage_is_refused_even_where_it_overrides_a_marked_one():
    class Forgot(Plain):
        def losses(self):
            return {}

    with pytest.raises(PluginError, match=r"Forgot\.losses is named like a stage but is not marked @hookimpl"):
        Recipe(Forgot())


def test_an_unknown_hook_is_refused():
    class Newer(Plain):
        @hookimpl
        def prefetched(self):
            pass

    with pytest.raises(PluginError, match="Newer cannot be part of a recipe") as refusal:
        Recipe(Newer())
    assert "prefetched" in refusal.value.cause
    assert "batches" in refusal.value.fix


def test_an_unknown_argument_is_refused():
    class Asks(Plain):
        @hookimpl
        def prepared(self, run, weather):
            pass

    with pytest.raises(PluginError, match=r"Asks\.prepared asks for 'weather'") as refusal:
        Recipe(Asks())
    assert refusal.value.cause == "a stage prepared may ask for run, data"


def test_arguments_that_would_never_be_passed_are_refused():
    class Defaulted(Plain):
        @hookimpl
        def prepared(self, run=None):
            pass

    class Keyword(Plain):
        @hookimpl
        def prepared(self, *, run):
            pass

    with pytest.raises(PluginError, match=r"Defaulted\.prepared has a default for 'run'"):
        Recipe(Defaulted())
    with pytest.raises(PluginError, match=r"Keyword\.prepared takes 'run' by keyword only"):
        Recipe(Keyword())


def test_a_part_is_taken_once():
    with pytest.raises(UsageError, match="'doubler' is in the recipe twice"):
        Recipe(Paired(), Doubler(), Doubler())


def test_losses_add_up_and_one_name_twice_is_refused():
    class Extra(Modifier):
        @dataclass(frozen=True)
        class Options:
            name: str = "extra"

        @hookimpl
        def losses(self):
            return {self.options.name: torch.ones(())}

    terms = Recipe(Plain(), Extra()).losses(None, None, [], [])
    assert list(terms) == ["plain", "extra"]
    with pytest.raises(PluginError, match="two losses of plain\\+extra are called 'plain'"):
        Recipe(Plain(), Extra(Extra.Options(name="plain"))).losses(None, None, [], [])


def test_a_modifier_may_reweight_the_losses():
    class Half(Modifier):
        @hookimpl(wrapper=True)
        def losses(self):
            found = yield
            return [{name: 0.5 * (term + 1) for name, term in part.items()} for part in found]

    assert float(Recipe(Plain(), Half()).losses(None, None, [], [])["plain"]) == 0.5


def test_parts_are_prepared_in_order_and_draw_from_random_states_of_their_own():
    heard = []

    class Draws(Paired):
        @hookimpl
        def prepared(self):
            heard.append(("method", torch.rand(()).item()))

    class Gambler(Doubler):
        @hookimpl
        def prepared(self):
            heard.append(("modifier", torch.rand(5).sum().item()))

    class Run:
        seed = 3

    Recipe(Draws()).prepared(Run(), None)
    alone = heard.pop()
    Recipe(Draws(), Gambler()).prepared(Run(), None)
    assert heard[0] == alone
    assert [who for who, _ in heard] == ["method", "modifier"]


def test_options_of_another_class_are_refused():
    with pytest.raises(TypeError, match="Doubler takes"):
        Doubler(options=3)


def test_a_plugin_is_a_module_whose_buffers_travel():
    class Holds(Plain):
        @hookimpl
        def prepared(self):
            self.register_buffer("bank", torch.ones(2))

    class Run:
        seed = 0

    recipe = Recipe(Holds())
    recipe.prepared(Run(), None)
    assert list(nn.ModuleDict(recipe.parts).state_dict()) == ["holds.bank"]


def test_every_stage_says_what_it_is_for():
    for name, stage in vars(Stages).items():
        if not name.startswith("_"):
            assert stage.__doc__, name


def test_measures_of_all_parts_are_put_together_and_one_name_twice_is_refused():
    class Measured(Plain):
        @hookimpl
        def measures(self, data):
            return {"size": len(data)}

    class Also(Modifier):
        @hookimpl
        def measures(self):
            return {"other": 0.5}

    class Clashes(Modifier):
        @hookimpl
        def measures(self):
            return {"size": 2}

    data = tiny_corpus(8).train
    assert Recipe(Plain()).measures(None, data) == {}
    assert Recipe(Measured(), Also()).measures(None, data) == {"size": 8.0, "other": 0.5}
    with pytest.raises(PluginError, match="two measures of measured\\+clashes are called 'size'"):
        Recipe(Measured(), Clashes()).measures(None, data)
