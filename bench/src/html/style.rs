//! How the report looks. Colours of contestants differ in lightness as well as in hue, and markers and dashes tell them apart
//! where colours do not.

/// The style sheet.
pub(super) const CSS: &str = "
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #16191d; --soft: #59616c; --rule: #d9dde3; --grid: #e6e9ee;
  --warn: #8a4b00; --warn-paper: #fff4e0;
  --c0: #6a727d; --c1: #0a58ca; --c2: #0b9aa8; --c3: #d4480c; --c4: #a8168f; --c5: #6d7a00; --c6: #7440d6; --c7: #9a5b1e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e8ebef; --soft: #9fa8b4; --rule: #363c45; --grid: #2a3038;
    --warn: #ffc876; --warn-paper: #35270f;
    --c0: #9aa3af; --c1: #62a5ff; --c2: #3fd0d8; --c3: #ff8f57; --c4: #f47edc; --c5: #c4d345; --c6: #b497ff; --c7: #dba36a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; }
h2 { font-size: 21px; line-height: 1.3; margin: 48px 0 4px; }
h3 { font-size: 15px; margin: 0 0 8px; }
.over { margin: 0; color: var(--soft); font-weight: 600; }
.sub { margin: 4px 0 0; color: var(--soft); }
.warning { background: var(--warn-paper); color: var(--warn); padding: 10px 14px; border-radius: 8px; margin: 20px 0 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 16px 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: 8px; }
.legend svg { width: 34px; height: 14px; flex: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 16px; margin: 16px 0; }
figure { margin: 0; background: var(--card); border-radius: 10px; padding: 14px 16px 10px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
figcaption small { font-weight: 400; color: var(--soft); font-size: 13px; }
figure svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg text.value { fill: var(--ink); }
svg text.name { fill: var(--ink); }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.whisker { stroke-width: 1.5; opacity: .75; }
.point { stroke: var(--card); stroke-width: 1.5; }
.dashed { stroke-dasharray: 5 4; }
.dotted { stroke-dasharray: 1.5 3.5; stroke-linecap: round; }
.k0 { --k: var(--c0); } .k1 { --k: var(--c1); } .k2 { --k: var(--c2); } .k3 { --k: var(--c3); }
.k4 { --k: var(--c4); } .k5 { --k: var(--c5); } .k6 { --k: var(--c6); } .k7 { --k: var(--c7); }
.stroke { stroke: var(--k); } .fill { fill: var(--k); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--rule); vertical-align: bottom; }
th.left, td.left { text-align: left; }
table.facts { width: auto; }
table.facts td { vertical-align: top; }
td small { display: block; color: var(--soft); }
tbody tr.first td { border-top: 1px solid var(--rule); }
td.soft { color: var(--soft); }
td.wide { white-space: normal; overflow-wrap: anywhere; min-width: 16em; }
ul.plain { padding-left: 20px; margin: 8px 0; }
p.note, ul.note { color: var(--soft); font-size: 13px; margin: 8px 0; }
ul.note { padding-left: 18px; }
details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border-radius: 8px; padding: 10px 14px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: 8px 0; }
@media print { main { max-width: none; padding: 0; } figure { break-inside: avoid; } }
";
