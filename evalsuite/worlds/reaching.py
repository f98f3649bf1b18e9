"""A robot's finger among cubes, in three dimensions: the object-reaching task of the benchmark, on MuJoCo.

Yoon et al., ICML 2023 (arXiv 2302.04419); jsikyoon/OCRL, envs/cw_envs/target.py at commit 01d0bd56, which acts in
CausalWorld (Ahmed et al. 2021; rr-learning/CausalWorld at 10452771) on Bullet. CausalWorld does not install on current
Pythons, so this is a port. From there are: the finger's links, masses, joint limits, torques and gains; 25 actions a
second, each a target for the three joints that is held for ten steps of the simulation; where cubes are, and that they
are pictures only, through which the finger goes; when one is touched; the limit of steps; colours, table, wall, and
the camera, whose 4 : 3 picture is pressed into a square.

What departs: solver and contacts are MuJoCo's, without the damping of 0.5 that Bullet gives the links as bodies; the
links are capsules, not meshes, and meet the table and the wall alone. Light and shading are ours, and there are no
shadows. Cubes are opaque; the original asks for 30 % opacity. The reward is 1, which CausalWorld multiplies by the 0.04
s of a step. The two other fingers are scenery in the pose that theirs hold. The state leaves out what never changes,
and puts the finger last.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb

from evalsuite.errors import ResourceError, UsageError
from evalsuite.worlds.objects import TRIES, check_shape, vary

__all__ = ["COLOURS", "VARIANTS", "ReachingRules", "ReachingWorld", "reaching_rules"]

Array = npt.NDArray[Any]
COLOURS = ("blue", "green", "yellow", "red", "orange", "purple", "brown", "pink", "gray", "olive", "cyan")
EDGE = 0.055  # of a cube, in metres, like all lengths here
HEIGHT = 0.0325  # of the cubes' centres
APART = 0.065  # two cubes are nowhere nearer along both axes
ARC = (-3.14, 0.785)  # where cubes are, in radians, seen from the middle
RADIUS = 0.15
EASY = ((0.14, -1.0), (0.15, -2.34), (0.15, 0.01), (0.03, -3.14))  # radius and angle of the cubes there
TOUCH = 0.021  # the mean of the absolute differences in x, y and z
RAISED = (-1.56, -0.08, -2.7)
LOWEST, HIGHEST = np.array([-1.57, -1.2, -3.0]), np.array([1.0, 1.57, 3.0])  # the targets that actions -1 and 1 set
STEP, SKIP = 0.004, 10  # seconds of one step of the simulation; such steps an action
GAINS, DAMPING, SAFETY, TORQUE = np.full(3, 10.0), np.array([0.1, 0.3, 0.001]), np.array([0.08, 0.08, 0.04]), 0.36
FASTEST = 50.0  # radians a second that the state can tell


@dataclass(frozen=True, kw_only=True)
class ReachingRules:
    """One environment. ``kind``: in ``"goal"`` the target is blue and no other cube is, in ``"comparison"`` its colour
    is drawn and all others have another one, in ``"random"`` all colours are drawn. ``mode``: ``"hard"`` puts cubes
    anywhere in reach, ``"easy"`` at four positions. An episode ends after ``steps`` actions.
    """

    kind: Literal["goal", "comparison", "random"] = "goal"
    colours: tuple[str, ...] = COLOURS[:4]
    objects: int = 4
    mode: Literal["easy", "hard"] = "hard"
    target: str = "blue"
    steps: int = 126  # the original counts five seconds, and one step more

    @property
    def rows(self) -> int:
        """Cubes and the finger."""
        return self.objects + 1

    @property
    def bounds(self) -> tuple[Array, Array]:
        """The lowest and the highest state, (rows, 17) each."""
        high = np.ones((self.rows, 17), dtype=np.float32)
        return -high, high

    @property
    def rate(self) -> int:
        """Actions a second."""
        return round(1 / (STEP * SKIP))


_GOAL = ReachingRules()
_PALETTES = (("green", "yellow", "pink"), ("green", "brown", "pink"), ("cyan", "brown", "pink"))
VARIANTS: Mapping[str, ReachingRules] = {
    "default": _GOAL,
    "easy": replace(_GOAL, mode="easy"),
    "odd": replace(_GOAL, kind="comparison", colours=COLOURS[:3]),
    "pretraining": replace(_GOAL, kind="random", colours=COLOURS),
    **{f"agent-color{n}": replace(_GOAL, colours=("blue", *palette)) for n, palette in enumerate(_PALETTES, 1)},
    **{f"objects-{count}": replace(_GOAL, objects=count) for count in range(1, 7)},
}


def reaching_rules(variant: str = "default", **changes: Any) -> ReachingRules:
    """The rules of a variant, with fields of :class:`ReachingRules` changed.

    The original has ``default``, ``easy``, ``odd`` and ``pretraining``. The colours of ``agent-color1`` and so on,
    which its encoders have seen and its agents not, and other numbers of cubes are ours.

    Raises :class:`UsageError` for a variant or a field that does not exist, and for rules that contradict each other.
    """
    rules = vary("object-reaching", VARIANTS, variant, changes)
    colours = {*rules.colours, rules.target} if rules.kind == "goal" else set(rules.colours)
    faults = {
        f"mode easy has four places, not {rules.objects}": rules.mode == "easy" and rules.objects > len(EASY),
        f"there are {rules.objects} cubes, not 1 to 6": not 1 <= rules.objects <= 6,
        f"unknown colours in {rules.colours}": not colours <= set(COLOURS),
        "no second colour is left": rules.kind != "random" and len(colours) < 2,
        "of fewer than 3 cubes none is the odd one": rules.kind == "comparison" and rules.objects < 3,
    }
    for fault, present in faults.items():
        if present:
            raise UsageError("these rules make no world", cause=fault, fix="change objects, mode or colours")
    return rules


class ReachingWorld:
    """One episode after the other. ``target`` is the cube to touch; ``cubes`` are (N, 3) centres, ``colours`` their
    names. It has the methods of :class:`evalsuite.worlds.World`; an action is three numbers from -1 to 1.

    Raises :class:`ResourceError` without MuJoCo, and where a picture is requested that cannot be rendered here.
    """

    def __init__(self, rules: ReachingRules, size: int = 64) -> None:
        self.rules, self.size = rules, size
        self.target = self.taken = 0
        self.colours: list[str] = ["blue"] * rules.objects
        self._mujoco = _library()
        self._model = _model(rules.objects)
        self._data = self._mujoco.MjData(self._model)

    @property
    def cubes(self) -> Array:
        return np.asarray(self._data.mocap_pos).copy()

    @property
    def tip(self) -> Array:
        """Where the end of the finger is, (3,)."""
        return np.asarray(self._data.site("tip").xpos).copy()

    @property
    def joints(self) -> Array:
        """The angles of the three joints, in radians."""
        return np.asarray(self._data.qpos).copy()

    def reset(self, rng: np.random.Generator) -> None:
        """Raise the finger; draw the target, the colours, and where the cubes are."""
        rules, self.taken = self.rules, 0
        self._mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:] = RAISED
        self.target = int(rng.integers(rules.objects))
        self.colours = _coloured(rules, self.target, rng)
        positions = EASY[: rules.objects] if rules.mode == "easy" else None
        while positions is None:
            positions = _placed(rules.objects, rng)
        for centre, (radius, angle) in zip(self._data.mocap_pos, positions, strict=True):
            centre[:] = radius * np.cos(angle), radius * np.sin(angle), HEIGHT
        self._settle()

    def act(self, action: Array) -> tuple[float, bool, bool]:
        """Hold three joint targets for 0.04 s; the reward, whether the target was reached, the end by touch.

        Torques are those of a proportional controller with damping, bounded by 0.36 Nm. Touching the target counts
        even where another cube is touched with it. Raises :class:`ValueError` for another action.
        """
        targets = np.asarray(action, dtype=np.float64)
        if targets.shape != (3,) or not (np.abs(targets) <= 1).all():
            raise ValueError(f"an action is three numbers from -1 to 1, not {action!r}")
        self.taken += 1
        data, goal = self._data, LOWEST + (targets + 1) / 2 * (HIGHEST - LOWEST)
        for _ in range(SKIP):
            torque = (GAINS * (goal - data.qpos) - DAMPING * data.qvel).clip(-TORQUE, TORQUE)
            data.ctrl[:] = (torque - SAFETY * data.qvel).clip(-TORQUE, TORQUE)
            self._mujoco.mj_step(self._model, data)
        self._settle()
        near = np.abs(data.mocap_pos - self.tip).mean(axis=1) < TOUCH
        success = bool(near[self.target]) or (self.rules.kind == "random" and bool(near.any()))
        return float(success), success, bool(near.any())

    def where(self) -> int:
        """In which quarter of the arc the target is, 0 to 3."""
        x, y, _ = self._data.mocap_pos[self.target]
        share = (np.arctan2(y, x) - ARC[0]) / (ARC[1] - ARC[0])
        return int(np.clip(4 * share, 0, 3))

    def snapshot(self) -> dict[str, Any]:
        """Where this world is, in plain values."""
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(self._mujoco.mj_stateSize(self._model, kind))
        self._mujoco.mj_getState(self._model, self._data, state, kind)
        return {"state": state.tolist(), "colours": list(self.colours), "target": self.target, "taken": self.taken}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Bring the world to where :meth:`snapshot` was made."""
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        self._mujoco.mj_setState(self._model, self._data, np.array(values["state"]), kind)
        self._settle()
        self.colours, self.target, self.taken = list(values["colours"]), values["target"], values["taken"]

    def state(self, out: npt.NDArray[np.float32]) -> None:
        """Fill ``out`` (rows, 17) with numbers from -1 to 1: a row a cube, the finger last.

        Of the finger 0 is the time left, 1-3 the angles of the joints, 4-6 their speeds, 7-9 where its tip is; of a
        cube 10-12 are where it is and 13-15 its colour (red, green, blue). 16 is 1 for a cube. The rest is 0.
        """
        data = self._data
        check_shape(out, (self.rules.rows, 17))
        out[:] = 0
        for row, centre, colour in zip(out, data.mocap_pos, self.colours, strict=False):
            row[10:13], row[13:16], row[16] = _unit(centre), 2 * np.array(to_rgb(colour)) - 1, 1
        out[-1, 0] = 1 - 2 * min(self.taken / self.rules.steps, 1)
        out[-1, 1:4] = 2 * (data.qpos - LOWEST) / (HIGHEST - LOWEST) - 1
        out[-1, 4:7] = data.qvel / FASTEST
        out[-1, 7:10] = _unit(self.tip)
        np.clip(out, -1, 1, out=out)

    def image(self, out: npt.NDArray[np.uint8]) -> None:
        """Fill ``out`` (size, size, 3), whatever it holds."""
        check_shape(out, (self.size, self.size, 3))
        self._painter().paint(self._data, self.colours, out)

    def masks(self, out: npt.NDArray[np.uint8]) -> None:
        """Fill ``out`` (rows + 1, size, size): where each item would be seen alone, the ground last."""
        check_shape(out, (self.rules.rows + 1, self.size, self.size))
        painter = self._painter()
        for item, mask in enumerate(out[:-1]):
            mask[:] = painter.segments(self._data, item) == item
        out[-1] = ~out[:-1].any(axis=0)

    def segments(self) -> npt.NDArray[np.int64]:
        """Which item is seen at every pixel (size, size): a cube's index, the finger after them, -1 the background."""
        return self._painter().segments(self._data)

    def _settle(self) -> None:
        """Put bodies and camera where the joints now say; a step leaves them where they were before it."""
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_camlight(self._model, self._data)

    def _painter(self) -> _Painter:
        return _painter(self.rules.objects, self.size, os.getpid())  # a context does not outlive a fork


