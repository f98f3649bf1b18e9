"""Worlds of a few flat objects and an agent: the rules, placement and rewards of the object-centric RL benchmark.

Yoon et al., An Investigation into Pre-Training Object-Centric Representations for Reinforcement Learning, ICML 2023
(arXiv 2302.04419); rules as in jsikyoon/OCRL, envs/synthetic_envs and configs/env at commit 01d0bd56. The canvas is
the unit square, y upwards. What departs from there: every world draws from a generator of its own, not from numpy's
global one; a layout that cannot be completed in :data:`TRIES` draws a position is begun anew, where the original
would never return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb

from evalsuite.errors import UsageError
from evalsuite.worlds.sprites import SHAPES, Painter, Sprite

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["COLOURS", "SCALES", "TASKS", "Rules", "World", "rules", "variants"]

COLOURS = ("blue", "green", "yellow", "red", "cyan", "pink", "brown")
SCALES = (0.15, 0.22)
# the original truncates where it turns matplotlib's colours into bytes
RGB = {name: (int(r * 255), int(g * 255), int(b * 255)) for name in COLOURS for r, g, b in [to_rgb(name)]}
TRIES = 10_000  # draws of one object's position before a layout is begun anew
TINY = 1e-6

Kind = Literal["goal", "interaction", "comparison", "random"]
Mode = Literal["easy", "normal", "hard"]
Kinds = tuple[str, str, float]  # colour, shape, scale
Region = tuple[float, float, float, float]  # x from, x to, y from, y to


@dataclass(frozen=True, kw_only=True)
class Rules:
    """One environment. Lengths are parts of the canvas's side.

    ``objects``: how many, from and to. ``mode`` is where they may be: ``"easy"`` in small boxes, ``"normal"`` one a
    quadrant, ``"hard"`` anywhere. ``reward``: ``"sparse"`` is 1 for the target; ``"normal"`` gives 0.1 for a wrong
    object; ``"dense"`` adds 0.01 a step towards the target (takes 0.01 otherwise; in interaction 0.01 where the
    target moved). ``gap`` is kept between objects and from the agent, ``wall`` from the border. ``alike``: in the
    comparison, all properties but the odd one are the same for all. ``pair``: two colours that never
    (``pairing="train"``), or always (``"test"``) are the odd and the common colour; the target then is object 0.
    ``occlusion``: objects may overlap, centres 0.15 apart.
    """

    kind: Kind
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    scales: tuple[float, ...] = (0.15,)
    objects: tuple[int, int] = (4, 4)
    target: Kinds = ("blue", "square", 0.15)
    agent: Kinds = ("red", "circle", 0.15)
    mode: Mode = "hard"
    reward: Literal["sparse", "normal", "dense"] = "sparse"
    gap: float = 0.08
    wall: float = 0.08
    stride: float = 0.05
    steps: int = 100
    shown: bool = True
    occlusion: bool = False
    alike: bool = False
    pair: tuple[str, str] | None = None
    pairing: Literal["train", "test"] = "train"

    @property
    def rows(self) -> int:
        """Objects, the goal where there is one, and the agent."""
        return self.objects[1] + 1 + (self.kind == "interaction")

    @property
    def bounds(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The lowest and the highest state, (rows, 5) each."""
        high = np.array([len(COLOURS) - 1, len(SHAPES) - 1, len(SCALES) - 1, 1, 1], dtype=np.float32)
        return np.zeros((self.rows, 5), dtype=np.float32), np.tile(high, (self.rows, 1))

    @property
    def rate(self) -> int:
        """Steps a second, where they are shown."""
        return 10


