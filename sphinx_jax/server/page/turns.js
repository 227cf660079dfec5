/** How one question and its answer look. */

import { button, element } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { colourClass, markKey, regionsOf } from "./overlay.js";
import { MARK, markOf, withoutUnfinished } from "./regions.js";

/** Why an answer ended, by OpenAI's finish_reason. */
const FINISH = { stop: "ended by the model", length: "cut at the limit of tokens" };

export class TurnView {
  /** `actions` has copy(turn), show(turn), and for the last turn regenerate(), edit() and undo(). */
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.marks = [];
    this.heading = element("h2", { className: "question" }, turn.question);
    this.answer = element("div", { className: "answer" });
    this.legend = element("ul", { className: "legend", "aria-label": "Regions" });
    this.footer = element("div", { className: "turn-footer" });
    this.root = element("li", { className: "turn" }, this.heading, this.answer, this.legend, this.footer);
    this.update(false);
  }

  /** Follow the turn's state. `isLast`: it can be regenerated, edited and undone. */
  update(isLast) {
    const { status, answer } = this.turn;
    this.root.dataset.status = status;
    this.answer.setAttribute("aria-busy", String(status === "streaming"));
    this.marks = [];
    const text = status === "streaming" ? withoutUnfinished(answer) : answer;
    this.answer.replaceChildren(renderMarkdown(text.trim(), (plain) => this.inline(plain)), ...this.ending());
    this.legend.replaceChildren(...regionsOf(this.turn.id, this.marks).map((region) => this.legendRow(region)));
    this.legend.hidden = !this.marks.length;
    this.footer.replaceChildren(...(status === "streaming" ? [] : [this.statistics(), this.buttons(isLast)]));
  }

  /** What stands after the text: the waiting mark, the error. */
  ending() {
    const { status, error } = this.turn;
    if (status === "streaming") return [element("span", { className: "caret" }, element("span", { className: "visually-hidden" }, "Answering"))];
    return status === "failed" ? [element("p", { className: "error" }, error)] : [];
  }

  /** Nodes of a text in which regions become linked names. */
  inline(text) {
    const nodes = [];
    let end = 0;
    for (const match of text.matchAll(MARK)) {
      const mark = markOf(match);
      if (!mark.groups.length) continue;
      nodes.push(text.slice(end, match.index), this.name(mark, match[0]));
      end = match.index + match[0].length;
    }
    return [...nodes, text.slice(end)];
  }

  name(mark, raw) {
    const index = this.marks.push(mark) - 1;
    const label = mark.name ? element("span", { className: "name-text" }, mark.name) : element("span", { className: "name-text bare" }, raw);
    const made = element(
      "span",
      { className: `name ${colourClass(mark, index)}`, "data-mark": markKey(this.turn.id, index) },
      label,
      element("sup", { className: "name-number" }, String(index + 1)),
    );
    // Before the list's own listener, which lights what is drawn.
    made.addEventListener("pointerover", () => this.actions.show(this.turn));
    return made;
  }

  legendRow({ mark, group, key, label, colour }) {
    const row = element(
      "button",
      { type: "button", className: `legend-row ${colour}`, "data-mark": key },
      element("span", { className: "legend-number" }, label),
      " ",
      element("span", { className: "legend-name" }, mark.name || (group.length === 4 ? "box" : "point")),
      " ",
      element("span", { className: "legend-numbers" }, group.map((number) => number.toFixed(3)).join(", ")),
    );
    for (const type of ["pointerover", "focus", "click"]) row.addEventListener(type, () => this.actions.show(this.turn));
    return element("li", {}, row);
  }

  statistics() {
    const { status, statistics = {} } = this.turn;
    const { tokens, firstToken, seconds, finish } = statistics;
    const parts = [];
    if (tokens) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
    if (tokens > 1 && seconds > 0) parts.push(`${significant((tokens - 1) / seconds)} tokens/s`);
    if (firstToken) parts.push(`first token after ${duration(firstToken)}`);
    if (status === "stopped") parts.push("stopped by you");
    if (finish) parts.push(`${FINISH[finish] ?? "ended"} (${finish})`);
    return element("p", { className: "statistics" }, parts.join(" · "));
  }

  buttons(isLast) {
    const { copy, regenerate, edit, undo } = this.actions;
    const made = element("p", { className: "turn-actions" });
    if (this.turn.answer) {
      const copied = button("Copy", "quiet", async () => {
        copied.textContent = (await copy(this.turn)) ? "Copied" : "Not copied";
      });
      made.append(copied);
    }
    if (isLast) {
      made.append(
        button(this.turn.status === "failed" ? "Try again" : "Regenerate", "quiet", regenerate),
        button("Edit", "quiet", edit),
        button("Undo", "quiet", undo),
      );
    }
    return made;
  }
}

function duration(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${significant(seconds)} s`;
}

/** Three significant digits, without an exponent. */
function significant(number) {
  return number >= 100 ? number.toFixed(0) : Number(number.toPrecision(3)).toString();
}