def _unit(position: Array) -> Array:
    """A position in the state's units: x and y from -0.5 to 0.5 m, z from 0 to 0.5 m, each as -1 to 1."""
    return np.asarray((position - (0, 0, 0.25)) / (0.5, 0.5, 0.25))


def _coloured(rules: ReachingRules, target: int, rng: np.random.Generator) -> list[str]:
    def pick(pool: tuple[str, ...]) -> str:
        return pool[int(rng.integers(len(pool)))]

    if rules.kind == "random":
        return [pick(rules.colours) for _ in range(rules.objects)]
    own = rules.target if rules.kind == "goal" else pick(rules.colours)
    rest = tuple(colour for colour in rules.colours if colour != own)
    common = pick(rest)
    return [
        own if index == target else common if rules.kind == "comparison" else pick(rest)
        for index in range(rules.objects)
    ]


def _placed(count: int, rng: np.random.Generator) -> tuple[tuple[float, float], ...] | None:
    """Radius and angle of ``count`` cubes, uniform over the sector; None where one has no room in ``TRIES`` tries."""
    centres: list[Array] = []
    positions = []
    for _ in range(count):
        for _ in range(TRIES):
            angle, radius = float(rng.uniform(*ARC)), float(np.sqrt(rng.uniform(0, RADIUS**2)))
            centre = radius * np.array([np.cos(angle), np.sin(angle)])
            if all((np.abs(centre - other) > APART).any() for other in centres):
                centres.append(centre)
                positions.append((radius, angle))
                break
        else:
            return None
    return tuple(positions)


