"""What the demo checkpoint learns: plain shapes that move over plain backgrounds, and prompts that describe them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE, FRAMES, FPS = 64, 17, 8
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (35, 165, 60),
    "blue": (35, 65, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 45, 170),
    "orange": (245, 130, 25),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
SHAPES = ("ball", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "bouncing")
MANDARIN = {
    **dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "白色", "黑色"), strict=True)),
    **dict(zip(SHAPES, ("球", "正方形", "三角形"), strict=True)),
}
ENGLISH_MOTIONS = {
    "left": ("moving left", "moving to the left", "going left"),
    "right": ("moving right", "moving to the right", "going right"),
    "up": ("moving up", "rising", "going up"),
    "down": ("moving down", "falling", "going down"),
    "bouncing": ("bouncing", "bouncing up and down", "jumping"),
}
MANDARIN_MOTIONS = {
    "left": ("向左移动", "往左走", "向左运动"),
    "right": ("向右移动", "往右走", "向右运动"),
    "up": ("向上移动", "上升", "往上走"),
    "down": ("向下移动", "下落", "往下走"),
    "bouncing": ("弹跳", "上下弹跳", "跳动"),
}
ENGLISH = (
    "a {colour} {shape} {motion} on a {background} background",
    "{colour} {shape} {motion}, {background} background",
    "on a {background} background, a {colour} {shape} is {motion}",
    "a video of a {colour} {shape} {motion} on a {background} background",
    "a {background} background with a {colour} {shape} {motion}",
)
CHINESE = (
    "一个{colour}的{shape}在{background}背景上{motion}",
    "{colour}{shape}{motion},{background}背景",
    "{background}背景上有一个{colour}的{shape}在{motion}",
    "一段视频:一个{colour}的{shape}在{background}背景上{motion}",
    "在{background}的背景上,一个{colour}{shape}正在{motion}",
)


@dataclass(frozen=True)
class Scene:
    """What a clip shows: names out of COLOURS, SHAPES, MOTIONS and COLOURS."""

    colour: str
    shape: str
    motion: str
    background: str


def held_out() -> set[tuple[str, str, str]]:
    """The (colour, shape, motion) combinations kept out of training: 24 of 120, each pair of values still seen."""
    kept = set()
    for (c, colour), (s, shape), (m, motion) in itertools.product(
        enumerate(COLOURS), enumerate(SHAPES), enumerate(MOTIONS)
    ):
        if (c + 2 * s + 3 * m) % 5 == 0:
            kept.add((colour, shape, motion))
    return kept


def scenes(*, held: bool) -> list[Scene]:
    """All scenes of the training set, or all that were held out; an object never has its background's colour."""
    out = held_out()
    return [
        Scene(colour, shape, motion, background)
        for colour, shape, motion in itertools.product(COLOURS, SHAPES, MOTIONS)
        if ((colour, shape, motion) in out) == held
        for background in COLOURS
        if background != colour
    ]


def prompts(scene: Scene, language: str) -> list[str]:
    """Every phrasing of a scene in a language, `en` or `zh`."""
    if language == "en":
        words, motions, templates = {}, ENGLISH_MOTIONS, ENGLISH
    else:
        words, motions, templates = MANDARIN, MANDARIN_MOTIONS, CHINESE
    return [
        template.format(
            colour=words.get(scene.colour, scene.colour),
            shape=words.get(scene.shape, scene.shape),
            background=words.get(scene.background, scene.background),
            motion=motion,
        )
        for template in templates
        for motion in motions[scene.motion]
    ]


def draw(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws one clip of a scene, its size, place and speed random.

    Args:
        scene: what to show.
        rng: source of the random values.

    Returns:
        Frames (17, 64, 64, 3).
    """
    radius = rng.uniform(10.0, 13.0)
    x, y = _track(scene.motion, radius, rng)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    dx, dy = columns[None] - x[:, None, None], rows[None] - y[:, None, None]
    cover = np.clip(0.5 - _distance(scene.shape, dx, dy, radius), 0.0, 1.0)[..., None]
    near, far = (np.array(COLOURS[name], np.float64) for name in (scene.colour, scene.background))
    return np.rint(cover * near + (1.0 - cover) * far).astype(np.uint8)


def _track(motion: str, radius: float, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre of the object in each frame, in pixels."""
    time = np.linspace(0.0, 1.0, FRAMES)
    low, high = radius + 1.0, SIZE - radius - 1.0
    aside = np.full(FRAMES, rng.uniform(24.0, 40.0))
    if motion == "bouncing":
        floor = high - rng.uniform(0.0, 3.0)
        height = rng.uniform(0.75, 1.0) * (floor - low)
        return aside, floor - height * np.abs(np.cos(2.0 * np.pi * time + rng.uniform(-0.2, 0.2)))
    start, end = low + rng.uniform(0.0, 6.0), high - rng.uniform(0.0, 6.0)
    along = start + (end - start) * time
    if motion in ("left", "up"):
        along = along[::-1]
    return (along, aside) if motion in ("left", "right") else (aside, along)


def _distance(shape: str, dx: NDArray[np.float64], dy: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Signed distance to the outline in pixels, negative inside."""
    distance: NDArray[np.float64]
    if shape == "ball":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    else:
        side = np.abs(dx) * np.sqrt(0.8) - (dy + 1.1 * radius) * np.sqrt(0.2)
        distance = np.maximum(side, dy - 0.9 * radius)
    return distance
