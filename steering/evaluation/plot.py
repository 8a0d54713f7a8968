"""One picture: gains with their intervals, as an SVG that needs no library to write and none to read.

Path("ladder.svg").write_text(gains_svg([Bar("head", 0.12, 0.08, 0.16, "tier")], "Gain in pass@1"))
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = {"tier": "#1f6f8b", "control": "#c0562f", "sharpening": "#8a8a8a", "format": "#b49a2b"}
LINE, LEFT, WIDTH, TOP, BOTTOM = 24, 170, 720, 44, 40  # pixels


class Bar(NamedTuple):
    """A row of the picture."""

    label: str
    mean: float
    low: float
    high: float
    role: str  # a key of COLOURS


def gains_svg(bars: Sequence[Bar], title: str) -> str:
    """Points with whiskers over a common axis, with a line at 0."""
    low = min(0.0, *(bar.low for bar in bars)) - 0.01
    high = max(0.0, *(bar.high for bar in bars)) + 0.01
    bottom = TOP + LINE * len(bars)

    def x(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 20) * (value - low) / (high - low), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 10 or s == 0.5)
    for i in range(int(low / step) - 1, int(high / step) + 2):
        if low <= i * step <= high:
            at, shade = x(i * step), "#404040" if i == 0 else "#e0e0e0"
            parts.append(f'<line x1="{at}" x2="{at}" y1="{TOP - 8}" y2="{bottom}" stroke="{shade}"/>')
            parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{i * step:+.2f}</text>')
    for i, bar in enumerate(bars):
        y, colour = TOP + LINE * i + LINE // 2, COLOURS[bar.role]
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end" fill="{colour}">{escape(bar.label)}</text>')
        whisker = f'x1="{x(bar.low)}" x2="{x(bar.high)}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"'
        parts.append(f'<line {whisker}/><circle cx="{x(bar.mean)}" cy="{y}" r="4" fill="{colour}"/>')
    for i, (role, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{LEFT + 120 * i}" y="{bottom + 34}" fill="{colour}">{role}</text>')
    return "\n".join([*parts, "</svg>", ""])