# --- the simulation ---------------------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise ResourceError(
            "object-reaching needs mujoco, which is not installed",
            cause="it comes with the extra 'robotics'",
            fix="pip install 'evalsuite[rl,robotics]'",
        ) from error
    return mujoco


@cache
def _model(objects: int) -> Any:
    """Worlds of as many cubes share a model; where things are is in each world's own data."""
    return _library().MjModel.from_xml_string(_scene(objects))


def _scene(objects: int) -> str:
    """The world in MuJoCo's language. Heights are over CausalWorld's floor, a millimetre over its table."""
    fingers = "".join(
        _finger(name, position, turn, rgb)
        for name, position, turn, rgb in (
            ("left", "-0.0455 0 0", 0.0, "0.6 0 0"),
            ("middle", "0.02275 0.0394041558722 0", -120.0, "0 0.6 0"),
            ("right", "0.02275 -0.0394041558722 0", -240.0, "0 0 0.6"),
        )
    )
    cubes = "".join(
        f'<body name="cube{n}" mocap="true" pos="0 0 {HEIGHT}"><geom name="cube{n}" type="box" '
        f'size="{EDGE / 2} {EDGE / 2} {EDGE / 2}" contype="0" conaffinity="0"/></body>'
        for n in range(objects)
    )
    high = 2 * 0.01 * np.tan(np.pi / 6)  # of the sensor: 60 degrees from top to bottom
    return f"""<mujoco>
      <compiler angle="degree" autolimits="true"/>
      <option timestep="{STEP}" gravity="0 0 -9.81"/>
      <statistic center="0 0 0" extent="0.6"/>
      <visual>
        <headlight ambient="0.45 0.45 0.45" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
        <quality shadowsize="0" offsamples="4" numslices="16" numstacks="8" numquads="1"/>
      </visual>
      <worldbody>
        <light directional="true" dir="-0.4 0.4 -1" diffuse="0.4 0.4 0.4" specular="0 0 0" castshadow="false"/>
        <camera name="above" pos="0 -0.3 {0.6 * np.sin(np.pi / 3) - 0.011}" xyaxes="1 0 0 0 0.8660254 0.5"
          focal="0.01 0.01" sensorsize="{4 / 3 * high} {high}" resolution="4 3"/>
        <geom name="table" type="plane" pos="0 0 -0.001" size="0.355 0.38 0.01" rgba="0.31 0.27 0.25 1" contype="0"/>
        {_wall()}
        <body pos="0 0 0.329" euler="0 0 -90">{fingers}</body>
        {cubes}
      </worldbody>
      <actuator><motor joint="upper"/><motor joint="middle"/><motor joint="lower"/></actuator>
    </mujoco>"""


