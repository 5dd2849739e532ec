"""Numbers as a reader wants them: few digits, but never so few that a number and its limit look the same."""

import math

from falign.lab.experiment import Check
from falign.lab.experiment._progress import duration as duration  # the page's times are the terminal's

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_FEW = 3
"""Digits that a check is shown with if they tell enough."""
_MOST = 17
"""Digits that tell any two doubles apart."""


def power_of_ten(exponent: int) -> str:
    """10 to a power, written without markup."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def format_number(value: float | int, digits: int = 4) -> str:
    """A number in a few significant digits; whole numbers below a million keep all of theirs.

    Args:
        value: The number.
        digits: Significant digits.

    Returns:
        Such as "0.6132", "12800", "1.3 × 10⁻⁵", "−2", "∞".
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == round(value) and abs(value) < 1e6:
        return str(round(value)).replace("-", "−")
    rounded = float(f"{value:.{digits - 1}e}")
    if 1e-3 <= abs(rounded) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
        text = f"{rounded:.{places}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    power = power_of_ten(int(exponent))
    text = {"1": power, "-1": f"-{power}"}.get(mantissa, f"{mantissa} × {power}")
    return text.replace("-", "−")


def digits_of(check: Check) -> int:
    """Number of digits that a check needs so that the numbers that are shown say what the exact ones do."""
    ends = [end for end in (check.low, check.high) if math.isfinite(end)]
    if not math.isfinite(check.measured):
        return _FEW
    for digits in range(_FEW, _MOST):
        if all(
            (format_number(end, digits) == format_number(check.measured, digits)) == (end == check.measured)
            for end in ends
        ):
            return digits
    return _MOST


def interval(check: Check) -> str:
    """The interval of a check: "[0.58, 0.64]", "≥ 0.58", "≤ 0.64" or "any number"."""
    digits = digits_of(check)
    low, high = format_number(check.low, digits), format_number(check.high, digits)
    if math.isinf(check.low) and check.low < 0:
        return "any number" if check.high == math.inf else f"≤ {high}"
    return f"≥ {low}" if check.high == math.inf else f"[{low}, {high}]"


def portable(value: object) -> object:
    """A value that JSON can hold: what is not finite becomes "NaN", "Infinity" or "-Infinity".

    Args:
        value: A scalar, or lists and mappings of such; anything else becomes its text.

    Returns:
        The same of str, int, float, bool, None, list and dict only.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): portable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(each) for each in value]
    return str(value)
