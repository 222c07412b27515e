"""CarRacing with the same frames as Gymnasium's, pixel for pixel, in a fraction of the time.

Gymnasium draws 1000 x 800 pixels, flips them and shrinks them to 96 x 96. It spends its time on 700
polygons, transformed vertex by vertex in Python though only about 40 are visible; on the polygon of
the playfield, 10,000 pixels wide; and on opening a font for every frame. Here all vertices are
transformed at once in the same float64 arithmetic, only visible polygons are drawn, the playfield
is a fill, the font stays open, and the image is flipped after it is narrowed. The remaining draw
calls are the same, in the same order, on a surface of the same size: SDL_gfx clips a line before
computing its slope, so a smaller surface would move pixels.
"""

from __future__ import annotations

import numpy as np
import pygame
from gymnasium.envs.box2d.car_racing import (
    GRASS_DIM,
    MAX_SHAPE_DIM,
    PLAYFIELD,
    SCALE,
    STATE_H,
    STATE_W,
    WINDOW_H,
    WINDOW_W,
    ZOOM,
    Car,
    CarRacing,
)
from pygame import gfxdraw

_BAR = WINDOW_H // 8  # height of the indicator bar, in window pixels
_ROAD = WINDOW_H - _BAR  # rows above it
_MARGIN = 8  # pixels around the window in which a polygon counts as visible
# From the car to the farthest corner of the window (the image is still upside down here).
_REACH = np.hypot(WINDOW_W / 2, WINDOW_H * 3 / 4)