def _wall(parts: int = 24) -> str:
    """A ring of plates, 0.242 m from the middle and 0.25 m high. What stops the finger is thicker than what is seen."""
    across, plates = 0.242 * np.tan(np.pi / parts), []
    for part in range(parts):
        turn = 360 * part / parts
        for half, looks in (
            (0.0015, 'rgba="0.95 0.95 0.95 1" contype="0" conaffinity="0"'),
            (0.02, 'group="3" contype="0"'),
        ):
            x, y = (0.242 + half) * np.cos(np.radians(turn)), (0.242 + half) * np.sin(np.radians(turn))
            plates.append(
                f'<geom type="box" size="{half} {across} 0.125" pos="{x} {y} 0.124" euler="0 0 {turn}" {looks}/>'
            )
    return "".join(plates)


def _finger(name: str, position: str, turn: float, rgb: str) -> str:
    """The finger in the middle moves; the others are held where the original's raised ones are held.

    Links, masses and inertias are of trifinger_edu.urdf; the inertia of the lower link about itself, 0 there, must not
    be 0 here.
    """
    moves = name == "middle"
    held = (-1.57, -1.2 + (RAISED[1] + 1) / 2 * 2.77, -3.0)  # their raised pose, taken for an action and bounded

    def link(joint: str, axis: str, limit: float, pos: str, angle: float, inside: str) -> str:
        turned = "" if moves else f'axisangle="{axis} {np.degrees(angle)}"'
        hinge = f'<joint name="{joint}" type="hinge" axis="{axis}" range="{-limit} {limit}"/>' if moves else ""
        return f'<body pos="{pos}" {turned}>{hinge}{inside}</body>'

    def rod(start: str, end: str, size: float) -> str:
        touch = 'conaffinity="0"' if moves else 'contype="0" conaffinity="0"'
        group = f'name="{name}-{size}"'
        return f'<geom {group} type="capsule" fromto="{start} {end}" size="{size}" rgba="{rgb} 1" {touch}/>'

    tip = (
        '<body pos="0 -0.008 -0.16"><inertial pos="0 0 0" mass="0.01" diaginertia="1.67e-7 1.67e-7 1.67e-7"/>{}</body>'
    )
    lower = (
        '<inertial pos="0 -0.009 -0.089" mass="0.0307" diaginertia="0.00012 0.00012 0.0000005"/>'
        + rod("0 -0.008 0", "0 -0.008 -0.16", 0.0095)
        + tip.format('<site name="tip"/>' if moves else "")
    )
    middle = (
        '<inertial pos="0 -0.019 -0.079" mass="0.14854" fullinertia="0.00041 0.00041 0.00003 0 0 0.00005"/>'
        + rod("0 -0.018 0", "0 -0.018 -0.16", 0.018)
        + link("lower", "0 1 0", 180, "0 -0.03745 -0.16", held[2], lower)
    )
    upper = (
        '<inertial pos="-0.079 0 0" mass="0.14854" fullinertia="0.00003 0.00041 0.00041 0.00005 0 0"/>'
        + rod("0 0 0", "-0.157 0 0", 0.0225)
        + link("middle", "0 1 0", 90, "0 -0.014 0", held[1], middle)
    )
    inside = link("upper", "-1 0 0", 90, "0 0 0", held[0], upper)
    return f'<body name="{name}" pos="{position}" euler="0 0 {turn}">{inside}</body>'


