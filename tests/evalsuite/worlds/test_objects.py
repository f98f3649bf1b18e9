"""The rules of the benchmark, line by line, and that its tasks can be solved and are not solved by chance."""

from __future__ import annotations

import copy
import heapq
import itertools
from collections import Counter, deque

import numpy as np
import pytest

from evalsuite import worlds
from evalsuite.errors import UsageError
from evalsuite.worlds.objects import COLOURS, RGB, SCALES, TASKS, Item, Rules, World, rules, variants
from evalsuite.worlds.sprites import SHAPES, Painter

UP, LEFT, DOWN, RIGHT = range(4)
COMPARISONS = ("object-comparison", "property-comparison")


def fresh(task: str, variant: str = "default", seed: int = 0, **changes: object) -> World:
    world = World(rules(task, variant, **changes))
    world.reset(np.random.default_rng(seed))
    return world


def many(task: str, variant: str = "default", count: int = 60, **changes: object) -> list[World]:
    return [fresh(task, variant, seed, **changes) for seed in range(count)]


def table(*rows: Item, kind: str = "goal", target: int = 0, **changes: object) -> World:
    """A world with these objects and an agent in the middle."""
    task = {"goal": "object-goal", "interaction": "object-interaction"}[kind]
    world = fresh(task, objects=(len(rows), len(rows)), mode="hard", **changes)
    goal = [Item("blue", "square", 0.15, 0.075, 0.075)] if kind == "interaction" else []
    world.items = [*rows, *goal, Item("red", "circle", 0.15, 0.5, 0.5)]
    world.count, world.target, world.taken = len(rows), target, 0
    return world


def square(x: float, y: float) -> Item:
    return Item("blue", "square", 0.15, x, y)


# --- what is where ----------------------------------------------------------------------------------------------


def test_palettes():
    assert COLOURS == ("blue", "green", "yellow", "red", "cyan", "pink", "brown")
    assert SHAPES[:4] == ("square", "triangle", "star_4", "circle")
    assert len(SHAPES) == 12
    assert SCALES == (0.15, 0.22)
    assert RGB["green"] == (0, 128, 0)  # 0.50196 * 255 = 128.0
    assert RGB["pink"] == (255, 192, 203)
    assert RGB["brown"] == (165, 42, 42)


@pytest.mark.parametrize("task", TASKS)
def test_every_variant_makes_worlds_of_its_palettes(task: str):
    for variant in variants(task):
        found = rules(task, variant)
        for world in many(task, variant, 5):
            assert found.objects[0] <= world.count <= found.objects[1]
            things = world.items[: world.count]
            allowed = {(c, s, k) for c in found.colours for s in found.shapes for k in found.scales}
            if found.kind in ("goal", "interaction"):
                assert Counter((t.colour, t.shape, t.scale) for t in things)[found.target] == 1
                assert (things[world.target].colour, things[world.target].shape) == ("blue", "square")
                allowed.add(found.target)
            assert {(t.colour, t.shape, t.scale) for t in things} <= allowed


@pytest.mark.parametrize("task", [t for t in TASKS if t != "random-objects"])
def test_things_keep_their_distance(task: str):
    for world in many(task):
        found = world.rules
        for thing, other in itertools.combinations(world.items[: world.count], 2):
            assert thing.distance(other.x, other.y) >= (thing.scale + other.scale) / 2 + 0.08 - 1e-9
        for thing in world.items[: world.count]:
            assert thing.distance(world.agent.x, world.agent.y) >= 0.23 - 1e-9
            inset = thing.scale / 2 + found.wall
            assert inset <= thing.x <= 1 - inset
            assert inset <= thing.y <= 1 - inset


def test_objects_of_the_pretraining_set_may_overlap_but_not_at_their_centres():
    worlds = many("random-objects")
    pairs = [(a, b) for w in worlds for a, b in itertools.combinations(w.items[: w.count], 2)]
    nearest = min(a.distance(b.x, b.y) for a, b in pairs)
    assert 0.15 <= nearest < 0.22
    assert all(w.count == 5 for w in worlds)
    assert {t.shape for w in worlds for t in w.items[:5]} == {"square", "triangle", "star_4", "circle"}
    assert len(worlds[0].sprites()) == 5  # the agent is not drawn


def test_the_agent_starts_in_the_middle_and_is_drawn_last():
    world = fresh("object-goal")
    assert (world.agent.x, world.agent.y) == (0.5, 0.5)
    assert world.sprites()[-1].rgb == (255, 0, 0)
    assert world.sprites()[-1].shape == "circle"


