"""The style sheet of the page of a comparison, for light and dark screens and for paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b2430; --soft: #5c6675; --line: #dde1e7;
  --plain: #a7b1bf; --merge: #6f9be8; --best: #2456c4; --goal: #c2571a; --whisker: #1b2430;
  --heat: #1f57b8; --on-heat: #ffffff; --on-middle: #1b2430;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --panel: #1a2029; --ink: #e6eaf0; --soft: #98a3b3; --line: #2c3542;
    --plain: #55606f; --merge: #4673bf; --best: #86b0ff; --goal: #f0955a; --whisker: #e6eaf0;
    --heat: #8fb6ff; --on-heat: #0d1524; --on-middle: #0d1524;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
header p { color: var(--soft); margin: 0; max-width: 46rem; }
section { margin-top: 2.4rem; }
.key { color: var(--soft); font-size: .85rem; margin: -.3rem 0 .6rem; display: flex; align-items: center; gap: .5rem; }
.goal-key { width: 1.4rem; border-top: 2px dashed var(--goal); }
.ramp { width: 9rem; height: .7rem; border-radius: 2px; background: linear-gradient(90deg, var(--panel), var(--heat)); }
svg.bars { display: block; max-width: 100%; height: auto; font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg text { fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 11px; }
svg text.best { font-weight: 650; }
svg .grid { stroke: var(--line); }
svg rect.plain { fill: var(--plain); }
svg rect.merge { fill: var(--merge); }
svg rect.best { fill: var(--best); }
svg .curve { fill: none; stroke: var(--merge); stroke-width: 2; }
svg .dot { fill: var(--best); }
svg .whisker { stroke: var(--whisker); stroke-width: 1.2; opacity: .6; }
svg .goal { stroke: var(--goal); stroke-width: 1.5; stroke-dasharray: 5 4; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem .9rem .4rem; background: var(--panel); border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
.unit { color: var(--soft); font-weight: 400; font-size: .82rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: right; white-space: nowrap; }
th[scope=row] { text-align: left; }
table.numbers { width: 100%; font-size: .9rem; }
.numbers th, .numbers td { padding: .32rem .55rem; text-align: right; white-space: nowrap; }
.numbers th[scope=row] { text-align: left; padding-left: 0; }
.numbers thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; font-weight: 600; }
.numbers thead .unit { display: block; }
.numbers tr.first > * { border-top: 1px solid var(--line); }
.numbers .best { font-weight: 700; color: var(--best); }
.numbers td { position: relative; }
.near { position: absolute; right: -.35rem; color: var(--soft); }
table.heat { border-spacing: 3px; border-collapse: separate; margin-left: -3px; }
.heat th { padding: .2rem .6rem; }
.heat thead th { text-align: center; }
.heat td {
  min-width: 5.2rem; height: 2.5rem; text-align: center; border-radius: 4px; color: var(--ink);
  background: color-mix(in oklab, var(--heat) var(--share, 0%), var(--panel));
}
.heat td.strong { color: var(--on-heat); }
.heat td.middle { color: var(--on-middle); }
.heat td.empty { color: var(--soft); }
ul { color: var(--soft); padding-left: 1.2rem; }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""