_FOUR = ("blue", "green", "yellow", "red")
_GOAL = Rules(kind="goal", colours=_FOUR, shapes=("square", "triangle", "star_4"))
_INTERACTION = Rules(
    kind="interaction", colours=_FOUR, shapes=("square",), objects=(3, 3), wall=0.15, mode="normal"
)  # fmt: skip
_PROPERTY = Rules(kind="comparison", colours=("blue", "green"), shapes=("square", "triangle"))
_ONE_SHAPE = replace(_PROPERTY, colours=("blue", "green", "yellow"), shapes=("square",))
_RANDOM = Rules(
    kind="random", colours=_FOUR, shapes=("square", "triangle", "star_4", "circle"), scales=SCALES, objects=(5, 5),
    shown=False, occlusion=True,
)  # fmt: skip


def _target_variants(base: Rules, most: int) -> dict[str, Rules]:
    """Colours the encoder never saw; other numbers of objects. Quadrants are for three: others may be anywhere."""
    palettes = (("yellow", "pink"), ("brown", "pink"))
    variants = {
        f"ocr-color{n}": replace(base, colours=("blue", "green", *palette)) for n, palette in enumerate(palettes, 1)
    }
    variants["ocr-color3"] = replace(base, colours=("blue", "cyan", "brown", "pink"))
    for count in range(1, most + 1):
        mode: Mode = base.mode if count == base.objects[1] else "hard"
        variants[f"objects-{count}"] = replace(base, objects=(count, count), mode=mode)
    return variants


def _comparison_variants(base: Rules) -> dict[str, Rules]:
    """Appearances new to the agent (``agent-``) or to encoder and agent (``ocr-``), numbers and difficulties."""
    variants = {
        "agent-color1": replace(base, colours=("blue", "yellow")),
        "agent-color2": replace(base, colours=("red", "yellow")),
        "agent-shape1": replace(base, shapes=("star_4", "triangle")),
        "agent-shape2": replace(base, shapes=("star_4", "circle")),
        "ocr-color1": replace(base, colours=("blue", "pink")),
        "ocr-color2": replace(base, colours=("cyan", "pink")),
        "ocr-shape1": replace(base, shapes=("star_5", "triangle")),
        "ocr-shape2": replace(base, shapes=("star_5", "spoke_4")),
        "ocr-color2-shape2": replace(base, colours=("cyan", "pink"), shapes=("star_5", "spoke_4")),
    }
    variants |= {f"objects-{count}": replace(base, objects=(count, count)) for count in range(3, 7)}
    for c, s, k in product((2, 3, 4), (1, 2, 3, 4), (1, 2)):
        variants[f"c{c}s{s}k{k}"] = replace(base, colours=_FOUR[:c], shapes=_RANDOM.shapes[:s], scales=SCALES[:k])
    return variants


def _one_shape_variants() -> dict[str, Rules]:
    """Squares of three colours: numbers of objects, colours never seen, and pairs of colours never seen together."""
    variants = {f"c3s1k1-objects-{count}": replace(_ONE_SHAPE, objects=(count, count)) for count in range(3, 8)}
    variants["c3s1k1-ocr-color1"] = replace(_ONE_SHAPE, colours=("blue", "green", "pink"))
    variants["c3s1k1-ocr-color2"] = replace(_ONE_SHAPE, colours=("blue", "cyan", "pink"))
    variants["c3s1k1-ocr-color3"] = replace(_ONE_SHAPE, colours=("brown", "cyan", "pink"))
    pairs = {"1": ("blue", "yellow"), "2": ("green", "yellow"), "3": ("blue", "green")}
    for name, pair in pairs.items():
        variants[f"pair-train{name}"] = replace(_ONE_SHAPE, pair=pair, pairing="train")
        variants[f"pair-test{name}"] = replace(_ONE_SHAPE, pair=pair, pairing="test")
    variants["pair-test2-cyan"] = replace(
        _ONE_SHAPE, colours=("blue", "cyan", "yellow"), pair=("cyan", "yellow"), pairing="test"
    )
    variants["pair-test3-cyan"] = replace(
        _ONE_SHAPE, colours=("cyan", "green", "yellow"), pair=("cyan", "green"), pairing="test"
    )
    return variants