def test_interaction_has_quadrants_a_goal_in_the_corner_and_the_target_first():
    for world in many("object-interaction"):
        assert world.target == 0
        assert (world.agent.x, world.agent.y) == (0.75, 0.75)
        goal = world.items[-2]
        assert (goal.colour, goal.shape, goal.x, goal.y) == ("blue", "square", 0.075, 0.075)
        places = [(t.x > 0.5, t.y > 0.5) for t in world.items[:3]]
        assert places == [(False, True), (False, False), (True, False)]
    hard = many("object-interaction", "hard")
    assert all((w.agent.x, w.agent.y) == (0.5, 0.5) for w in hard)
    assert len({(w.items[0].x > 0.5, w.items[0].y > 0.5) for w in hard}) == 4


def test_modes_of_goal():
    for world in many("object-goal", mode="normal", count=20):
        places = [(t.x > 0.5, t.y > 0.5) for t in world.items[:4]]
        assert places == [(False, True), (False, False), (True, False), (True, True)]
    for world in many("object-goal", mode="easy", count=20):
        centres = [(0.25, 0.75), (0.25, 0.25), (0.75, 0.25), (0.75, 0.75)]
        assert all(
            abs(t.x - x) <= 0.05 and abs(t.y - y) <= 0.05 for t, (x, y) in zip(world.items[:4], centres, strict=True)
        )


def test_the_target_of_goal_is_anywhere_in_the_list():
    assert set(Counter(w.target for w in many("object-goal"))) == {0, 1, 2, 3}


# --- the odd one ------------------------------------------------------------------------------------------------


def singletons(world: World) -> list[tuple[int, int]]:
    """(property, object) of every value that one object alone has."""
    rows = [(t.colour, t.shape, t.scale) for t in world.items[: world.count]]
    found = []
    for n in range(3):
        counts = Counter(row[n] for row in rows)
        found += [(n, place) for place, row in enumerate(rows) if counts[row[n]] == 1]
    return found


@pytest.mark.parametrize("task", COMPARISONS)
def test_exactly_one_object_is_odd_in_exactly_one_property(task: str):
    for variant in variants(task):
        for world in many(task, variant, 25):
            ((_, place),) = singletons(world)
            assert place == world.target


def test_in_object_comparison_the_others_are_all_alike():
    odd = Counter()
    for world in many("object-comparison", "c4s4k2", 120):
        others = {(t.colour, t.shape, t.scale) for n, t in enumerate(world.items[: world.count]) if n != world.target}
        ((kind, _),) = singletons(world)
        odd[kind] += 1
        own = world.items[world.target]
        for n, name in enumerate(("colour", "shape", "scale")):
            if n != kind:
                assert {getattr(own, name)} == {row[n] for row in others}
    assert min(odd.values()) > 20


def test_in_property_comparison_the_other_property_is_mixed():
    mixed = 0
    for world in many("property-comparison", count=100):
        ((kind, _),) = singletons(world)
        other = "shape" if kind == 0 else "colour"
        mixed += len({getattr(t, other) for t in world.items[:4]}) == 2
    assert 5 < mixed < 40  # two and two in one case of six, else four alike


@pytest.mark.parametrize("name", ["1", "2", "3"])
def test_pairs_of_colours_are_kept_for_the_test(name: str):
    pair = set(rules("property-comparison", f"pair-test{name}").pair)

    def together(world: World) -> bool:
        return {t.colour for t in world.items[: world.count]} == pair

    assert not any(map(together, many("property-comparison", f"pair-train{name}")))
    tested = many("property-comparison", f"pair-test{name}")
    assert all(map(together, tested))
    assert {w.target for w in tested} == {0}


# --- moving and touching ----------------------------------------------------------------------------------------


def test_actions_move_up_left_down_right():
    for action, where in {UP: (0.5, 0.55), LEFT: (0.45, 0.5), DOWN: (0.5, 0.45), RIGHT: (0.55, 0.5)}.items():
        world = table(square(0.1, 0.1))
        world.act(action)
        assert (world.agent.x, world.agent.y) == pytest.approx(where)


@pytest.mark.parametrize("action", [4, -1, 0.5])
def test_another_action_is_refused(action: float):
    with pytest.raises(ValueError, match="an action is 0"):
        table(square(0.1, 0.1)).act(action)


def test_the_border_stops_the_agent():
    world = table(square(0.1, 0.9))
    for _ in range(20):
        world.act(DOWN)
        world.act(RIGHT)
    assert (world.agent.x, world.agent.y) == (0.925, 0.075)


def test_touch_is_a_distance_below_the_agents_size():
    world = table(square(0.7 + 1e-9, 0.5))
    assert world.act(RIGHT) == (0.0, False, False)  # 0.15 away
    assert world.act(RIGHT) == (1.0, True, True)


@pytest.mark.parametrize(("reward", "gain"), [("sparse", 0.0), ("normal", 0.1), ("dense", 0.0)])
def test_a_wrong_object_ends_the_episode(reward: str, gain: float):
    world = table(square(0.1, 0.1), square(0.69, 0.5), reward=reward)
    assert world.act(RIGHT) == (gain, False, True)


