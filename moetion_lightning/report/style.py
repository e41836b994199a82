"""Colours and type of the page, for light and for dark surroundings."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --rule: #d8dde3; --accent: #2563c9;
  --first: #2f73d8; --replayed: #e0a100; --again: #c2571a; --stage: #8250c4; --starting: #2b9c8a;
  --waiting: #a9b1ba; --lost: #6b7480; --down: #f3d3d3; --failure: #c62f38; --good: #1a7f37;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --panel: #171b21; --ink: #e8ebef; --soft: #9aa5b1; --rule: #2d343d; --accent: #6ea8ff;
    --first: #5b9bf3; --replayed: #f0bd45; --again: #e8834a; --stage: #b791f0; --starting: #45c2ad;
    --waiting: #5b6570; --lost: #8b95a1; --down: #4a2427; --failure: #ff7b80; --good: #5fd37d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 32px 24px 64px; max-width: 1080px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 76ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile span { color: var(--soft); font-size: 13px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0; padding: 0; list-style: none; font-size: 13px; }
.key i {
  display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 2px; vertical-align: -1px;
}
.key .mark { width: auto; background: none; font-style: normal; color: var(--soft); }
.scroll { overflow-x: auto; }
.scroll svg { min-width: 640px; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg text { font-size: 12px; fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .value { font-weight: 600; font-size: 14px; }
svg .halo { paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: var(--rule); stroke-width: 1; }
.first { fill: var(--first); background: var(--first); }
.replayed { fill: var(--replayed); background: var(--replayed); }
.again { fill: var(--again); background: var(--again); }
.stage { fill: var(--stage); background: var(--stage); }
.starting { fill: var(--starting); background: var(--starting); }
.waiting { fill: var(--waiting); background: var(--waiting); }
.lost { fill: var(--lost); background: var(--lost); }
.down { fill: var(--down); background: var(--down); }
.capture { fill: var(--soft); } .commit { fill: var(--ink); }
.bar { fill: var(--accent); } .cell { fill: var(--accent); } svg .cell-text { font-size: 11px; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
circle.end { fill: var(--accent); }
.reference { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 6 4; }
.failure line { stroke: var(--failure); stroke-width: 1.5; stroke-dasharray: 3 3; }
.failure circle { fill: var(--failure); } svg .failure text { fill: var(--page); font-size: 11px; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--rule); }
td { vertical-align: top; } td.w { white-space: nowrap; } td.n, th.n { text-align: right; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--failure); font-weight: 600; }
footer { margin-top: 48px; border-top: 1px solid var(--rule); padding-top: 12px; font-size: 13px; }
dt { font-weight: 600; } dd { margin: 0 0 8px; color: var(--soft); max-width: 90ch; }
"""