# --- pictures ---------------------------------------------------------------------------------------------------


class _Painter:
    """Draws worlds of as many cubes, off the screen."""

    def __init__(self, objects: int, size: int) -> None:
        self._mujoco = mujoco = _library()
        self._model, self._size, self._objects = _model(objects), size, objects
        self._model.vis.global_.offwidth = self._model.vis.global_.offheight = size
        self._gl, self._context = _contexts(self._model, size)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(self._model, maxgeom=self._model.ngeom + 1)
        self._options = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self._model.camera("above").id
        self._whole = mujoco.MjrRect(0, 0, size, size)
        self._colours = self._model.geom_rgba.copy()
        self._items = np.full(self._model.ngeom, -1)  # of each geom, the item it belongs to
        for geom in range(self._model.ngeom):
            name = self._model.geom(geom).name
            if name.startswith("cube"):
                self._items[geom] = int(name[4:])
            elif name.startswith("middle"):
                self._items[geom] = objects
        atexit.register(self.close)

    def paint(self, data: Any, colours: list[str], out: npt.NDArray[np.uint8]) -> None:
        rgba = self._model.geom_rgba
        rgba[:] = self._colours
        for geom in np.flatnonzero((self._items >= 0) & (self._items < self._objects)):
            rgba[geom, :3] = to_rgb(colours[self._items[geom]])
        self._render(data, out)

    def segments(self, data: Any, alone: int | None = None) -> npt.NDArray[np.int64]:
        """The item at every pixel, -1 where there is none; ``alone``: as if there were no other."""
        rgba = self._model.geom_rgba
        rgba[:] = self._colours
        if alone is not None:
            rgba[self._items != alone, 3] = 0
        flags, kinds = self._scene.flags, self._mujoco.mjtRndFlag
        flags[kinds.mjRND_SEGMENT] = flags[kinds.mjRND_IDCOLOR] = 1
        pixels = np.empty((self._size, self._size, 3), dtype=np.uint8)
        self._render(data, pixels)
        flags[kinds.mjRND_SEGMENT] = flags[kinds.mjRND_IDCOLOR] = 0
        known = np.full(self._scene.ngeom + 1, -1)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.segid >= 0 and geom.objtype == self._mujoco.mjtObj.mjOBJ_GEOM:
                known[geom.segid + 1] = self._items[geom.objid]
        drawn = pixels.astype(np.int64) @ np.array([1, 256, 65536])
        return np.asarray(known[drawn], dtype=np.int64)

    def close(self) -> None:
        """Give the context back; at the end of the program it would be too late."""
        self._context.free()
        del self._gl  # which frees itself

    def _render(self, data: Any, out: npt.NDArray[np.uint8]) -> None:
        mujoco = self._mujoco
        self._gl.make_current()
        every = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._camera, every, self._scene)
        mujoco.mjr_render(self._whole, self._scene, self._context)
        pixels = np.empty((self._size, self._size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._whole, self._context)
        out[:] = pixels[::-1]


@cache
def _painter(objects: int, size: int, process: int) -> _Painter:
    return _Painter(objects, size)


def _contexts(model: Any, size: int) -> tuple[Any, Any]:
    """OpenGL's context and MuJoCo's. ``MUJOCO_GL`` says by which way: ``egl`` with a GPU, ``osmesa`` without one.

    Where it says nothing and there is no screen, EGL is taken if there is a device for it, and OSMesa if not. Raises
    :class:`ResourceError` where that way is not open.
    """
    backend = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not backend and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        devices = [*Path("/dev/dri").glob("renderD*"), *Path("/dev").glob("nvidia[0-9]*")]
        backend = "egl" if devices else "osmesa"
    try:
        module = importlib.import_module(f"mujoco.{backend}" if backend in ("egl", "osmesa") else "mujoco")
        context = module.GLContext(size, size)
        context.make_current()
        return context, _library().MjrContext(model, _library().mjtFontScale.mjFONTSCALE_100)
    except Exception as error:  # a missing system library shows as any kind of error
        raise ResourceError(
            "no picture of object-reaching can be made here",
            cause=f"OpenGL by {backend or 'a window'} is not there ({type(error).__name__}: {error})",
            fix="apt-get install libosmesa6 and set MUJOCO_GL=osmesa, or MUJOCO_GL=egl with a GPU's driver",
        ) from error