class FastCarRacing(CarRacing):
    """Gymnasium's CarRacing with faster observations; all else, videos included, is inherited.

    Attributes:
        skip_frames: while true, ``reset`` and ``step`` draw nothing and return a black frame.
            Physics, rewards and later frames do not change; `frame` still draws.
    """

    skip_frames: bool = False
    car: Car  # made by reset, before anything is drawn
    surf: pygame.Surface  # type: ignore[assignment]  # Gymnasium initialises it to None
    _canvas: pygame.Surface  # surfaces are made for the first frame
    _score_text: str | None = None
    _score: pygame.Surface  # the rendered text
    _font: pygame.font.Font | None = None

    def frame(self) -> np.ndarray:
        """The frame [96, 96, 3] uint8 of the last step or reset, even if it was skipped."""
        # Gymnasium draws before it subtracts the step's 0.1 from the score.
        reward, self.reward = self.reward, self._reward_shown
        try:
            return super()._render("state_pixels") if self._bar_overflows() else self._draw()
        finally:
            self.reward = reward

    def _render(self, mode):
        if mode != "state_pixels":
            return super()._render(mode)
        if "t" not in self.__dict__:  # as in the parent: nothing to draw before the first reset
            return None
        self._reward_shown = self.reward
        if self.skip_frames:
            return np.zeros((STATE_H, STATE_W, 3), np.uint8)
        return self.frame()

    def _draw(self) -> np.ndarray:
        if not hasattr(self, "_canvas"):
            self._make_surfaces()
        self._draw_road()
        self._draw_bar()
        # smoothscale shrinks the rows and then the columns of the result, so the image can be
        # flipped in between, when it is a tenth as large.
        narrow = pygame.transform.smoothscale(self._canvas_in_sight, (STATE_W, _ROAD))
        self._narrow.blit(pygame.transform.flip(narrow, False, True), (0, 0))
        pygame.transform.smoothscale(self._bar_in_sight, (STATE_W, _BAR), self._narrow_bar)
        return self._create_image_array(self._narrow, (STATE_W, STATE_H))

    def _create_track(self):
        created = super()._create_track()
        if created:
            polygons = [*_grass(), *(polygon for polygon, _ in self.road_poly)]
            # [4, polygons], so that a polygon's extent is a reduction over the outer axis.
            self._x, self._y = np.array(polygons, np.float64).transpose(2, 1, 0).copy()
        return created

    def _make_surfaces(self) -> None:
        """Make the canvas, the bar and the narrowed image, and views of their used parts."""
        self._canvas = pygame.Surface((WINDOW_W, WINDOW_H))  # upside down: the bar hides the top
        self._canvas_in_sight = self._canvas.subsurface((0, _BAR, WINDOW_W, _ROAD))
        self._bar = pygame.Surface((WINDOW_W, WINDOW_H))
        self._bar_in_sight = self._bar.subsurface((0, _ROAD, WINDOW_W, _BAR))
        self._narrow = pygame.Surface((STATE_W, WINDOW_H))
        self._narrow_bar = self._narrow.subsurface((0, _ROAD, STATE_W, _BAR))

    def _bar_overflows(self) -> bool:
        """Whether a vertical meter may reach above the bar (a speed of 200, an omega of 400)."""
        speed = self.car.hull.linearVelocity.length
        return speed > 195 or any(wheel.omega > 390 for wheel in self.car.wheels)

    def _draw_road(self) -> None:
        """Draw playfield, grass, road and car."""
        hull, t = self.car.hull, self.t
        # The parent's expressions, equal to the last bit.
        angle = -hull.angle
        zoom = 0.1 * SCALE * max(1 - t, 0) + ZOOM * SCALE * min(t, 1)
        x, y = hull.position
        offset = pygame.math.Vector2((-x * zoom, -y * zoom)).rotate_rad(angle)
        shift = (WINDOW_W / 2 + offset[0], WINDOW_H / 4 + offset[1])

        self.surf = self._canvas
        if max(abs(x), abs(y)) + (_REACH + _MARGIN) / zoom < PLAYFIELD:
            # Only the playfield is visible.
            self._canvas_in_sight.fill([int(c) for c in self.bg_color])
        else:
            self._canvas.fill(0)
            edge = PLAYFIELD
            field = [(edge, edge), (edge, -edge), (-edge, -edge), (-edge, edge)]
            self._draw_colored_polygon(
                self._canvas, field, self.bg_color, zoom, shift, angle, clip=False
            )
        self._draw_polygons(zoom, shift, angle)
        self.car.draw(self._canvas, zoom, shift, angle, False)

    def _draw_polygons(self, zoom: float, shift: tuple[float, float], angle: float) -> None:
        """Draw the visible grass and road."""
        # Rotating a unit vector gives the cosine and sine that Vector2 itself uses.
        cos, sin = pygame.math.Vector2(1, 0).rotate_rad(angle)
        x = (cos * self._x - sin * self._y) * zoom + shift[0]
        y = (sin * self._x + cos * self._y) * zoom + shift[1]
        near = np.flatnonzero(
            (x.max(axis=0) > -_MARGIN)
            & (x.min(axis=0) < WINDOW_W + _MARGIN)
            & (y.max(axis=0) > _BAR - _MARGIN)
            & (y.min(axis=0) < WINDOW_H + _MARGIN)
        )
        x, y = x[:, near], y[:, near]
        # The parent's own test, which omits polygons with no corner near the window.
        slack = MAX_SHAPE_DIM
        drawn = (x >= -slack) & (x <= WINDOW_W + slack) & (y >= -slack) & (y <= WINDOW_H + slack)
        drawn = drawn.any(axis=0)
        # gfxdraw truncates to integers, and is faster if given integers.
        points = np.stack((x.T, y.T), axis=-1)[drawn].astype(np.int64).tolist()
        grass_color = [int(c) for c in self.grass_color]
        for index, polygon in zip(near[drawn].tolist(), points, strict=True):
            color = grass_color
            if index >= _GRASS_PATCHES:  # tiles change colour as the car passes
                color = [int(c) for c in self.road_poly[index - _GRASS_PATCHES][1]]
            gfxdraw.aapolygon(self._canvas, polygon, color)
            gfxdraw.filled_polygon(self._canvas, polygon, color)

    def _draw_bar(self) -> None:
        """Draw indicators and score."""
        self.surf = self._bar
        self._render_indicators(WINDOW_W, WINDOW_H)
        text = f"{self.reward:04.0f}"
        if text != self._score_text:
            self._score_text, self._score = text, self._render_text(text)
        place = self._score.get_rect()
        place.center = (60, WINDOW_H - WINDOW_H * 2.5 / 40.0)
        self._bar.blit(self._score, place)

    def _render_text(self, text: str) -> pygame.Surface:
        colors = (255, 255, 255), (0, 0, 0)
        try:
            if self._font is not None:
                return self._font.render(text, True, *colors)
        except pygame.error:  # pygame was quit: closing any window does that
            pass
        pygame.font.init()
        self._font = pygame.font.Font(pygame.font.get_default_font(), 42)
        return self._font.render(text, True, *colors)


def _grass() -> list[list[tuple[float, float]]]:
    """Grass patches, in the parent's order and arithmetic."""
    dim = GRASS_DIM
    return [
        [
            (dim * x + dim, dim * y + 0),
            (dim * x + 0, dim * y + 0),
            (dim * x + 0, dim * y + dim),
            (dim * x + dim, dim * y + dim),
        ]
        for x in range(-20, 20, 2)
        for y in range(-20, 20, 2)
    ]


_GRASS_PATCHES = len(_grass())
