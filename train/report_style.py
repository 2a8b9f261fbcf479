"""The look of a report: one style sheet for light and dark, and the frame of the page."""

from __future__ import annotations

STYLE_SHEET = """
:root {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --page: #f5f6f8; --card: #ffffff; --ink: #1b2130; --muted: #667085; --line: #e3e6ec;
  --train: #0072b2; --best: #00825f;
  --source-0: #d55e00; --source-1: #8e44ad; --source-2: #c58a00; --source-3: #00825f; --source-4: #555f70;
  --good: #00825f; --warn: #b25e00; --bad: #c0392b; --tint: #eef5fb;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1b1f27; --ink: #e7eaf0; --muted: #98a2b3; --line: #2e3440;
    --train: #56b4e9; --best: #34c99a;
    --source-0: #ff8c4b; --source-1: #cc9bea; --source-2: #f0c14b; --source-3: #34c99a; --source-4: #a4afc0;
    --good: #34c99a; --warn: #f0a04b; --bad: #ff7b6b; --tint: #1d2a38;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 10px 0 4px; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 44px 0 4px; }
h3 { font-size: 13px; font-weight: 600; margin: 0 0 6px; }
p { margin: 0 0 12px; }
.said { color: var(--muted); }
.badge { display: inline-block; padding: 2px 11px; margin-right: 6px; border-radius: 99px; font-size: 13px;
         font-weight: 600; border: 1px solid currentColor; }
.finished { color: var(--good); } .failed { color: var(--bad); } .stopped, .running { color: var(--warn); }
.scale { color: var(--train); }
.banner { border-left: 4px solid var(--warn); background: var(--card); padding: 12px 18px; border-radius: 6px;
          margin: 20px 0; }
.banner.failed { border-color: var(--bad); color: inherit; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 12px 0;
        overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tiles .card { margin: 0; }
.tiles b { display: block; font-size: 23px; line-height: 1.25; letter-spacing: -0.02em; font-weight: 650; }
.tiles span { color: var(--muted); font-size: 13px; }
.three { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; }
.three .card { margin: 0; padding: 14px 14px 8px; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: 13px; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: pre-line; }
tr:last-child > td, tbody tr:last-child > th { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: pre; }
td.value { font-family: var(--mono); font-size: 12.5px; overflow-wrap: anywhere; }
tr.differs > td { background: var(--tint); }
code { font-family: var(--mono); font-size: 13px; overflow-wrap: anywhere; }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
.message { padding: 5px 0; border-bottom: 1px solid var(--line); }
.message:last-child { border-bottom: 0; }
.message.warning b { color: var(--warn); } .message.error b { color: var(--bad); }
.message b { display: inline-block; min-width: 74px; font-weight: 600; color: var(--muted); }
.good { color: var(--good); font-weight: 600; } .noise { color: var(--warn); font-weight: 600; }
footer { color: var(--muted); font-size: 13px; margin-top: 40px; }
@media print { body { background: #fff; } .card, .banner { break-inside: avoid; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document.

    Args:
        title: HTML-escaped text of the window's title.
        body: HTML of the page.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(head: list[str], rows: list[list[str]], *, numbers: frozenset[int] = frozenset()) -> str:
    """An HTML table of cells that are HTML already; columns in `numbers` are set to the right. No names, no head."""
    kinds = [' class="number"' if column in numbers else "" for column in range(len(head))]
    first = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    named = f"<thead><tr>{first}</tr></thead>" if any(head) else ""
    return f"<table>{named}<tbody>{body}</tbody></table>"
