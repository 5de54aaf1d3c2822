"""`--record`: a run's canvas settling, as an animated SVG that needs no script and no font of its own.

Every step is a group of its own; keyframes show one group after the other. Where nothing moves (a still renderer, or
a reader who prefers reduced motion) the last frame is seen: the finished answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from ..events import Delta, Draft, Result
from . import figures
from .canvas import NOISE, Cell, Look, Pieces, Row, caption, cells, columns, window, wrap
from .terminal import visible

WIDTH, COLUMNS, ROWS = 860, 72, 24
MARGIN, CELL, LINE, FONT = 41, 10.8, 26, 18  # a monospace character is 0.6 of its font size wide
HEADER, FOOTER = 92, 62
STEP_SECONDS, FIRST_SECONDS, COMMIT_SECONDS, LAST_SECONDS = 0.32, 0.9, 0.7, 5.0
BUDGET, FRAMES = 280_000, 120  # bytes and pictures at most; longer runs lose frames, evenly

STYLE = f"""
text{{font:{FONT}px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre;fill:#e6e1d8}}
.settled{{font-weight:700}}
.revised{{fill:#f2c14e;text-decoration:underline}}
.guess{{fill:#8b93a7}}
.note{{font-size:14px;fill:#8b93a7}}
.low{{fill:#7aa2f7;opacity:.16}}.middle{{fill:#7aa2f7;opacity:.3}}.high{{fill:#7aa2f7;opacity:.46}}
.bar{{fill:#7aa2f7;opacity:.35}}.now{{fill:#f2c14e;opacity:1}}
"""


@dataclass(frozen=True)
class Frame:
    """One picture: its rows, the line below, how long it stays, and which step of the run it is (for the bars)."""

    rows: list[Row]
    note: str
    seconds: float
    step: int | None = None


def render(prompt: str, drafts: Sequence[Draft], deltas: Sequence[Delta], result: Result, pieces: Pieces) -> str:
    """The SVG document of a run."""
    frames = _frames(drafts, deltas, result, pieces)
    height = max(len(frame.rows) for frame in frames)
    entropies = [draft.mean_entropy for draft in drafts]
    bodies = [_draw(frame, height, entropies) for frame in frames]
    kept = _thin([len(body.encode()) for body in bodies])
    about = f"Seed {result.seed}. {figures.brief(result)}"
    return _document(prompt, [frames[i] for i in kept], [bodies[i] for i in kept], height, about)


def _frames(drafts: Sequence[Draft], deltas: Sequence[Delta], result: Result, pieces: Pieces) -> list[Frame]:
    """A frame a draft, with the committed text before it, and the answer as the last one."""
    before: dict[int, str] = {}  # canvas -> text before it
    text = ""
    for delta in deltas:
        before.setdefault(delta.canvas, text)
        text += delta.text
    frames = []
    for index in _evenly(len(drafts), FRAMES):
        draft = drafts[index]
        content = [Cell(visible(before.get(draft.canvas, text)), Look.WRITTEN), *cells(draft, pieces)]
        last = index + 1 == len(drafts) or drafts[index + 1].canvas != draft.canvas
        seconds = COMMIT_SECONDS if last else FIRST_SECONDS if draft.step == 1 else STEP_SECONDS
        frames.append(Frame(_fit(content), caption(draft, 90), seconds, index))
    answer = [Cell(visible(result.text), Look.WRITTEN)]
    frames.append(Frame(_fit(answer), figures.brief(result), LAST_SECONDS))
    return frames


def _fit(content: list[Cell]) -> list[Row]:
    """The rows of a frame, at most `ROWS` of them."""
    shown = window(wrap(content, COLUMNS, words=True), ROWS)
    rows = shown.rows
    if shown.above:
        rows = [[(f"⋮ {shown.above} more above", Look.GUESS)], *rows]
    if shown.below:
        rows = [*rows, [(f"⋮ {shown.below} more below", Look.GUESS)]]
    return rows


def _draw(frame: Frame, height: int, entropies: list[float]) -> str:
    """The content of a frame's group: noise as blocks (one path a density), then runs of text, figures and bars."""
    blocks: dict[Look, list[str]] = {look: [] for look in NOISE}
    lines = []
    for number, row in enumerate(frame.rows):
        top = HEADER + number * LINE
        spans = []
        column = 0
        for text, look in row:
            taken = columns(text)
            if look in NOISE:
                for match in re.finditer(r"\S+", text):
                    start, end = column + columns(text[: match.start()]), column + columns(text[: match.end()])
                    blocks[look].append(_block(start, end, top))
            elif text.strip():
                left = len(text) - len(text.lstrip(" "))
                name = "" if look is Look.WRITTEN else f' class="{look.value}"'
                x = _short(MARGIN + (column + left) * CELL)
                spans.append(f'<tspan x="{x}"{name}>{_xml(text.strip(" "))}</tspan>')
            column += taken
        if spans:
            lines.append(f'<text y="{top + FONT}">{"".join(spans)}</text>')
    paths = [f'<path class="{look.value}" d="{"".join(path)}"/>' for look, path in blocks.items() if path]
    bottom = HEADER + height * LINE + 38
    note = f'<text class="note" x="{MARGIN}" y="{bottom}">{_xml(frame.note)}</text>'
    return "".join([*paths, *lines, note, _bars(frame.step, entropies, bottom)])


def _bars(step: int | None, entropies: list[float], bottom: int) -> str:
    """Mean entropy of every step up to this one, as bars at the right."""
    count = len(entropies) if step is None else step + 1
    width = min(9.0, 230 / max(1, len(entropies)))
    top = max(entropies, default=0.0) or 1.0
    shapes = []
    for index in range(count):
        tall = max(1.5, 26 * (max(0.0, entropies[index]) / top) ** 0.5)
        left = WIDTH - MARGIN - (len(entropies) - index) * width
        shape = f"M{_short(left)} {_short(bottom + 4)}v-{_short(tall)}h{_short(width * 0.7)}v{_short(tall)}z"
        shapes.append(shape)
    now = f'<path class="now" d="{shapes.pop()}"/>' if step is not None and shapes else ""
    return (f'<path class="bar" d="{"".join(shapes)}"/>' if shapes else "") + now


def _thin(sizes: list[int]) -> list[int]:
    """Indexes of the frames to keep: all, or as many as the budget allows, the first and the last among them."""
    for count in range(len(sizes), 2, -1):
        kept = _evenly(len(sizes), count)
        if sum(sizes[index] for index in kept) <= BUDGET:
            return kept
    return _evenly(len(sizes), 2)


def _evenly(length: int, count: int) -> list[int]:
    """At most `count` indexes below `length`, evenly spread, the first and the last among them."""
    if length <= count:
        return list(range(length))
    return [round(place * (length - 1) / (count - 1)) for place in range(count)]


def _document(prompt: str, frames: list[Frame], bodies: list[str], height: int, description: str) -> str:
    total = sum(frame.seconds for frame in frames)
    tall = HEADER + height * LINE + FOOTER
    style, groups = [STYLE], []
    begun = 0.0
    for index, (frame, body) in enumerate(zip(frames, bodies, strict=True)):
        start, end = (f"{_short(100 * moment / total, 3)}%" for moment in (begun, begun + frame.seconds))
        begun += frame.seconds
        hidden = "" if index == 0 else "0%{visibility:hidden}"
        close = "" if index + 1 == len(frames) else f"{end}{{visibility:hidden}}"
        style.append(f"@keyframes k{index}{{{hidden}{start}{{visibility:visible}}{close}}}")
        style.append(f"#f{index}{{animation:k{index} {_short(total)}s step-end infinite}}")
        shown = "" if index + 1 == len(frames) else ' visibility="hidden"'
        groups.append(f'<g id="f{index}"{shown}>{body}</g>')
    style.append("@media (prefers-reduced-motion:reduce){g{animation:none!important}}")
    title = " ".join(visible(prompt).split())
    first, *more = wrap([Cell(title, Look.WRITTEN)], COLUMNS - 3, words=True)
    heading = "".join(text for text, _ in first) + ("…" if more else "")
    middle = HEADER - 26
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" '
            'role="img" aria-labelledby="title about">',
            f'<title id="title">{_xml(title[:300])}</title>',
            f'<desc id="about">{_xml("A text appearing out of noise, step by step. " + description)}</desc>',
            f"<style>{''.join(style)}</style>",
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{tall - 2}" rx="14" fill="#15181f" stroke="#3a4152"/>',
            f'<text x="{MARGIN}" y="48"><tspan class="revised" style="text-decoration:none">›</tspan> '
            f"{_xml(heading)}</text>",
            f'<path d="M{MARGIN} {middle}H{WIDTH - MARGIN}" stroke="#2a3040"/>',
            *groups,
            "</svg>\n",
        ]
    )


def _block(start: int, end: int, top: int) -> str:
    """A rectangle over columns `start` to `end` of a row, as a path."""
    width = _short((end - start) * CELL - 2)
    return f"M{_short(MARGIN + start * CELL + 1)} {top + 4}h{width}v16h-{width}z"


def _short(number: float, digits: int = 1) -> str:
    return f"{number:.{digits}f}".rstrip("0").rstrip(".")


def _xml(text: str) -> str:
    """Escaped for XML, without the few characters that XML cannot hold at all."""
    return escape(re.sub("[\ud800-\udfff\ufffe\uffff]", "\ufffd", text.replace("\t", " ").replace("\n", " ")))
