/**
 * A small Markdown to DOM nodes: paragraphs, headings, lists, fenced code, tables, bold, italic and code.
 *
 * The text is the model's and not trusted: it only ever becomes text nodes. HTML and links stay as they are written.
 * Tables are those of Markdown and of chart answers, whose rows may lack the outer bars and the rule.
 */

import { element } from "./dom.js";

const FENCE = /^\s*```/;
const HEADING = /^#{1,6}\s+(.*)$/;
const ITEM = /^\s*(?:[-*+•]|(\d{1,9})[.)])\s+(.*)$/;
const RULE = /^\s*\|?\s*:?-{2,}:?\s*(?:\|\s*:?-{2,}:?\s*)*\|?\s*$/;
const INLINE = /`([^`\n]+)`|\*\*(?=\S)([^]+?)\*\*|\*(?=[^\s*])([^*\n]+?)\*(?!\*)/g;

/** Line breaks of linearised charts: the token of a line feed as text, and " & " between rows. */
const LINE_FEED_TOKEN = /\s*<0x0A>\s*/g;

/** Nodes of `text`. `inline(text)` makes the nodes of what is not Markdown; by default a text node. */
export function renderMarkdown(text, inline = (plain) => [plain]) {
  const lines = text.replace(LINE_FEED_TOKEN, "\n").split("\n").flatMap(chartRows);
  const fragment = document.createDocumentFragment();
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [node, next] = block(lines, at, inline);
    fragment.append(node);
    at = next;
  }
  return fragment;
}

/** A whole table on one line, rows parted by " & ", as lines. */
function chartRows(line) {
  const rows = line.split(/\s&\s/);
  const widths = rows.map((row) => row.split("|").length);
  return rows.length > 1 && widths[0] > 1 && widths.every((width) => width === widths[0]) ? rows : [line];
}

/** The block that begins at line `at`, and the line after it. */
function block(lines, at, inline) {
  if (FENCE.test(lines[at])) return codeBlock(lines, at);
  const heading = lines[at].match(HEADING);
  if (heading) return [element("p", { className: "heading" }, ...spans(heading[1], inline)), at + 1];
  if (ITEM.test(lines[at])) return list(lines, at, inline);
  if (beginsTable(lines, at)) return table(lines, at, inline);
  return paragraph(lines, at, inline);
}

function codeBlock(lines, at) {
  let end = at + 1;
  while (end < lines.length && !FENCE.test(lines[end])) end += 1;
  const code = element("code", {}, lines.slice(at + 1, end).join("\n"));
  return [element("pre", { tabIndex: 0 }, code), end + 1];
}

function list(lines, at, inline) {
  const [, number] = lines[at].match(ITEM);
  const made = element(number === undefined ? "ul" : "ol");
  if (number !== undefined) made.start = Number(number);
  let next = at;
  for (; next < lines.length; next += 1) {
    const item = lines[next].match(ITEM);
    if (!item || (item[1] === undefined) !== (number === undefined)) break;
    made.append(element("li", {}, ...spans(item[2], inline)));
  }
  return [made, next];
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

/** Two lines with the same number of cells, at least two; or a header above Markdown's rule. */
function beginsTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|")) return false;
  if (RULE.test(lines[at + 1])) return true;
  return lines[at + 1].includes("|") && cells(lines[at]).length > 1 && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function table(lines, at, inline) {
  const header = cells(lines[at]);
  const body = element("tbody");
  let next = at + 1;
  for (; next < lines.length && lines[next].includes("|"); next += 1) {
    if (!RULE.test(lines[next])) body.append(row(cells(lines[next]), "td", header.length, inline));
  }
  const made = element("table", {}, element("thead", {}, row(header, "th", header.length, inline)), body);
  return [element("div", { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" }, made), next];
}

function row(texts, tag, width, inline) {
  const made = element("tr");
  for (let i = 0; i < Math.max(width, texts.length); i += 1) {
    const text = texts[i] ?? "";
    const cell = element(tag, { className: /^[-+−$€£]?[\d.,]+\s?%?$/.test(text) ? "number" : "" }, ...spans(text, inline));
    if (tag === "th") cell.scope = "col";
    made.append(cell);
  }
  return made;
}

function paragraph(lines, at, inline) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !startsBlock(lines, next)) next += 1;
  const made = element("p");
  made.append(...spans(lines.slice(at, next).join("\n"), inline));
  return [made, next];
}

function startsBlock(lines, at) {
  return FENCE.test(lines[at]) || HEADING.test(lines[at]) || ITEM.test(lines[at]) || beginsTable(lines, at);
}

/** Bold, italic and code of one block; `inline` makes the rest. */
function spans(text, inline) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(...inline(text.slice(end, match.index)));
    const [, code, bold, italic] = match;
    if (code !== undefined) nodes.push(element("code", {}, code));
    else nodes.push(element(bold === undefined ? "em" : "strong", {}, ...inline(bold ?? italic)));
    end = match.index + match[0].length;
  }
  return [...nodes, ...inline(text.slice(end))];
}
