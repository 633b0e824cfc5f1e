"""The sixteen things the demo's pictures show, each a few flat shapes in a random colour; and the pen.

Every motif takes a pen (its own coordinates, y down, roughly within [-1, 1], on a supersampled canvas), a
main colour and a numpy generator for small variations.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pen:
    """Draws shapes given in [-1, 1] x [-1, 1] (y points down), moved, turned and scaled onto a canvas.

    Args:
        draw: Pillow's drawing handle of the supersampled canvas.
        center: Where the motif's origin lies, in canvas pixels.
        radius: Canvas pixels of one motif unit.
        angle: Turn in radians, clockwise.
        mirrored: Left and right exchanged.
    """

    draw: ImageDraw.ImageDraw
    center: Point
    radius: float
    angle: float = 0.0
    mirrored: bool = False

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        """Fill a polygon."""
        self.draw.polygon([self._place(point) for point in points], fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Color) -> None:
        """Fill a rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def oval(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: Color,
        *,
        start: float = 0.0,
        stop: float = 360.0,
        turn: float = 0.0,
    ) -> None:
        """Fill an ellipse with half axes `width` and `height`, or its slice from `start` to `stop` degrees.

        Degrees run clockwise from the right; `turn` rotates the ellipse around its centre.
        """
        steps = 28
        cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        points = []
        for index in range(steps + 1):
            phase = math.radians(start + (stop - start) * index / steps)
            across, along = width * math.cos(phase), height * math.sin(phase)
            points.append((x + across * cosine - along * sine, y + across * sine + along * cosine))
        self.polygon(points, fill)

    def disk(self, x: float, y: float, radius: float, fill: Color) -> None:
        """Fill a circle."""
        self.oval(x, y, radius, radius, fill)

    def line(self, points: Sequence[Point], width: float, fill: Color) -> None:
        """Draw a line with round joints; `width` is in motif units."""
        placed = [self._place(point) for point in points]
        self.draw.line(placed, fill=fill, width=max(1, round(width * self.radius)), joint="curve")

    def _place(self, point: Point) -> Point:
        x, y = point
        x = -x if self.mirrored else x
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        return (
            self.center[0] + self.radius * (x * cosine - y * sine),
            self.center[1] + self.radius * (x * sine + y * cosine),
        )


