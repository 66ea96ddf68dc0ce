"""Numbers and sentences as the page writes them."""

import math

# Written as escapes, since they look like other characters in source.
THIN = "\u202f"  # narrow no-break space: a number and its unit stay on one line
TIMES = "\u00d7"
DASH = "\u2013"
MINUS = "\u2212"


def digits(value: float, significant: int = 3) -> str:
    """Write a number with `significant` digits and no exponent: 0.0314, 1.20, 12.3, 1234."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = significant - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, max(places, 0))
    places = significant - 1 - math.floor(math.log10(abs(rounded)))  # 0.9996 has become 1.00
    return f"{rounded:.{max(places, 0)}f}"


def ms(value: float | None) -> str:
    """Write milliseconds with their unit, or a dash for None."""
    return DASH if value is None else f"{digits(value)}{THIN}ms"


def percent(fraction: float | None, places: int = 1) -> str:
    """Write a fraction as percent, or a dash for None."""
    return DASH if fraction is None else f"{100 * fraction:.{places}f}{THIN}%"


def scaled(value: float | None, unit: str = "") -> str:
    """Write a count or a size with k, M or G (powers of 1000), or a dash for None."""
    if value is None:
        return DASH
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{digits(value / factor)}{THIN}{prefix}{unit}"
    return f"{value:g}{THIN}{unit}".rstrip(THIN)


def duration(seconds: float) -> str:
    """Write seconds as people say them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{THIN}s"
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60}{THIN}s"
    return f"{whole // 3600}{THIN}h {whole % 3600 // 60:02d}{THIN}min"


def signed(value: float, places: int = 1) -> str:
    """Write a difference with its sign: +0.3, \u22122.4."""
    return f"{value:+.{places}f}".replace("-", MINUS)