def test_the_first_object_in_reach_decides():
    near, nearer = square(0.69, 0.5), square(0.6, 0.5)
    assert table(near, nearer, target=0).act(RIGHT) == (1.0, True, True)
    assert table(near, nearer, target=1).act(RIGHT) == (0.0, False, True)


def test_dense_reward_is_for_getting_nearer():
    world = table(square(0.9, 0.5), reward="dense")
    assert world.act(RIGHT)[0] == 0.01
    assert world.act(LEFT)[0] == -0.01


# --- pushing ----------------------------------------------------------------------------------------------------


def test_an_object_in_the_way_is_pushed():
    world = table(square(0.64, 0.5), square(0.1, 0.9), kind="interaction")
    world.act(RIGHT)
    assert (world.items[0].x, world.agent.x) == pytest.approx((0.69, 0.55))
    world.act(UP)  # along its side: it is still within reach, and goes along
    assert world.items[0].y == pytest.approx(0.55)


def test_an_object_at_the_wall_blocks_the_agent():
    world = table(square(0.64, 0.5), square(0.1, 0.9), kind="interaction")
    for _ in range(12):
        world.act(RIGHT)
    assert world.items[0].x == 0.925
    assert world.agent.x == pytest.approx(0.785)  # the last push was shorter
    before = world.agent.x
    world.act(UP)  # an object exactly at a wall blocks along that axis only
    assert world.agent.y > 0.5
    assert world.agent.x == before


def test_an_object_behind_another_blocks():
    world = table(square(0.64, 0.5), square(0.8, 0.5), kind="interaction")
    world.act(RIGHT)
    assert (world.items[0].x, world.agent.x) == pytest.approx((0.64, 0.5))


def test_only_the_target_on_the_goal_counts():
    right = table(square(0.29, 0.075), square(0.9, 0.9), kind="interaction")
    wrong = table(square(0.9, 0.9), square(0.29, 0.075), kind="interaction")
    for world in (right, wrong):
        world.agent.x, world.agent.y = 0.435, 0.075
    assert right.act(LEFT) == (0.0, False, False)
    assert right.act(LEFT) == (1.0, True, True)
    assert wrong.act(LEFT) == (0.0, False, False)
    assert wrong.act(LEFT) == (0.0, False, True)


def test_dense_reward_of_pushing_is_for_any_move_of_the_target():
    world = table(square(0.64, 0.5), square(0.1, 0.9), kind="interaction", reward="dense")
    assert world.act(RIGHT)[0] == 0.01
    assert world.act(LEFT)[0] == 0.0


# --- what is seen -----------------------------------------------------------------------------------------------


def test_state_has_places_in_the_lists_the_agent_last_and_zeros_after():
    world = fresh("random-objects", "objects-1-9", seed=3)
    out = np.empty((10, 5), np.float32)
    world.state(out)
    assert world.count < 9
    for row, item in zip(out, world.items, strict=False):
        assert (COLOURS[int(row[0])], SHAPES[int(row[1])], SCALES[int(row[2])]) == (item.colour, item.shape, item.scale)
        assert row[3:] == pytest.approx([item.x, item.y])
    assert not out[world.count + 1 :].any()


def test_masks_show_each_alone_and_the_ground_last():
    world = fresh("random-objects", seed=1)
    masks = np.empty((7, 64, 64), np.uint8)
    world.masks(masks)
    image = np.empty((64, 64, 3), np.uint8)
    world.image(image)
    assert not masks[5].any()  # the agent, which is not shown
    assert np.mean(masks[6].astype(bool) == image.any(axis=2)) < 0.01  # where they overlap, faint rims cancel
    segments = world.segments()
    for place in range(5):
        assert masks[place][segments == place].all()


def test_any_array_is_drawn_completely_and_again_after_it_was_written_to():
    world = fresh("random-objects", seed=1)
    first = np.zeros((64, 64, 3), np.uint8)
    world.image(first)
    assert first.any()
    world.act(UP)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    outs = [noise, np.empty((3, 64, 64), np.uint8).transpose(1, 2, 0), np.full((2, 64, 64, 3), 7, np.uint8)[1], first]
    expected = np.empty((64, 64, 3), np.uint8)
    Painter(64).paint(world.sprites(), expected)
    for out in outs:
        world.image(out)
        assert np.array_equal(out, expected)
        out[:] = 9
        world.image(out)
        assert np.array_equal(out, expected)


