"""Small line charts as SVG, readable on light and on dark ground."""

from xml.sax.saxutils import escape

WIDTH, HEIGHT = 490, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 158, 28, 40
COLOURS = ("#3b82c4", "#d9822b", "#2e9e6b", "#b0579b", "#8a8f98", "#c94f4f", "#a58f1e")
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.axis{stroke:#888;fill:none}.grid{stroke:#888;stroke-opacity:.25;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#999}}"
)


class Axis:
    """Maps values to positions; `ticks` are the values with a label."""

    def __init__(self, low, high, begin, end, ticks, scale=float):
        self.low, self.high, self.begin, self.end, self.ticks, self.scale = scale(low), scale(high), begin, end, ticks, scale

    def at(self, value):
        """The position of a value."""
        share = (self.scale(value) - self.low) / ((self.high - self.low) or 1.0)
        return round(self.begin + share * (self.end - self.begin), 1)


def ticks(low, high, count=5):
    """Round values from low to high."""
    step = next(s for e in range(-4, 4) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if (high - low) / s <= count)
    first = -(-low // step)
    return [round((first + i) * step, 6) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def horizontal(low, high, values, scale=float):
    """An axis along the bottom."""
    return Axis(low, high, LEFT, WIDTH - RIGHT, values, scale)


def vertical(low, high, values=None):
    """An axis along the left side."""
    return Axis(low, high, HEIGHT - BOTTOM, TOP, ticks(low, high) if values is None else values)


def chart(title, x_label, y_label, x, y, lines, diagonal=False):
    """A chart of `lines`: [(name, [(x, y), ...], marks)], where marks tells whether points are drawn."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text x="{LEFT}" y="16" font-weight="600">{escape(title)}</text>',
    ]
    for value in y.ticks:
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{value:g}</text>')
    for value in x.ticks:
        parts.append(f'<text x="{x.at(value)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    if diagonal:
        low, high = x.ticks[0], x.ticks[-1]
        path = f"M{x.at(low)} {y.at(low)}L{x.at(high)} {y.at(high)}"
        parts.append(f'<path class="axis" stroke-dasharray="3 3" d="{path}"/>')
    for index, (name, points, marks) in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        places = [(x.at(a), y.at(b)) for a, b in points]
        path = "L".join(f"{a} {b}" for a, b in places)
        parts.append(f'<path fill="none" stroke="{colour}" stroke-width="1.8" d="M{path}"/>')
        if marks:
            parts += [f'<circle cx="{a}" cy="{b}" r="2.8" fill="{colour}"/>' for a, b in places]
        at = TOP + 10 + 16 * index
        parts.append(f'<path stroke="{colour}" stroke-width="3" d="M{WIDTH - RIGHT + 10} {at - 4}h14"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{at}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