def hsv(hue: float, saturation: float, value: float) -> Color:
    """Return an 8-bit colour; hue, saturation and value in [0, 1] (hue wraps around)."""
    red, green, blue = colorsys.hsv_to_rgb(
        hue % 1.0, min(1.0, max(0.0, saturation)), min(1.0, max(0.0, value))
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def shade(color: Color, factor: float) -> Color:
    """Darken (factor below 1) or lighten towards white (above 1) a colour."""
    if factor <= 1:
        red, green, blue = (round(part * factor) for part in color)
    else:
        red, green, blue = (round(255 - (255 - part) / factor) for part in color)
    return red, green, blue


def gradient(size: int, top: Color, bottom: Color) -> Image.Image:
    """Return a square picture that runs from one colour at the top to another at the bottom."""
    mask = Image.linear_gradient("L").resize((size, size), Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", (size, size), bottom), Image.new("RGB", (size, size), top), mask)


Motif = Callable[[Pen, Color, np.random.Generator], None]

INK: Color = (43, 41, 56)
CREAM: Color = (255, 246, 225)
SNOW: Color = (246, 250, 255)
WOOD: Color = (139, 92, 60)
LEAF: Color = (76, 153, 84)
GOLD: Color = (250, 196, 66)
ORANGE: Color = (242, 140, 56)
RED: Color = (222, 70, 66)


def sailboat(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a hull, a mast and two sails."""
    lean = rng.uniform(-0.06, 0.06)
    pen.line([(0.02, 0.45), (0.02 + lean, -0.95)], 0.07, WOOD)
    pen.polygon([(-0.05, 0.32), (-0.05 + lean, -0.88), (-0.78, 0.32)], CREAM)
    pen.polygon([(0.1, 0.32), (0.1 + lean, -0.72), (0.66, 0.32)], color)
    pen.polygon([(0.02 + lean, -0.95), (0.02 + lean, -0.78), (0.3 + lean, -0.86)], RED)
    pen.polygon([(-0.88, 0.45), (0.85, 0.45), (0.55, 0.85), (-0.6, 0.85)], shade(color, 0.7))
    pen.polygon([(-0.88, 0.45), (0.85, 0.45), (0.78, 0.55), (-0.8, 0.55)], CREAM)


def cactus(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a saguaro in a pot, sometimes in flower."""
    green = (62 + int(rng.integers(0, 40)), 142 + int(rng.integers(0, 30)), 92)
    dark = shade(green, 0.75)
    left, right = rng.uniform(-0.2, 0.1, size=2)
    for side, height in ((-1, left), (1, right)):
        pen.line([(0, height + 0.2), (side * 0.5, height + 0.2), (side * 0.5, height - 0.25)], 0.22, green)
        pen.disk(side * 0.5, height - 0.27, 0.11, green)
        pen.disk(side * 0.5, height + 0.2, 0.11, green)
    pen.box(-0.2, -0.7, 0.2, 0.5, green)
    pen.disk(0, -0.7, 0.2, green)
    for x in (-0.08, 0.08):
        pen.line([(x, -0.75), (x, 0.45)], 0.03, dark)
    pen.disk(0, -0.93, 0.13, (244, 106, 150))
    pen.disk(0, -0.93, 0.05, GOLD)
    pen.polygon([(-0.42, 0.48), (0.42, 0.48), (0.3, 0.95), (-0.3, 0.95)], color)
    pen.box(-0.48, 0.4, 0.48, 0.56, shade(color, 0.8))


def hot_air_balloon(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a striped envelope over a basket."""
    second = CREAM if rng.random() < 0.5 else shade(color, 1.9)
    for x in (-0.22, 0.22):
        pen.line([(x * 1.9, 0.25), (x * 0.7, 0.72)], 0.035, INK)
    pen.disk(0, -0.25, 0.7, color)
    pen.polygon([(-0.6, 0.1), (0.6, 0.1), (0.2, 0.5), (-0.2, 0.5)], color)
    for width, fill in ((0.46, second), (0.2, shade(color, 0.85))):
        pen.oval(0, -0.25, width, 0.7, fill)
        pen.polygon(
            [(-width * 0.87, 0.1), (width * 0.87, 0.1), (width * 0.3, 0.5), (-width * 0.3, 0.5)], fill
        )
    pen.box(-0.17, 0.68, 0.17, 0.95, WOOD)
    pen.box(-0.2, 0.65, 0.2, 0.74, shade(WOOD, 0.7))


def lighthouse(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a banded tower with its lamp lit."""
    bands = int(rng.integers(2, 4))
    pen.polygon([(0.1, -0.72), (1.15, -0.98), (1.15, -0.38)], (255, 240, 170))
    pen.oval(0, 0.93, 0.62, 0.18, (120, 116, 122))
    for index in range(2 * bands):
        low, high = 0.9 - 1.4 * index / (2 * bands), 0.9 - 1.4 * (index + 1) / (2 * bands)
        wide, thin = 0.2 + 0.1 * (low + 0.5), 0.2 + 0.1 * (high + 0.5)
        pen.polygon([(-wide, low), (wide, low), (thin, high), (-thin, high)], SNOW if index % 2 else color)
    pen.box(-0.28, -0.56, 0.28, -0.48, INK)
    pen.box(-0.16, -0.8, 0.16, -0.56, GOLD)
    pen.polygon([(-0.24, -0.78), (0.24, -0.78), (0, -1.02)], shade(color, 0.75))
    pen.oval(0, 0.92, 0.1, 0.22, INK, start=180, stop=360)


def snowman(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Three snowballs, a carrot, a scarf and a hat."""
    for side in (-1, 1):
        reach = rng.uniform(-0.35, 0.0)
        pen.line([(side * 0.25, 0.0), (side * 0.8, reach)], 0.06, WOOD)
    pen.disk(0, 0.55, 0.45, shade(SNOW, 0.93))
    pen.disk(-0.04, 0.52, 0.41, SNOW)
    pen.disk(0, -0.02, 0.33, SNOW)
    pen.disk(0, -0.48, 0.27, SNOW)
    pen.box(-0.27, -0.3, 0.27, -0.17, color)
    pen.box(0.08, -0.25, 0.22, 0.15, color)
    for x in (-0.1, 0.1):
        pen.disk(x, -0.53, 0.045, INK)
    for y in (0.02, 0.42, 0.62):
        pen.disk(-0.04, y, 0.045, INK)
    pen.polygon([(0, -0.49), (0, -0.39), (0.32, -0.41)], ORANGE)
    pen.box(-0.34, -0.74, 0.34, -0.66, INK)
    pen.box(-0.2, -1.0, 0.2, -0.7, INK)
    pen.box(-0.2, -0.8, 0.2, -0.73, color)


def rocket(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a rocket with fins, a window and a flame."""
    flame = rng.uniform(0.85, 1.05)
    pen.polygon([(-0.2, 0.55), (0.2, 0.55), (0, flame)], ORANGE)
    pen.polygon([(-0.11, 0.55), (0.11, 0.55), (0, flame - 0.18)], GOLD)
    for side in (-1, 1):
        pen.polygon([(side * 0.25, 0.15), (side * 0.6, 0.62), (side * 0.22, 0.55)], shade(color, 0.75))
    pen.oval(0, -0.15, 0.32, 0.82, SNOW, start=140, stop=400)
    pen.box(-0.25, 0.1, 0.25, 0.56, SNOW)
    pen.oval(0, -0.15, 0.32, 0.82, color, start=230, stop=310)
    pen.polygon([(0.05, -0.75), (0.25, -0.4), (0.25, 0.56), (0.08, 0.56)], shade(SNOW, 0.88))
    pen.oval(0, -0.15, 0.32, 0.82, color, start=230, stop=310)
    pen.disk(0, -0.2, 0.17, shade(color, 0.75))
    pen.disk(0, -0.2, 0.11, (150, 214, 240))
    pen.box(-0.25, 0.46, 0.25, 0.56, color)


def fish(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a striped fish blowing bubbles."""
    stripe = CREAM if rng.random() < 0.5 else shade(color, 0.65)
    pen.polygon([(-0.45, 0), (-0.95, -0.42), (-0.8, 0), (-0.95, 0.42)], shade(color, 0.8))
    pen.polygon([(-0.3, -0.3), (0.05, -0.7), (0.3, -0.3)], shade(color, 0.8))
    pen.polygon([(-0.1, 0.3), (0.05, 0.62), (0.25, 0.3)], shade(color, 0.8))
    pen.oval(0.1, 0, 0.68, 0.45, color)
    for x in (-0.22, 0.08):
        height = 0.43 * math.sqrt(1 - ((x - 0.1) / 0.68) ** 2)
        pen.oval(x, 0, 0.09, height, stripe)
    pen.disk(0.48, -0.1, 0.13, SNOW)
    pen.disk(0.51, -0.1, 0.07, INK)
    pen.line([(0.6, 0.16), (0.72, 0.12)], 0.05, INK)
    for index in range(int(rng.integers(1, 4))):
        pen.disk(0.9 + 0.06 * index, -0.3 - 0.25 * index, 0.08, (205, 236, 250))


def mushroom(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a spotted cap on a pale stem."""
    pen.polygon([(-0.2, -0.05), (0.2, -0.05), (0.3, 0.8), (-0.3, 0.8)], CREAM)
    pen.oval(0, 0.8, 0.3, 0.1, CREAM)
    pen.oval(0, 0.02, 0.55, 0.12, shade(CREAM, 0.85))
    pen.oval(0, 0, 0.85, 0.85, color, start=180, stop=360)
    pen.oval(0, 0.0, 0.85, 0.12, shade(color, 0.8))
    for x, y, size in ((-0.45, -0.25, 0.13), (0.0, -0.55, 0.16), (0.45, -0.28, 0.12), (0.05, -0.16, 0.09)):
        pen.disk(x + rng.uniform(-0.05, 0.05), y, size, SNOW)
    for x in (-0.6, 0.5):
        pen.polygon([(x - 0.12, 0.9), (x + 0.12, 0.9), (x + rng.uniform(-0.1, 0.1), 0.5)], LEAF)


def umbrella(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw an open umbrella with two-coloured panels and a curved handle."""
    second = CREAM if rng.random() < 0.5 else shade(color, 1.8)
    hook: list[Point] = [
        (0.15 - 0.15 * math.cos(t), 0.75 + 0.18 * math.sin(t)) for t in np.linspace(0, math.pi, 9)
    ]
    pen.line([(0, -0.9), (0, 0.75), *hook], 0.08, WOOD)
    pen.oval(0, 0, 0.92, 0.78, color, start=180, stop=360)
    pen.oval(0, 0, 0.55, 0.78, second, start=180, stop=360)
    pen.oval(0, 0, 0.2, 0.78, color, start=180, stop=360)
    for index in range(4):
        pen.oval(-0.69 + 0.46 * index, 0.02, 0.23, 0.12, shade(color, 0.6), start=180, stop=360)


def sunflower(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a flower on a stem with two leaves; the petals stay in the warm half of the palette."""
    petal = (250, 180 + int(rng.integers(0, 50)), 40 + int(rng.integers(0, 40)))
    pen.line([(0, -0.2), (0.05, 0.95)], 0.1, LEAF)
    pen.oval(-0.25, 0.6, 0.28, 0.11, LEAF, turn=30)
    pen.oval(0.33, 0.45, 0.28, 0.11, shade(LEAF, 0.85), turn=-35)
    count = int(rng.integers(11, 15))
    for index in range(count):
        turn = 360 * index / count
        x, y = 0.45 * math.cos(math.radians(turn)), 0.45 * math.sin(math.radians(turn))
        pen.oval(x, -0.3 + y, 0.26, 0.11, petal if index % 2 else shade(petal, 0.9), turn=turn)
    pen.disk(0, -0.3, 0.32, shade(WOOD, 0.75))
    pen.disk(0, -0.3, 0.22, shade(WOOD, 0.55))
    pen.disk(-0.05, -0.35, 0.07, shade(color, 0.8))


def owl(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw an owl on a branch, all eyes."""
    pen.line([(-0.95, 0.82), (0.95, 0.76)], 0.12, WOOD)
    for side in (-1, 1):
        pen.polygon([(side * 0.15, -0.7), (side * 0.5, -0.95), (side * 0.5, -0.45)], shade(color, 0.75))
    pen.oval(0, 0.05, 0.56, 0.78, color)
    pen.oval(0, 0.3, 0.36, 0.48, shade(color, 1.7))
    for side in (-1, 1):
        pen.oval(side * 0.48, 0.2, 0.15, 0.45, shade(color, 0.7), turn=side * 12)
        pen.disk(side * 0.23, -0.35, 0.23, CREAM)
        pen.disk(side * 0.23 + rng.uniform(-0.04, 0.04), -0.35, 0.12, INK)
        pen.disk(side * 0.23 + 0.03, -0.39, 0.04, SNOW)
        pen.oval(side * 0.2, 0.8, 0.12, 0.07, ORANGE)
    pen.polygon([(-0.09, -0.22), (0.09, -0.22), (0, -0.02)], ORANGE)


def teapot(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a round pot with spout, handle and steam."""
    pen.disk(-0.62, 0.15, 0.33, shade(color, 0.75))
    pen.disk(-0.6, 0.15, 0.19, shade(color, 1.8))
    pen.polygon([(0.35, 0.35), (0.45, 0.0), (0.8, -0.35), (0.98, -0.3), (0.7, 0.35)], shade(color, 0.8))
    pen.oval(0, 0.25, 0.6, 0.53, color)
    pen.oval(-0.15, 0.1, 0.25, 0.2, shade(color, 1.35))
    pen.box(-0.35, 0.72, 0.35, 0.8, shade(color, 0.6))
    pen.oval(0, -0.24, 0.34, 0.14, shade(color, 0.85), start=180, stop=360)
    pen.disk(0, -0.42, 0.09, shade(color, 0.6))
    pen.oval(0.05, 0.33, 0.6, 0.07, CREAM)
    sway = rng.uniform(0.04, 0.12)
    steam = [(0.9 + sway * math.sin(3 * t), -0.45 - 0.45 * t) for t in np.linspace(0, 1, 8)]
    pen.line(steam, 0.06, SNOW)


def butterfly(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Four wings around a slender body."""
    spot = GOLD if rng.random() < 0.5 else SNOW
    for side in (-1, 1):
        pen.oval(side * 0.45, -0.3, 0.48, 0.36, INK, turn=-side * 35)
        pen.oval(side * 0.45, -0.3, 0.42, 0.3, color, turn=-side * 35)
        pen.oval(side * 0.36, 0.4, 0.36, 0.28, INK, turn=side * 40)
        pen.oval(side * 0.36, 0.4, 0.3, 0.22, shade(color, 1.5), turn=side * 40)
        pen.disk(side * 0.55, -0.38, 0.12, spot)
        pen.disk(side * 0.4, 0.44, 0.08, spot)
        pen.line([(0, -0.55), (side * 0.25, -0.9)], 0.04, INK)
        pen.disk(side * 0.25, -0.9, 0.05, INK)
    pen.oval(0, 0.05, 0.09, 0.62, INK)


def ice_cream(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Two or three scoops in a waffle cone."""
    waffle = (226, 168, 94)
    pen.polygon([(-0.36, 0.1), (0.36, 0.1), (0, 1.0)], waffle)
    for x in (-0.2, 0.0, 0.2):
        pen.line([(x - 0.14, 0.12), (x * 0.3 + 0.1, 0.72 - abs(x))], 0.03, shade(waffle, 0.75))
        pen.line([(x + 0.14, 0.12), (x * 0.3 - 0.1, 0.72 - abs(x))], 0.03, shade(waffle, 0.75))
    pen.disk(-0.22, -0.08, 0.3, color)
    pen.disk(0.22, -0.08, 0.3, CREAM)
    pen.disk(0, -0.48, 0.32, shade(color, 1.6) if rng.random() < 0.5 else shade(WOOD, 0.8))
    pen.oval(-0.1, -0.58, 0.1, 0.06, SNOW, turn=-30)
    pen.disk(0.04, -0.84, 0.11, RED)
    pen.line([(0.04, -0.92), (0.16, -1.05)], 0.035, LEAF)


def house(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Draw a cottage with a chimney and lit windows."""
    lit = (255, 224, 130) if rng.random() < 0.6 else (170, 214, 236)
    pen.box(0.3, -0.85, 0.52, -0.3, shade(WOOD, 0.8))
    pen.disk(0.48, -1.0, 0.1, SNOW)
    pen.box(-0.65, -0.1, 0.65, 0.85, CREAM)
    pen.box(0.25, -0.1, 0.65, 0.85, shade(CREAM, 0.9))
    pen.polygon([(-0.88, -0.05), (0.88, -0.05), (0.0, -0.85)], color)
    pen.polygon([(0.0, -0.85), (0.88, -0.05), (0.45, -0.05)], shade(color, 0.8))
    pen.box(-0.14, 0.3, 0.16, 0.85, shade(color, 0.6))
    pen.disk(0.1, 0.6, 0.04, GOLD)
    for x in (-0.42, 0.42):
        pen.box(x - 0.15, 0.12, x + 0.15, 0.45, lit)
        pen.line([(x, 0.12), (x, 0.45)], 0.04, WOOD)
        pen.line([(x - 0.15, 0.28), (x + 0.15, 0.28)], 0.04, WOOD)


def bicycle(pen: Pen, color: Color, rng: np.random.Generator) -> None:
    """Two wheels, a frame, a saddle and a handlebar."""
    for x in (-0.55, 0.55):
        rim = [(x + 0.36 * math.cos(t), 0.4 + 0.36 * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 29)]
        for turn in np.linspace(0, math.pi, 4)[:-1] + rng.uniform(0, 1):
            dx, dy = 0.34 * math.cos(turn), 0.34 * math.sin(turn)
            pen.line([(x - dx, 0.4 - dy), (x + dx, 0.4 + dy)], 0.03, (170, 172, 182))
        pen.line(rim, 0.1, INK)
    frame = [(-0.55, 0.4), (-0.2, -0.2), (0.35, -0.2), (-0.02, 0.42), (-0.55, 0.4)]
    pen.line(frame, 0.1, color)
    pen.line([(-0.02, 0.42), (-0.26, -0.4)], 0.1, color)
    pen.line([(0.55, 0.4), (0.3, -0.5)], 0.1, color)
    pen.line([(0.3, -0.5), (0.58, -0.55)], 0.08, INK)
    pen.oval(-0.28, -0.43, 0.2, 0.07, INK)
    pen.disk(-0.02, 0.42, 0.09, shade(color, 0.6))


MOTIFS: dict[str, Motif] = {
    "bicycle": bicycle,
    "butterfly": butterfly,
    "cactus": cactus,
    "fish": fish,
    "hot air balloon": hot_air_balloon,
    "house": house,
    "ice cream": ice_cream,
    "lighthouse": lighthouse,
    "mushroom": mushroom,
    "owl": owl,
    "rocket": rocket,
    "sailboat": sailboat,
    "snowman": snowman,
    "sunflower": sunflower,
    "teapot": teapot,
    "umbrella": umbrella,
}