_OBJECT = replace(_PROPERTY, alike=True)
TASKS: Mapping[str, Mapping[str, Rules]] = {
    "object-goal": {"default": _GOAL, **_target_variants(_GOAL, 7)},
    "object-interaction": {
        "default": _INTERACTION, "hard": replace(_INTERACTION, mode="hard"), **_target_variants(_INTERACTION, 5),
    },
    "object-comparison": {"default": _OBJECT, **_comparison_variants(_OBJECT)},
    "property-comparison": {"default": _PROPERTY, **_comparison_variants(_PROPERTY), **_one_shape_variants()},
    "random-objects": {
        "default": _RANDOM, "one-scale": replace(_RANDOM, scales=SCALES[:1]),
        "objects-1-9": replace(_RANDOM, objects=(1, 9), gap=0.03, wall=0.03),
    },
}  # fmt: skip


def variants(task: str) -> tuple[str, ...]:
    """The named variants of a task, ``"default"`` first."""
    return tuple(TASKS[task])


def rules(task: str, variant: str = "default", **changes: Any) -> Rules:
    """The rules of a task's variant, with fields of :class:`Rules` changed.

    ``object-interaction`` keeps objects in quadrants by default, as the benchmark's list of runs has it; its plots
    ask for ``hard``, which that list does not hold, so which one the paper reports is not known.

    Raises :class:`UsageError` for a variant or a field that does not exist, and for rules that contradict each other.
    """
    changed = vary(task, TASKS[task], variant, changes)
    _check(changed)
    return changed


AnyRules = TypeVar("AnyRules", bound="DataclassInstance")


def vary(task: str, known: Mapping[str, AnyRules], variant: str, changes: Mapping[str, Any]) -> AnyRules:
    """The rules of a variant, with fields changed; an unknown variant or field is refused."""
    if variant not in known:
        raise UsageError(
            f"{task} has no variant {variant!r}",
            cause=f"it has {', '.join(known)}",
            fix="--set variant=NAME with one of these",
        )
    names = known[variant].__dataclass_fields__
    if strange := sorted(set(changes) - set(names)):
        raise UsageError(
            f"rules have no {', '.join(strange)}",
            cause=f"they have {', '.join(names)}",
            fix="use one of these names",
        )
    return replace(known[variant], **changes)


