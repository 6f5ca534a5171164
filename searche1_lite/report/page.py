"""The page around it all: template, style, content security policy, and the pieces of HTML that both reports use."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from searche1_lite.report.escaping import escape, script_json
from searche1_lite.report.svg import Chart, card
from searche1_lite.report.trajectories import Trajectories


def page(title: str, body: Sequence[str], trajectories: Trajectories | None = None) -> str:
    """The whole document. The viewer's script and data are in it only where there are trajectories.

    Style and script are allowed by their hashes; everything else, the network included, is forbidden.
    """
    style, script = _packaged("report.css"), ""
    index, chunks = "", ""
    if trajectories is not None:
        script = _packaged("viewer.js")
        index = f'<script type="application/json" id="index">{script_json(trajectories.index())}</script>'
        # After the viewer's script, which so begins before all of them are read. Base64 cannot close the element.
        chunks = "\n".join(
            f'<script type="application/octet-stream" id="chunk-{number}">{chunk}</script>'
            for number, chunk in enumerate(trajectories.chunks)
        )
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_packaged("template.html")).substitute(
        policy=policy,
        title=escape(title),
        style=style,
        body="\n".join(body),
        index=index,
        script=f"<script>{script}</script>" if script else "",
        chunks=chunks,
    )


def _packaged(name: str) -> str:
    return (files("searche1_lite.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def header(kind: str, name: str, facts: dict[str, object], sections: dict[str, str], state: str = "") -> str:
    """The name of what is reported, the facts about it, and links to the sections (id -> title)."""
    shown = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>"
        for key, value in facts.items()
        if value is not None
    )
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title in sections.items())
    badge = f'<p class="state">{escape(state)}</p>' if state else ""
    return (
        f'<header><p class="kind">{escape(kind)}</p><h1 dir="auto">{escape(name)}</h1>{badge}'
        f'<dl class="facts">{shown}</dl><nav aria-label="Sections">{links}</nav></header>'
    )


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Large figures: (what, figure, a word on it)."""
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><p>{escape(what)}</p><strong>{escape(figure)}</strong><p>{escape(word)}</p></div>'
        for what, figure, word in figures
    ) + "</div>"  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of HTML cells that are escaped already; the first column names the row."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<p class="caption">{escape(caption)}</p>'
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def section(key: str, title: str, *content: str) -> str:
    return f'<section id="{key}"><h2>{escape(title)}</h2>{"".join(content)}</section>'


def cards(charts: Sequence[Chart]) -> str:
    return '<div class="cards">' + "".join(map(card, charts)) + "</div>"


def notes(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"
