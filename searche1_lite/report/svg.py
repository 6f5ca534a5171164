"""Matplotlib's plots as inline SVG that takes its colours and its font from the page, in light and in dark.

Plots are drawn with stand-in colours, one a role, which become CSS variables afterwards. Style attributes become plain
ones, so that the page's content security policy need not allow inline style.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from searche1_lite.report.escaping import escape, visible

INK, MUTED, GRID, BAND = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", BAND: "var(--band)"} | {
    colour: f"var(--s{index})" for index, colour in enumerate(SERIES, start=1)
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "searche1-lite",
    "text.parse_math": False,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}
_TIP = "tip:"
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_ROWS = 100
"""A chart's table has at most so many rows; of more, they are taken evenly."""


@dataclass
class Chart:
    """A card of the report: a plot, and its figures as a table."""

    key: str
    title: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def draw(
    key: str,
    title: str,
    plot: Callable[[Axes], None],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str = "",
    height: float = 240,
) -> Chart:
    """Draws one card.

    Args:
        key: the prefix of the ids inside; one that no other chart of the page has.
        plot: draws into the axes; artists with a label get into the legend above.
        columns, rows: what is drawn, for those who cannot see or want the figures.
        note: a sentence under the title on how to read it.
        height: in pixels, at a width of 340.
    """
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts of its own
        figure = Figure(figsize=(340 / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            # An entry takes about 6.2 pixels a character, and 34 for its line and the space around it.
            columns_there = max(1, min(4, len(handles), int(330 // (6.2 * max(map(len, labels)) + 34))))
            figure.legend(handles, labels, loc="outside upper left", ncols=columns_there)
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    if len(rows) > _ROWS:
        rows = [rows[index * len(rows) // _ROWS] for index in range(_ROWS)]
    return Chart(key, title, themed(file.getvalue(), key, title), columns, rows, note)


def tip(artist: Artist, text: str) -> None:
    """Shows `text` where the pointer rests on this artist."""
    artist.set_gid(_TIP + visible(text))


def label(text: object, length: int = 26) -> str:
    """Somebody's name for something, fit to stand in a plot: one short line."""
    line = " ".join(visible(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def themed(svg: str, key: str, title: str) -> str:
    """Matplotlib's SVG as an element for the page: see the module."""
    root = ElementTree.fromstring(svg)
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in [e for e in root.iter() if e.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")]:
        parents[element].remove(element)
    referred = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    for element in list(root.iter()):
        _use_attributes(element)
        _rename(element, key, referred)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": visible(title), "class": "plot"}
    text = ElementTree.tostring(root, encoding="unicode")
    return text.replace(f' xmlns:ns0="{_SVG}"', "").replace("ns0:", "")


def _use_attributes(element: ElementTree.Element) -> None:
    """Style into presentation attributes, stand-in colours into the page's; the page has the font."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            if size := re.search(r"[\d.]+px", value):
                element.set("font-size", size[0])
            if re.search(r"\b(bold|[6-9]00)\b", value):
                element.set("font-weight", "bold")
        elif name and name not in ("font-family", "font-style", "font-stretch", "font-variant"):
            element.set(name, value)
    for name in ("fill", "stroke"):
        if (variable := _VARIABLES.get(element.get(name, ""))) is not None:
            element.set(name, variable)


def _rename(element: ElementTree.Element, key: str, referred: set[str]) -> None:
    """Ids become the chart's own, or go where nothing refers to them; a tip becomes a `<title>`."""
    name = element.attrib.pop("id", "")
    if name.startswith(_TIP):
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = name.removeprefix(_TIP)
        element.insert(0, title)
        element.set("class", "tipped")
    elif name in referred:
        element.set("id", f"{key}-{name}")
    if (reference := element.attrib.pop(f"{{{_XLINK}}}href", None)) is not None:
        element.set("href", f"#{key}-{reference.removeprefix('#')}")
    if (clip := element.get("clip-path")) is not None:
        element.set("clip-path", clip.replace("url(#", f"url(#{key}-"))


def card(chart: Chart) -> str:
    """The chart's HTML."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in chart.columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in chart.rows)
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="card" id="chart-{escape(chart.key)}"><figcaption>{escape(chart.title)}</figcaption>{note}'
        f"{chart.svg}<details><summary>Figures</summary>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details></figure>'
    )
