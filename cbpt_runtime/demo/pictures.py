"""Draws the demo's pictures: one motif in front of a random scene, anti-aliased by supersampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from cbpt_runtime.demo.motifs import MOTIFS, Color, Pen, gradient, hsv, shade

SUPERSAMPLING = 4
Scene = Callable[[int, np.random.Generator], Image.Image]

# (sky at the top, sky at the horizon) of a day, a morning, a sunset, a dusk and a night
SKIES: tuple[tuple[Color, Color], ...] = (
    ((92, 170, 232), (205, 232, 246)),
    ((128, 196, 206), (250, 236, 205)),
    ((238, 116, 96), (254, 214, 140)),
    ((86, 74, 148), (238, 150, 150)),
    ((22, 28, 66), (66, 80, 140)),
)
GROUNDS: tuple[Color, ...] = (
    (112, 172, 92),
    (232, 200, 132),
    (64, 132, 178),
    (232, 240, 248),
    (150, 118, 92),
)


def draw_picture(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw one picture of the class `name`, `size` pixels square, in random colour, place, size and scene."""
    canvas = size * SUPERSAMPLING
    scene = landscape if rng.random() < 0.65 else wallpaper
    image = scene(canvas, rng)
    radius = canvas * rng.uniform(0.27, 0.38)
    slack = canvas / 2 - radius
    center = (canvas / 2 + rng.uniform(-0.75, 0.75) * slack, canvas / 2 + rng.uniform(-0.6, 0.6) * slack)
    pen = Pen(
        draw=ImageDraw.Draw(image),
        center=center,
        radius=radius,
        angle=math.radians(rng.normal(0, 7)),
        mirrored=bool(rng.random() < 0.5),
    )
    color = hsv(rng.random(), rng.uniform(0.55, 0.85), rng.uniform(0.7, 0.95))
    MOTIFS[name](pen, color, rng)
    return image.reduce(SUPERSAMPLING)


def draw_set(
    names: tuple[str, ...], per_class: int, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Draw `per_class` pictures of every class, class by class."""
    return np.stack([np.asarray(draw_picture(name, size, rng)) for name in names for _ in range(per_class)])


def landscape(canvas: int, rng: np.random.Generator) -> Image.Image:
    """Sky, a sun or moon, clouds or stars, and one or two rolling grounds."""
    index = int(rng.integers(len(SKIES)))
    night = index == len(SKIES) - 1
    image = gradient(canvas, *SKIES[index])
    draw = ImageDraw.Draw(image)
    if night:
        for x, y in rng.uniform(0, canvas, size=(14, 2)):
            _disk(draw, x, y * 0.7, canvas * 0.007, (236, 236, 210))
    x, y, radius = (
        canvas * rng.uniform(0.1, 0.9),
        canvas * rng.uniform(0.1, 0.35),
        canvas * rng.uniform(0.05, 0.1),
    )
    _disk(draw, x, y, radius, (240, 240, 222) if night else (255, 232, 150))
    if not night:
        for _ in range(int(rng.integers(0, 4))):
            _cloud(
                draw,
                canvas * rng.uniform(0, 1),
                canvas * rng.uniform(0.08, 0.45),
                canvas * rng.uniform(0.03, 0.06),
            )
    ground = GROUNDS[int(rng.integers(len(GROUNDS)))]
    ground = shade(ground, 0.45) if night else ground
    horizon = canvas * rng.uniform(0.6, 0.82)
    for layer in range(int(rng.integers(1, 3))):
        _hill(draw, canvas, horizon + layer * canvas * 0.1, shade(ground, 1.0 - 0.15 * layer), rng)
    return image


def wallpaper(canvas: int, rng: np.random.Generator) -> Image.Image:
    """Return a pastel wall with stripes, dots or nothing on it."""
    hue = rng.random()
    wall = hsv(hue, rng.uniform(0.12, 0.35), rng.uniform(0.85, 1.0))
    image = gradient(canvas, wall, shade(wall, 0.9))
    draw = ImageDraw.Draw(image)
    accent = shade(wall, 0.9) if rng.random() < 0.5 else shade(wall, 1.7)
    step = canvas * rng.uniform(0.1, 0.2)
    kind = int(rng.integers(3))
    count = math.ceil(canvas / step) + 1
    if kind == 0:
        for index in range(count):
            draw.rectangle((index * step, 0, index * step + step / 2, canvas), fill=accent)
    elif kind == 1:
        for row in range(count):
            for column in range(count):
                _disk(draw, (column + 0.5 * (row % 2)) * step, row * step, step * 0.18, accent)
    return image


def write_folders(
    root: Path, names: tuple[str, ...], images: UInt8[np.ndarray, "batch height width 3"], labels: np.ndarray
) -> None:
    """Write PNG files in one folder per class; spaces become underscores."""
    counts = dict.fromkeys(range(len(names)), 0)
    for image, label in zip(images, labels, strict=True):
        folder = root / names[int(label)].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{counts[int(label)]:03d}.png", compress_level=1)
        counts[int(label)] += 1


def contact_sheet(
    images: UInt8[np.ndarray, "batch height width 3"], columns: int, *, gap: int = 2
) -> Image.Image:
    """Lay pictures out in rows on white."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (255, 255, 255))
    for index, image in enumerate(images):
        place = (gap + (index % columns) * (width + gap), gap + (index // columns) * (height + gap))
        sheet.paste(Image.fromarray(image), place)
    return sheet


def _disk(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Color) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    for dx, dy, size in ((-1.3, 0.2, 0.8), (0, 0, 1.1), (1.2, 0.25, 0.75), (0.5, 0.4, 0.8)):
        _disk(draw, x + dx * radius, y + dy * radius, size * radius, (250, 250, 252))


def _hill(
    draw: ImageDraw.ImageDraw, canvas: int, level: float, fill: Color, rng: np.random.Generator
) -> None:
    phase, waves, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.5), canvas * rng.uniform(0.0, 0.06)
    columns = np.linspace(0, canvas, 25)
    ridge = [(x, level + height * math.sin(phase + 2 * math.pi * waves * x / canvas)) for x in columns]
    draw.polygon([*ridge, (canvas, canvas), (0, canvas)], fill=fill)
