"""Colours and type of the page, for light and for dark surroundings, and the script that puts its figures in place."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --rule: #d8dde3; --failure: #c62f38;
  --good: #1a7f37;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --panel: #171b21; --ink: #e8ebef; --soft: #9aa5b1; --rule: #2d343d; --failure: #ff7b80;
    --good: #5fd37d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 32px 24px 64px; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
@media (max-width: 600px) { body { padding: 16px 12px 48px; } }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; } h3 { font-size: 15px; margin: 24px 0 4px; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 76ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile span { color: var(--soft); font-size: 13px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0; padding: 0; list-style: none; font-size: 13px; }
.key i {
  display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 2px; vertical-align: -1px;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--rule); }
td { vertical-align: top; } td.w { white-space: nowrap; } td.n, th.n { text-align: right; }
td.long { overflow-wrap: anywhere; min-width: 16ch; }
.about th { width: 12em; font-weight: 400; vertical-align: top; }
@media (max-width: 600px) { .about th { width: 8em; } }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--failure); font-weight: 600; }
footer { margin-top: 48px; border-top: 1px solid var(--rule); padding-top: 12px; font-size: 13px; }
dt { font-weight: 600; } dd { margin: 0 0 8px; color: var(--soft); max-width: 90ch; }
"""

# The figures are drawn on canvases, which know nothing of the page's colours: they are put in before. Where fingers
# scroll the page, dragging in a figure must not zoom it.
SCRIPT = """
const scheme = matchMedia("(prefers-color-scheme: dark)");
scheme.addEventListener("change", () => location.reload());
const colours = getComputedStyle(document.documentElement);
const names = ["--ink", "--soft", "--rule", "--page"];
const text = document.getElementById("figures").textContent.replace(
  /#0a0a0([1-4])/g, (_, number) => colours.getPropertyValue(names[number - 1]).trim());
const [documents, places] = JSON.parse(text, (key, value) =>
  key === "active_drag" && matchMedia("(pointer: coarse)").matches ? null : value);
Bokeh.embed.embed_items(documents, places);
"""