@pytest.mark.parametrize("task", ["random-objects", "object-reaching"])
@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("image", (32, 32, 3)),
        ("image", (2, 64, 64, 3)),
        ("image", (64, 64, 4)),
        ("masks", (3, 64, 64)),
        ("masks", (7, 64, 32)),
        ("state", (1, 5)),
        ("state", (20, 17)),
    ],
)
def test_an_array_that_does_not_hold_it_is_refused(task: str, method: str, shape: tuple[int, ...]):
    if task == "object-reaching":
        pytest.importorskip("mujoco", reason="object-reaching needs MuJoCo")
    place = worlds.world(worlds.rules(task))
    place.reset(np.random.default_rng(0))
    with pytest.raises(ValueError, match="has the shape"):
        getattr(place, method)(np.zeros(shape))


# --- bad rules --------------------------------------------------------------------------------------------------


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(UsageError, match="no variant 'ocr-colour9'") as refusal:
        rules("object-goal", "ocr-colour9")
    assert "ocr-color1" in refusal.value.cause


@pytest.mark.parametrize(
    ("task", "changes", "cause"),
    [
        ("object-comparison", {"objects": (2, 2)}, "none can be the odd one"),
        ("object-interaction", {"objects": (4, 4)}, "mode normal places 3 objects"),
        ("object-goal", {"colours": ("blue", "mauve")}, "unknown colours"),
        ("property-comparison", {"colours": ("blue",), "shapes": ("square",)}, "no property has two values"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(task: str, changes: dict, cause: str):
    with pytest.raises(UsageError) as refusal:
        rules(task, **changes)
    assert cause in refusal.value.cause


def test_an_unknown_rule_is_refused():
    with pytest.raises(UsageError, match="no colors"):
        rules("object-goal", colors=("blue",))


# --- solvable, and not by chance --------------------------------------------------------------------------------


def walk(world: World) -> bool:
    """Go to the target by the shortest way that touches no other object; whether that succeeds."""
    seen, queue = {(0, 0)}, deque([((0, 0), ())])
    others = [t for n, t in enumerate(world.items[: world.count]) if n != world.target]
    aim, start = world.items[world.target], copy.copy(world.agent)
    while queue:
        (i, j), path = queue.popleft()
        x, y = start.x + i * 0.05, start.y + j * 0.05
        if aim.distance(x, y) < 0.149:
            outcome = [world.act(action) for action in path][-1]
            return outcome[1]
        for action, (di, dj) in enumerate(((0, 1), (-1, 0), (0, -1), (1, 0))):
            place = (i + di, j + dj)
            x, y = start.x + place[0] * 0.05, start.y + place[1] * 0.05
            inside = 0.075 < x < 0.925 and 0.075 < y < 0.925
            if inside and place not in seen and all(t.distance(x, y) > 0.151 for t in others):
                seen.add(place)
                queue.append((place, (*path, action)))
    return False


def push(world: World, patience: int = 20_000) -> bool:
    """Search over the world itself (greedy best first) for pushes that bring the target onto the goal."""
    goal = world.items[-2]

    def key(found: World) -> tuple[int, ...]:
        return tuple(round(v * 1000) for t in (*found.items[: found.count], found.agent) for v in (t.x, t.y))

    def estimate(found: World) -> float:
        aim = found.items[0]
        return 8 * aim.distance(goal.x, goal.y) + aim.distance(found.agent.x, found.agent.y)

    order = itertools.count()
    queue, seen = [(estimate(world), next(order), world, 0)], {key(world)}
    for _ in range(patience):
        if not queue:
            return False
        _, _, current, depth = heapq.heappop(queue)
        for action in range(4):
            after = World(current.rules)
            after.items, after.count, after.target = [copy.copy(t) for t in current.items], current.count, 0
            _, success, ended = after.act(action)
            if success:
                return depth + 1 <= 100
            if not ended and key(after) not in seen:
                seen.add(key(after))
                heapq.heappush(queue, (estimate(after), next(order), after, depth + 1))
    return False


@pytest.mark.parametrize("task", ["object-goal", *COMPARISONS])
def test_an_oracle_reaches_the_target(task: str):
    assert np.mean([walk(world) for world in many(task, count=100)]) > 0.95


def test_an_oracle_pushes_the_target_onto_the_goal():
    assert np.mean([push(world) for world in many("object-interaction", count=25)]) > 0.95


@pytest.mark.parametrize("task", ["object-goal", *COMPARISONS])
def test_by_chance_one_touched_object_in_four_is_the_target(task: str):
    rng, touched = np.random.default_rng(0), []
    for world in many(task, count=300):
        for _ in range(100):
            _, success, ended = world.act(int(rng.integers(4)))
            if ended:
                touched.append(success)
                break
    assert 0.15 < np.mean(touched) < 0.35


def test_frozen_rules_cannot_drift():
    with pytest.raises(AttributeError):
        rules("object-goal").steps = 5  # type: ignore[misc]
    assert isinstance(TASKS["object-goal"]["default"], Rules)
