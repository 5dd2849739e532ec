"""Colours of the page, and how a colour that a figure was drawn in on white looks on a dark page."""

import math

PALETTE = {
    "paper": ("#fdfdfb", "#14171b"),
    "raised": ("#f5f5f1", "#1c2026"),
    "ink": ("#1c1f23", "#e6e4df"),
    "quiet": ("#5a6068", "#a3a8b0"),
    "line": ("#dcdcd5", "#343a42"),
    "link": ("#1f5fa8", "#86b6ee"),
    "holds": ("#0b6650", "#62cfae"),
    "holds-back": ("#e2f2ec", "#16312a"),
    "fails": ("#a8320c", "#ff9b73"),
    "fails-back": ("#fdeae2", "#3b2018"),
    "open": ("#555b63", "#b4b9c0"),
    "open-back": ("#ecece8", "#2a2f36"),
}
"""Name on the page -> (on a light page, on a dark one)."""

_GREY = 0.03
"""Below so much chroma a colour is ink, axis or grid, and must turn around wholly."""


def on_dark(colour: str) -> str:
    """The colour of the same hue that does on a dark page what a colour does on white.

    In OKLab (Ottosson 2020), where equal steps look equal: greys are turned around, white becoming the page;
    what has a hue keeps it, and dark becomes light, but never so dark that it is lost.

    Args:
        colour: Such as "#1f5fa8".

    Returns:
        Likewise.
    """
    lightness, a, b = _oklab(colour)
    if math.hypot(a, b) < _GREY:
        return _hexadecimal(1.0 - 0.8 * lightness, a, b)
    return _hexadecimal(0.58 + 0.35 * (1.0 - lightness), a, b)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours, from 1 to 21, after WCAG 2."""
    dark, light = sorted(_luminance(colour) for colour in (first, second))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(colour: str) -> tuple[float, float, float]:
    def one(start: int) -> float:
        value = int(colour[start : start + 2], 16) / 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    return one(1), one(3), one(5)


def _oklab(colour: str) -> tuple[float, float, float]:
    r, g, b = _linear(colour)
    long = math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b)
    middle = math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b)
    short = math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def _hexadecimal(lightness: float, a: float, b: float) -> str:
    """From OKLab; what no screen can show loses chroma until it can, and keeps its hue."""
    for share in range(20, -1, -1):
        channels = _channels(lightness, a * share / 20, b * share / 20)
        if all(-1e-3 <= channel <= 1.001 for channel in channels):
            break
    else:
        channels = _channels(min(1.0, lightness), 0.0, 0.0)
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, channel)))):02x}" for channel in channels)


def _channels(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
