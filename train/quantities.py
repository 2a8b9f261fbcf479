"""Numbers as a person reads them, the same on the screen and in the report."""

from __future__ import annotations

import math

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def count(value: float) -> str:
    """A count in at most four characters of digits: `812`, `3.2M`, `8.5T`."""
    if not math.isfinite(value):
        return str(value)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        # 999,950 would print as 1000.0K, so the border lies where rounding reaches it.
        if abs(value) >= size * 0.99995 and (unit != "K" or abs(value) >= 1e4):
            return f"{_three_digits(value / size)}{unit}"
    return f"{value:,.0f}"


def byte_size(value: float) -> str:
    """A size in binary units: `12.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def duration(seconds: float) -> str:
    """A time in its two largest units: `8.2 s`, `3 min 20 s`, `6 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"


def rate(value: float) -> str:
    """A learning rate: `3.00e-04`."""
    return f"{value:.2e}"


def percent(fraction: float) -> str:
    """A share: `41.2 %`."""
    return f"{100 * fraction:.1f} %"


def estimate(mean: float, standard_error: float) -> str:
    """A mean with its standard error: `3.214 +- 0.012`, with as many decimals as the error deserves."""
    decimals = 3
    if math.isfinite(standard_error) and 0 < standard_error < 1:
        decimals = min(max(1 - math.floor(math.log10(standard_error)), 3), 6)
    return f"{mean:.{decimals}f} {PLUS_MINUS} {standard_error:.{decimals}f}"


def _three_digits(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if abs(value) < 100 else f"{value:.0f}"