def check_shape(out: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise ValueError where ``out`` would not hold all that is written to it."""
    if out.shape != shape:
        raise ValueError(f"out has the shape {out.shape}, not {shape}")


def _check(rules: Rules) -> None:
    least = 3 if rules.kind == "comparison" else 1
    fixed = {"easy": (2, 3, 4), "normal": (4,)}.get(rules.mode, ())
    if rules.kind == "interaction" and fixed:
        fixed = (3,)
    faults = {
        f"of {rules.objects[0]} objects none can be the odd one; there must be {least}": rules.objects[0] < least,
        f"mode {rules.mode} places {' or '.join(map(str, fixed))} objects, not {rules.objects[0]} to "
        f"{rules.objects[1]}": bool(fixed) and not set(range(rules.objects[0], rules.objects[1] + 1)) <= set(fixed),
        f"unknown colours, shapes or scales in {rules.colours}, {rules.shapes}, {rules.scales}": not (
            set(rules.colours) <= set(COLOURS) and set(rules.shapes) <= set(SHAPES) and set(rules.scales) <= set(SCALES)
        ),
        "no property has two values, so that none can be odd": rules.kind == "comparison"
        and max(len(rules.colours), len(rules.shapes), len(rules.scales)) < 2,
    }  # fmt: skip
    for fault, present in faults.items():
        if present:
            raise UsageError("these rules make no world", cause=fault, fix="change objects, mode or the palettes")


@dataclass
class Item:
    """One row of the state: an object, the goal or the agent."""

    colour: str
    shape: str
    scale: float
    x: float = 0.0
    y: float = 0.0

    def distance(self, x: float, y: float) -> float:
        return math.hypot(self.x - x, self.y - y)


class World:
    """One episode after the other under one set of rules.

    ``items`` are the objects, the goal in an interaction, and the agent last; later ones are drawn on top.
    ``target`` is the index of the object to touch, or to push onto the goal.
    """

    def __init__(self, rules: Rules, size: int = 64) -> None:
        self.rules = rules
        self.items: list[Item] = []
        self.target = 0
        self.taken = 0
        self.count = 0
        self._painter = Painter(size)
        self._canvas = np.zeros((size, size, 3), dtype=np.uint8)
        self._drawn: list[Sprite] | None = None  # what the canvas shows

    @property
    def agent(self) -> Item:
        return self.items[-1]

    def reset(self, rng: np.random.Generator) -> None:
        """Draw objects and their positions."""
        rules = self.rules
        self.taken, self._drawn = 0, None
        self.count = int(rng.integers(rules.objects[0], rules.objects[1] + 1))
        self.target = 0
        if rules.kind == "goal" or (rules.kind == "comparison" and rules.pair is None):
            self.target = int(rng.integers(self.count))
        things = {"comparison": _odd_one, "random": _any}.get(rules.kind, _one_target)(rules, rng, self)
        if rules.kind == "interaction":
            goal = Item(*rules.target)
            goal.x = goal.y = goal.scale / 2
            things.append(goal)
        self.items = [*things, Item(*rules.agent)]
        self.agent.x, self.agent.y = (0.75, 0.75) if self._quadrants() else (0.5, 0.5)
        while not self._place_objects(rng):
            pass

    def act(self, action: int) -> tuple[float, bool, bool]:
        """Move the agent up (0), left (1), down (2) or right (3); the reward, whether the target was reached, the end.

        The end is of the episode by touch; the limit of steps is not counted here. Raises :class:`ValueError` for
        another action.
        """
        if np.shape(action) or action not in (0, 1, 2, 3):
            raise ValueError(f"an action is 0 (up), 1 (left), 2 (down) or 3 (right), not {action!r}")
        self.taken += 1
        axis, delta = "yxyx"[action], self.rules.stride * (1 if action in (0, 3) else -1)
        before = self._aim()
        if self.rules.kind == "interaction":
            delta = self._push(axis, delta)
        half = self.agent.scale / 2
        setattr(self.agent, axis, min(max(getattr(self.agent, axis) + delta, half), 1 - half))
        reward = 0.0
        if self.rules.reward == "dense":
            after = self._aim()
            if self.rules.kind == "interaction":
                reward = 0.01 if after != before else 0.0
            else:
                reward = 0.01 if after < before else -0.01
        touched = self._touched()
        if touched is None:
            return reward, False, False
        if touched == self.target or self.rules.kind == "random":
            return 1.0, True, True
        return (0.1 if self.rules.reward == "normal" else 0.0), False, True

    def where(self) -> int:
        """In which quadrant the target is: 0 below left, 1 below right, 2 above left, 3 above right."""
        target = self.items[self.target]
        return int(target.x > 0.5) + 2 * int(target.y > 0.5)

    def snapshot(self) -> dict[str, Any]:
        """Where this world is, in plain values."""
        return {"items": [astuple(item) for item in self.items], "target": self.target, "taken": self.taken,
                "count": self.count}  # fmt: skip

    def restore(self, values: Mapping[str, Any]) -> None:
        """Bring the world to where :meth:`snapshot` was made."""
        self.items = [Item(*item) for item in values["items"]]
        self.target, self.taken, self.count = values["target"], values["taken"], values["count"]
        self._drawn = None

    def state(self, out: npt.NDArray[np.float32]) -> None:
        """Fill ``out`` (rows, 5): colour, shape and scale as indices into the lists, x, y; zeros after the agent."""
        check_shape(out, self.rules.bounds[0].shape)
        out[:] = 0
        for row, item in zip(out, self.items, strict=False):
            row[:] = COLOURS.index(item.colour), SHAPES.index(item.shape), SCALES.index(item.scale), item.x, item.y

    def image(self, out: npt.NDArray[np.uint8]) -> None:
        """Fill ``out`` (size, size, 3), whatever it holds."""
        check_shape(out, self._canvas.shape)
        sprites = self.sprites()
        if self._drawn is None:
            self._painter.paint(sprites, self._canvas)
        else:
            self._painter.move(self._drawn, sprites, self._canvas)
        self._drawn = sprites
        out[:] = self._canvas

    def masks(self, out: npt.NDArray[np.uint8]) -> None:
        """Fill ``out`` (rows + 1, size, size): where each item would be seen alone, the background in the last one."""
        check_shape(out, (self.rules.rows + 1, *self._canvas.shape[:2]))
        out[:] = 0
        alone = np.empty_like(self._canvas)
        for mask, sprite in zip(out, self.sprites(), strict=False):
            self._painter.paint([sprite], alone)
            mask[:] = alone.any(axis=2)
        out[-1] = ~out[:-1].any(axis=0)

    def segments(self) -> npt.NDArray[np.int64]:
        """Which item is seen at every pixel (size, size): its index in ``items``, -1 the background."""
        return self._painter.cover(self.sprites())

    def sprites(self) -> list[Sprite]:
        items = self.items if self.rules.shown else self.items[:-1]
        return [Sprite(i.x, i.y, i.shape, i.scale, RGB[i.colour]) for i in items]

    def _quadrants(self) -> bool:
        return self.rules.kind == "interaction" and self.rules.mode != "hard"

    def _regions(self) -> Sequence[Region]:
        """Where each object may be; its own size and the gap to the wall are taken off later, but in easy mode."""
        if self.rules.mode == "hard":
            return [(0.0, 1.0, 0.0, 1.0)] * self.count
        if self.rules.mode == "normal":
            return [(0.0, 0.5, 0.5, 1.0), (0.0, 0.5, 0.0, 0.5), (0.5, 1.0, 0.0, 0.5), (0.5, 1.0, 0.5, 1.0)]
        if self._quadrants():
            return [(0.25, 0.25, 0.75, 0.75), (0.25, 0.25, 0.25, 0.25), (0.75, 0.75, 0.25, 0.25)]
        near = 0.05 if self.count == 4 else 0.1
        centres = ((0.25, 0.75), (0.25, 0.25), (0.75, 0.25), (0.75, 0.75))
        return [(x - near, x + near, y - near, y + near) for x, y in centres]

    def _place_objects(self, rng: np.random.Generator) -> bool:
        """Draw a free position for each object in turn; False where one of them has none after many tries.

        An object that is not placed yet counts as being at the origin, as it does in the original, which keeps a
        disc around the corner free.
        """
        rules = self.rules
        things = self.items[: self.count]
        for thing in things:
            thing.x = thing.y = 0.0
        for thing, (x0, x1, y0, y1) in zip(things, self._regions(), strict=False):
            inset = 0.0 if rules.mode == "easy" else thing.scale / 2 + rules.wall
            for _ in range(TRIES):
                x, y = rng.uniform(x0 + inset, x1 - inset), rng.uniform(y0 + inset, y1 - inset)
                if all(
                    other.distance(x, y) >= (0.15 if rules.occlusion else (thing.scale + other.scale) / 2 + rules.gap)
                    for other in self.items
                ):
                    thing.x, thing.y = x, y
                    break
            else:
                return False
        return True

    def _aim(self) -> float:
        """How far the target is from the agent or, in an interaction, from the goal."""
        other = self.items[-2] if self.rules.kind == "interaction" else self.agent
        return self.items[self.target].distance(other.x, other.y)

    def _touched(self) -> int | None:
        """The first object, in order, at the agent or, in an interaction, on the goal."""
        push = self.rules.kind == "interaction"
        reference = self.items[-2] if push else self.agent
        for number, item in enumerate(self.items[: self.count]):
            near = (item.scale + reference.scale) / 2 - TINY if push else self.agent.scale
            if item.distance(reference.x, reference.y) < near:
                return number
        return None

    def _push(self, axis: str, delta: float) -> float:
        """Move what is in the agent's way; how far the agent gets. The first blocked object ends the pushing."""
        start = getattr(self.agent, axis)
        setattr(self.agent, axis, start + delta)
        moves = [delta]
        for number, item in enumerate(self.items[: self.count]):
            half, position = item.scale / 2, getattr(item, axis)
            if item.distance(self.agent.x, self.agent.y) + TINY >= half + self.agent.scale / 2:
                continue
            setattr(item, axis, position + delta)
            if position in (half, 1 - half) or self._overlaps(number):
                setattr(item, axis, position)
                moves.append(0.0)
                break
            setattr(item, axis, min(max(position + delta, half), 1 - half))
            moves.append(getattr(item, axis) - position)
        setattr(self.agent, axis, start)
        return min(moves) if delta > 0 else max(moves)

    def _overlaps(self, number: int) -> bool:
        mine = self.items[number]
        return any(
            item.distance(mine.x, mine.y) + TINY < (item.scale + mine.scale) / 2
            for index, item in enumerate(self.items[: self.count])
            if index != number
        )


def _drawn(rules: Rules, rng: np.random.Generator) -> Item:
    colour, shape, scale = (int(rng.integers(len(pool))) for pool in (rules.colours, rules.shapes, rules.scales))
    return Item(rules.colours[colour], rules.shapes[shape], rules.scales[scale])


def _any(rules: Rules, rng: np.random.Generator, world: World) -> list[Item]:
    return [_drawn(rules, rng) for _ in range(world.count)]


def _one_target(rules: Rules, rng: np.random.Generator, world: World) -> list[Item]:
    """The target at its index, and others, each drawn again while it equals the target in all three properties."""
    things = []
    for index in range(world.count):
        thing = Item(*rules.target)
        while index != world.target and (thing.colour, thing.shape, thing.scale) == rules.target:
            thing = _drawn(rules, rng)
        things.append(thing)
    return things


def _odd_one(rules: Rules, rng: np.random.Generator, world: World) -> list[Item]:
    """One property has a value that only the target has; in the others no value is had by one object alone."""

    def pick(pool: Sequence[Any], where: Callable[[Any], bool] = _fits) -> Any:
        pool = [value for value in pool if where(value)]
        return pool[int(rng.integers(len(pool)))]

    pools: tuple[Sequence[Any], ...] = (rules.colours, rules.shapes, rules.scales)
    odd = pick([n for n, pool in enumerate(pools) if len(pool) > 1])
    paired = odd == 0 and rules.pair is not None
    test = paired and rules.pairing == "test"
    unique = pick(pools[odd], lambda value: not test or value in (rules.pair or ()))

    def common(value: Any) -> bool:
        if value == unique:
            return False
        together = rules.pair is not None and {unique, value} == set(rules.pair)
        return not paired or together == (rules.pairing == "test")

    columns: list[list[Any]] = []
    for n, pool in enumerate(pools):
        if rules.alike and n != odd:
            columns.append([pick(pool)] * world.count)
            continue
        column: list[Any] = [None] * world.count
        if n == odd:
            column[world.target] = unique
        columns.append(_filled(column, partial(pick, pool, common if n == odd else _fits), rng))
    return [Item(*values) for values in zip(*columns, strict=True)]


def _fits(value: Any) -> bool:
    return True


def _filled(column: list[Any], draw: Callable[[], Any], rng: np.random.Generator) -> list[Any]:
    """Fill what is empty by values that two objects or more share: a last single one takes the value before it."""
    while empty := [index for index, value in enumerate(column) if value is None]:
        value = draw()
        share = int(rng.integers(2, len(empty) + 1))
        chosen = rng.permutation(empty)[: len(empty) if share == len(empty) - 1 else share]
        for index in chosen:
            column[index] = value
    return column
