/** The conversation on the page: its turns, and the answer that is arriving. */

import { announce, byId } from "./dom.js";
import { toMessages } from "./conversation.js";
import { parseMarks } from "./regions.js";
import { streamAnswer } from "./server.js";
import { TurnView } from "./turns.js";

export class Talk {
  /**
   * `onChange()` follows every change of the turns but the pieces of an answer; `onMarks(turn)` shows the marks
   * {id, marks, asked} of one; `onFailure(error)` is told of the requests that fail; `edit()` lets the user edit the last question.
   */
  constructor({ onChange, onMarks, onFailure, edit, undo }) {
    Object.assign(this, { onChange, onMarks, onFailure });
    this.turns = [];
    this.views = new Map();
    this.running = null;
    this.nextId = 1;
    this.pane = byId("turns");
    this.wasAtEnd = true;
    this.keepEnd();
    this.actions = {
      copy: (turn) => this.copy(turn),
      show: (turn) => turn.id !== this.shownId && this.showMarks(turn),
      regenerate: () => this.regenerate(),
      edit,
      undo,
    };
  }

  get isBusy() {
    return this.running !== null;
  }

  get last() {
    return this.turns.at(-1) ?? null;
  }

  /** Replace all turns, as when a conversation is restored, loaded or cleared. */
  set(turns) {
    this.turns = turns.map((turn) => ({ ...turn, id: this.nextId++ }));
    this.render();
    this.showLastMarks();
    this.scrollToEnd();
    this.onChange();
  }

  /** Ask for the last answer once more, with the question and parameters of then and now. */
  regenerate() {
    const { question } = this.last;
    this.turns.pop();
    return this.ask(question, this.request);
  }

  /** Ask `question`; `request()` gives {dataUrl, parameters} when the question is sent. */
  async ask(question, request) {
    this.request = request;
    const { dataUrl, parameters } = request();
    const body = { messages: toMessages(this.turns, question, dataUrl), ...parameters };
    const turn = { id: this.nextId++, question, answer: "", status: "streaming" };
    this.turns.push(turn);
    this.running = new AbortController();
    byId("announcer").textContent = "";
    this.render();
    this.scrollToEnd();
    this.onChange();
    await this.receive(turn, body);
    this.running = null;
    this.follow(() => this.render());
    announce(byId("announcer"), this.views.get(turn).answer.textContent);
    this.onChange();
  }

  /** Stream the answer into `turn`, and note how it ended. */
  async receive(turn, body) {
    try {
      const result = await streamAnswer(body, this.running.signal, (delta) => this.append(turn, delta));
      turn.statistics = { ...result, tokens: result.usage?.completion_tokens };
      turn.status = "complete";
    } catch (error) {
      const isStop = error.name === "AbortError";
      turn.status = isStop ? "stopped" : "failed";
      if (isStop) return;
      turn.error = error.message;
      this.onFailure(error);
    }
  }

  /** Add a piece; what arrives within a frame is drawn together. */
  append(turn, delta) {
    turn.answer += delta;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (turn.status === "streaming") this.follow(() => this.updateView(turn));
    });
  }

  updateView(turn) {
    const view = this.views.get(turn);
    view.update(turn === this.last);
    this.showMarks(turn);
  }

  async copy(turn) {
    const isCopied = await copyText(turn.answer);
    announce(byId("action-announcer"), isCopied ? "Copied" : "Not copied");
    return isCopied;
  }

  stop() {
    this.running?.abort();
  }

  /** Bring the list in line with the turns. Elements of turns that stay are kept, and with them focus and selection. */
  render() {
    const views = new Map(this.turns.map((turn) => [turn, this.views.get(turn) ?? new TurnView(turn, this.actions)]));
    for (const [turn, view] of this.views) if (!views.has(turn)) view.root.remove();
    this.views = views;
    for (const [turn, view] of views) {
      view.update(turn === this.last);
      if (!view.root.isConnected) byId("turn-list").append(view.root);
    }
    byId("empty").hidden = this.turns.length > 0;
    if (this.last) this.showMarks(this.last);
  }

  /** The marks of the last turn that has any. */
  showLastMarks() {
    const turn = this.turns.findLast((candidate) => this.views.get(candidate).marks.length);
    if (turn) this.showMarks(turn);
    else this.onMarks({ id: 0, marks: [], asked: [] });
  }

  showMarks(turn) {
    this.shownId = turn.id;
    this.onMarks({ id: turn.id, marks: this.views.get(turn).marks, asked: parseMarks(turn.question) });
  }

  /** Keep the end in sight when a panel below takes room. */
  keepEnd() {
    this.pane.addEventListener("scroll", () => {
      this.wasAtEnd = this.isAtEnd;
    });
    new ResizeObserver(() => this.wasAtEnd && this.scrollToEnd()).observe(this.pane);
  }

  get isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = scrollerOf(this.pane);
    return scrollHeight - scrollTop - clientHeight < 60;
  }

  /** Change the page, and keep its end in sight if it was. */
  follow(change) {
    const { isAtEnd } = this;
    change();
    if (isAtEnd) this.scrollToEnd();
  }

  /** Scroll to the end, but not past the last question: a long answer is read from its beginning. */
  scrollToEnd() {
    if (!this.last) return;
    const scroller = scrollerOf(this.pane);
    const question = this.views.get(this.last).root.getBoundingClientRect().top - upperEdge(this.pane);
    scroller.scrollTop = Math.min(scroller.scrollHeight, scroller.scrollTop + question - MARGIN);
  }
}

/** Pixels above the last question. */
const MARGIN = 12;

/** Where the conversation's visible part begins: on phones below the image, if that stays. */
function upperEdge(pane) {
  if (scrollerOf(pane) === pane) return pane.getBoundingClientRect().top;
  const plate = byId("plate");
  return getComputedStyle(plate).position === "sticky" ? plate.offsetHeight : 0;
}

/** On wide screens the conversation scrolls, on phones the page. */
function scrollerOf(pane) {
  return getComputedStyle(pane).overflowY === "auto" ? pane : document.scrollingElement;
}

/** Whether the text is on the clipboard now. Without HTTPS only the older way exists. */
async function copyText(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}
