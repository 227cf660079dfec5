"""The page around a report: head, policy and style. Its colours follow the reader's light or dark scheme."""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --text: #1d2126; --dim: #5c6570; --line: #dfe3e8;
  --more: 24 95 165; --less: 178 84 16; --right: #1a7f45; --wrong: #b3261e; --strong: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2025; --text: #e6e9ec; --dim: #9aa4af;
  --line: #323941; --more: 92 168 240; --less: 240 150 80; --right: #5fca8c; --wrong: #f08a80; --strong: #0d1013; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 64px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 8px; } h2 { font-size: 20px; margin: 40px 0 8px; }
h3 { font-size: 16px; margin: 20px 0 0; } p { margin: 4px 0 10px; color: var(--dim); }
header dl { display: flex; flex-wrap: wrap; gap: 6px 24px; margin: 0; }
dt { color: var(--dim); font-size: 12px; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; } th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); }
td:nth-child(n+3):not(:last-child), th:nth-child(n+3):not(:last-child) { text-align: right; white-space: nowrap; }
tr.error td { color: var(--wrong); }
.maps { display: flex; flex-wrap: wrap; gap: 24px; } figure { margin: 0; flex: 1 1 300px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 4px; }
.heat { font-size: 12px; table-layout: fixed; min-width: 300px; } .heat th { font-weight: 400; color: var(--dim); }
.heat th, .heat td, .heat td:nth-child(n+3):not(:last-child), .heat th:nth-child(n+3):not(:last-child) {
  padding: 3px 2px; text-align: center; border: 1px solid var(--page); }
.heat td { background: rgb(var(--more) / var(--s)); } .heat td.less { background: rgb(var(--less) / var(--s)); }
.heat td.strong { color: var(--strong); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
article { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--wrong);
  border-radius: 6px; padding: 10px; min-width: 0; } article.right { border-top-color: var(--right); }
article svg { display: block; width: 100%; max-height: 240px; background: var(--page); border-radius: 4px; }
article .question { color: var(--text); white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12em;
  overflow-y: auto; }
article dl { margin: 0; } article dl div { display: grid; grid-template-columns: 62px 1fr; gap: 6px; }
article footer { color: var(--dim); font-size: 12px; margin-top: 6px; }
.none { display: grid; place-items: center; height: 90px; background: var(--page); color: var(--dim); font-size: 13px;
  border-radius: 4px; }
rect { fill: none; stroke-width: 2.5; vector-effect: non-scaling-stroke; filter: drop-shadow(0 0 1px #000); }
rect.truth { stroke: #22c55e; }
rect.answer { stroke: #f97316; stroke-dasharray: 6 4; }
ul { margin: 0; padding-left: 20px; overflow-wrap: anywhere; }
"""

PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Evaluation</title>
<style>{_STYLE}</style>
</head>
<body>
{{body}}
</body>
</html>
"""
"""Holds {body} where the sections go."""
