"""Draws attention.svg for performance.py: the time of the attention over the number of tokens, as SVG."""

import math

WIDTH, HEIGHT = 800, 500
LEFT, RIGHT, TOP, BOTTOM = 62, 640, 78, 420  # the plot's edges
MIN_N, MAX_N = 8192, 131072
MIN_MS, MAX_MS = 2, 1000
GRAY = "#57606a"

# For each system: color, name, what it is, and where the label stands: at which point of the line, shifted by
# how many pixels, and which end of the text is there.
STYLES = {
    "fa4": ("#8250df", "FlashAttention-4", "full attention", -1, 12, -12, "start"),
    "fsa": ("#bf8700", "FSA", "NSA*", -1, 12, -8, "start"),
    "flash_nsa": ("#0969da", "flash_nsa", "NSA*", -1, 12, 14, "start"),
    "ours": ("#cf222e", "ours", "NSA", -1, 12, 0, "start"),
}


def x(n):
    return LEFT + (RIGHT - LEFT) * math.log(n / MIN_N) / math.log(MAX_N / MIN_N)


def y(ms):
    return BOTTOM - (BOTTOM - TOP) * math.log(ms / MIN_MS) / math.log(MAX_MS / MIN_MS)


def text(x_, y_, content, size=13, color="#1f2328", anchor="start", weight="normal"):
    return (
        f'<text x="{x_:.0f}" y="{y_:.0f}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{content}</text>'
    )


def line(x1, y1, x2, y2, color="#d8dee4"):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def axes():
    parts = []
    for ms in (2, 5, 10, 20, 50, 100, 200, 500, 1000):
        parts += [line(LEFT, y(ms), RIGHT, y(ms)), text(LEFT - 8, y(ms) + 4, ms, color=GRAY, anchor="end")]
    n = MIN_N
    while n <= MAX_N:
        parts += [
            line(x(n), TOP, x(n), BOTTOM),
            text(x(n), BOTTOM + 20, f"{n // 1024}K", color=GRAY, anchor="middle"),
        ]
        n *= 2
    parts += [
        text((LEFT + RIGHT) / 2, BOTTOM + 40, "tokens in the sequence (both axes are logarithmic)", color=GRAY, anchor="middle"),
        text(LEFT - 8, TOP - 10, "ms", color=GRAY, anchor="end"),
    ]
    return parts


def curve(system, points):
    """One system's line with a dot for each measurement, and its label."""
    color, name, what, at, dx, dy, anchor = STYLES[system]
    path = " ".join(f"{x(n):.1f},{y(ms):.1f}" for n, ms in points)
    width = 3.5 if system == "ours" else 2
    dash = ' stroke-dasharray="6 4"' if system == "fsa" else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dash}/>']
    parts += [f'<circle cx="{x(n):.1f}" cy="{y(ms):.1f}" r="4" fill="{color}"/>' for n, ms in points]
    n, ms = points[at]
    value = f"{ms:.3g} ms" if at == -1 else ""
    at_x, at_y = x(n) + dx, y(ms) + dy
    parts.append(text(at_x, at_y, name, 15, color, anchor, "bold"))
    parts.append(text(at_x, at_y + 17, what + (", " + value if value else ""), 13, color, anchor))
    return parts


def footnote(lines, others):
    """Says which lengths were not measured, and which systems select other blocks."""
    measured = {system: {n for n, _ in points} for system, points in lines.items()}
    found = []
    for system in sorted(set(others) & set(measured), key=lambda system: -len(others[system])):
        lengths = " and ".join(f"{n // 1024}K" for n in sorted(others[system]))
        found.append(STYLES[system][1].rstrip("*") + ("" if measured[system] <= others[system] else f" at {lengths}"))
    notes = [f"* {', and '.join(found)}{',' * (len(found) > 1)} select{'s' * (len(found) == 1)} other blocks than NSA defines."] if found else []
    for system, lengths in measured.items():
        missing = [f"{n // 1024}K" for n in sorted(set().union(*measured.values()) - lengths)]
        if missing:
            notes.append(f"{STYLES[system][1]} was not measured at {' and '.join(missing)}.")
    return " ".join(notes)


def draw(gpu, commit, lines, others):
    """Returns the picture. commit: this repo's. lines: {system: [(tokens, milliseconds)]}. others: {system: lengths at which
    it selects other blocks}."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">',
        "<title>Time of the attention over the length of the sequence</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(20, 26, f"Attention, forward + backward, one {gpu}, commit {commit}", 18, weight="bold"),
        text(
            20,
            46,
            "bf16, one sequence, 32 query heads and 8 KV heads of 128; NSA: 16 blocks of 64, window 512",
            13,
            GRAY,
        ),
    ]
    parts += axes()
    for system, points in lines.items():
        parts += curve(system, points)
    parts += [
        text(20, HEIGHT - 12, footnote(lines, others), 12, GRAY),
        "</svg>\n",
    ]
    return "\n".join(parts)
