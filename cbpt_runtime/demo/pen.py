"""A pen that draws flat shapes in a motif's own coordinates on a supersampled canvas."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

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
