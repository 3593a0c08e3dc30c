"""The style of a report, light and dark. Colours are those of Okabe & Ito, lightened for dark pages."""

STYLE = """
:root { --page: #f6f6f3; --card: #ffffff; --text: #1d1d1b; --soft: #5c5c58; --grid: #dededa; --edge: #e4e4df;
  --c0: #0072b2; --c1: #c27c00; --c2: #00805d; --c3: #b3568b; --c4: #c44e00; --c5: #2f8fc4; --c6: #8a7d00;
  --c7: #55555a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131416; --card: #1d1f22; --text: #ececea; --soft: #a9aaad; --grid: #36383d; --edge: #2c2e33;
    --c0: #58a9e0; --c1: #e9b04a; --c2: #35b88f; --c3: #dd98c0; --c4: #f08a4b; --c5: #7cc4ee; --c6: #e5d94f;
    --c7: #b4b5b9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 14px; }
header { padding-top: 20px; }
h1 { font-size: 1.45rem; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.02rem; margin: 0 0 8px; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px;
  align-items: start; padding-bottom: 32px; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 14px; min-width: 0; }
.wide { grid-column: 1 / -1; }
p { color: var(--soft); font-size: .87rem; margin: 8px 0 0; }
.axis { margin: 0 0 2px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--text); }
svg .tick, svg .label { fill: var(--soft); }
svg .tick, svg .label, svg .value { text-anchor: middle; }
svg .tick[text-anchor="end"] { text-anchor: end; }
svg .value.strong { fill: var(--card); }
.grid { stroke: var(--grid); stroke-width: 1; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.dot { fill: currentColor; stroke: var(--card); stroke-width: 1; }
.band { fill: currentColor; fill-opacity: .16; }
.positive { fill: var(--c0); }
.negative { fill: var(--c4); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0; margin: 6px 0 0;
  font-size: .84rem; }
.key { display: inline-block; width: 20px; height: 0; border-top: 3px solid currentColor; margin-right: 6px;
  vertical-align: middle; }
.key.dashed { border-top-style: dashed; border-top-width: 2px; }
.key.diamond { width: 9px; height: 9px; border: 0; transform: rotate(45deg); background: currentColor; }
.key.swatch { width: 12px; height: 12px; border: 0; background: currentColor; }
@media (max-width: 520px) { svg text { font-size: 14px; } }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th { font-weight: 600; text-align: left; }
td, th { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
.facts th { font-weight: 400; color: var(--soft); width: 45%; }
.facts td { overflow-wrap: anywhere; }
.plan td, .plan tr:first-child th:nth-child(n+2) { text-align: right; white-space: nowrap; }
dl { margin: 0; }
dt { font-weight: 600; overflow-wrap: anywhere; }
dd { margin: 0 0 12px; }
code { font: .8rem ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.map { display: grid; grid-template-columns: auto minmax(0, 380px); gap: 4px; }
.map .ticks { display: flex; justify-content: space-between; font-size: .78rem; color: var(--soft); grid-column: 2; }
.map .ticks.down { flex-direction: column; grid-column: 1; text-align: right; }
.pixels { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 3px; display: block; }
figure { margin: 0 0 14px; }
figure img { max-width: 100%; display: block; border-radius: 4px; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: 4px; }
""" + "".join(f".c{n} {{ color: var(--c{n}); }}\n" for n in range(8))
