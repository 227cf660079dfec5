/** A region that the user marks on the image, by dragging or by keyboard. */

import { announce } from "./dom.js";
import { formatRegion, toFractions } from "./regions.js";

/** A drag of fewer pixels on the screen is a click. */
const LEAST_DRAG = 5;

/** Steps of the arrow keys, as fractions of the image's longer side. */
const STEP = 0.02;
const FINE_STEP = 0.001;

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class RegionFrame {
  /** `onRegion(text)` is called with "[x1, y1, x2, y2]" whenever a region is complete. */
  constructor({ stage, frame, button, help, announcer }, onRegion) {
    Object.assign(this, { stage, frame, button, help, announcer, onRegion });
    this.size = null;
    this.box = null;
    button.addEventListener("click", () => this.setActive(!this.isActive));
    frame.addEventListener("keydown", (event) => this.onKey(event));
    stage.addEventListener("pointerdown", (event) => this.onPointerDown(event));
  }

  /** Whether the button is pressed: fingers draw instead of scrolling, and the keyboard moves the frame. */
  get isActive() {
    return this.button.getAttribute("aria-pressed") === "true";
  }

  /** Marks refer to an image of `size` {width, height} pixels from now on. */
  setImage(size) {
    this.size = size;
    this.setActive(false);
    this.hide();
  }

  setActive(active) {
    this.button.setAttribute("aria-pressed", String(active));
    this.help.hidden = !active;
    this.stage.classList.toggle("drawing", active);
    if (!active) return;
    const { width, height } = this.size;
    this.show(this.box ?? [0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]);
    this.frame.focus({ preventScroll: true });
  }

  get text() {
    return formatRegion(toFractions(this.box, this.size));
  }

  show(box) {
    const { width, height } = this.size;
    this.box = box;
    this.frame.hidden = false;
    const [left, top, right, bottom] = box.map((pixel, i) => (pixel / (i % 2 ? height : width)) * 100);
    Object.assign(this.frame.style, {
      left: `${left}%`,
      top: `${top}%`,
      width: `${right - left}%`,
      height: `${bottom - top}%`,
    });
  }

  hide() {
    this.box = null;
    this.frame.hidden = true;
  }

  finish() {
    this.setActive(false);
    this.onRegion(this.text);
  }

  onKey(event) {
    const arrow = ARROWS[event.key];
    if (arrow) this.move(arrow, event);
    else if (event.key === "Enter") this.finish();
    else if (event.key === "Escape") this.leave();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  leave() {
    this.setActive(false);
    this.hide();
    this.button.focus();
  }

  move([right, down], { shiftKey, altKey }) {
    const { width, height } = this.size;
    const step = (altKey ? FINE_STEP : STEP) * Math.max(width, height);
    const [x1, y1, x2, y2] = this.box;
    if (shiftKey) {
      this.show([x1, y1, clamp(x2 + right * step, x1 + 1, width), clamp(y2 + down * step, y1 + 1, height)]);
    } else {
      const dx = clamp(right * step, -x1, width - x2);
      const dy = clamp(down * step, -y1, height - y2);
      this.show([x1 + dx, y1 + dy, x2 + dx, y2 + dy]);
    }
    announce(this.announcer, this.text);
  }

  onPointerDown(event) {
    if (event.button !== 0 || (event.pointerType === "touch" && !this.isActive)) return;
    const before = this.box;
    const from = this.pixelAt(event);
    const move = (moved) => {
      if (distance(event, moved) < LEAST_DRAG) return;
      // Not before: a click would be the stage's, not that of what is drawn there.
      this.stage.setPointerCapture(event.pointerId);
      this.show(spanned(from, this.pixelAt(moved)));
    };
    const end = (ended) => {
      document.removeEventListener("pointermove", move);
      document.removeEventListener("pointerup", end);
      document.removeEventListener("pointercancel", end);
      if (ended.type === "pointercancel") this.restore(before);
      else if (distance(event, ended) >= LEAST_DRAG) this.finish();
    };
    document.addEventListener("pointermove", move);
    document.addEventListener("pointerup", end);
    document.addEventListener("pointercancel", end);
  }

  restore(box) {
    if (box) this.show(box);
    else this.hide();
  }

  /** The pixel of the image under the pointer. */
  pixelAt({ clientX, clientY }) {
    const { left, top, width, height } = this.stage.getBoundingClientRect();
    return [
      clamp(((clientX - left) / width) * this.size.width, 0, this.size.width),
      clamp(((clientY - top) / height) * this.size.height, 0, this.size.height),
    ];
  }
}

function spanned([ax, ay], [bx, by]) {
  return [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];
}

function distance(a, b) {
  return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
}

function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}
