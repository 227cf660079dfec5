/** The image of the conversation: choosing it, showing it, and what is drawn over it. */

import { byId, element } from "./dom.js";
import { RegionFrame } from "./frame.js";
import { describeSize, readImage, watchDrops, watchPastes, watchPicker } from "./image.js";
import { drawMarks, lightOnHover } from "./overlay.js";
import { keepImage } from "./store.js";

/** Images whose longer side is smaller are shown pixel by pixel. */
const TINY = 160;

export class Plate {
  /**
   * `mayChange(name)` resolves to whether an image of this name, null for none, may take the place of the present one.
   * `onChange()` follows; `onRegion(text)` is called for a region that the user marked, `notify(text)` for a problem.
   */
  constructor({ mayChange, onChange, onRegion, notify }) {
    Object.assign(this, { mayChange, onChange, notify });
    this.image = null;
    this.frame = new RegionFrame(
      {
        stage: byId("stage"),
        frame: byId("frame"),
        button: byId("mark-region"),
        help: byId("frame-help"),
        announcer: byId("action-announcer"),
      },
      onRegion,
    );
    this.listen();
  }

  listen() {
    const take = (files) => this.take(files);
    watchDrops(byId("mat"), take);
    watchPastes(take);
    watchPicker([byId("pick"), byId("replace")], byId("pick-file"), take);
    watchPicker([byId("camera")], byId("camera-file"), take);
    byId("remove").addEventListener("click", () => this.remove());
    byId("hide-marks").addEventListener("click", () => this.toggleMarks());
    lightOnHover(byId("stage"));
  }

  /** Show the image part, or not: text-only models have none. */
  enable(isEnabled) {
    byId("plate").hidden = !isEnabled;
  }

  get isEnabled() {
    return !byId("plate").hidden;
  }

  async take(files) {
    if (!this.isEnabled) return this.notify("This model reads text only; it takes no image.");
    const [file] = files;
    if (!file) return this.notify("Drop an image file: images are not fetched from other places.");
    try {
      const image = await readImage(file);
      if (!(await this.mayChange(image.name))) return;
      const isKept = this.set(image);
      if (files.length > 1) this.notify(`The model looks at one image: ${image.name} was taken, the others were not.`);
      if (!isKept) this.notify(`${image.name} is too large to be kept when this page is loaded anew.`);
    } catch (error) {
      this.notify(error.message);
    }
  }

  async remove() {
    if (!(await this.mayChange(null))) return;
    this.set(null);
    byId("pick").focus();
  }

  /** Show `image`, or the invitation to add one. Returns whether a reload will bring it back. */
  set(image) {
    this.image = image;
    byId("invite").hidden = image !== null;
    byId("stage").hidden = image === null;
    byId("caption").hidden = image === null;
    byId("mat").classList.toggle("filled", image !== null);
    if (image !== null) this.showImage(image);
    const isKept = keepImage(image);
    this.onChange();
    return isKept;
  }

  showImage(image) {
    const stage = byId("stage");
    stage.style.setProperty("--ratio", String(image.width / image.height));
    stage.classList.toggle("tiny", Math.max(image.width, image.height) < TINY);
    byId("image").src = image.dataUrl;
    byId("image").alt = `The image of this conversation, ${image.name}`;
    byId("image-name").textContent = image.name;
    byId("image-size").textContent = describeSize(image);
    this.frame.setImage(image);
  }

  /** Invite the user to choose the file that a restored or loaded conversation is about; null: any image. */
  expect(name) {
    byId("invite-lead").replaceChildren(
      ...(name === null ? ["Add an image"] : ["This conversation is about ", element("strong", {}, name), ": add it"]),
    );
  }

  /** Draw the marks of a turn {id, marks, asked}; they stay until those of another turn are shown. */
  showMarks(turn) {
    if (this.image === null) return;
    drawMarks(byId("overlay"), byId("badges"), turn, this.image);
    byId("hide-marks").hidden = !turn.marks.length && !turn.asked.length;
  }

  toggleMarks() {
    const hide = byId("hide-marks").getAttribute("aria-pressed") !== "true";
    byId("hide-marks").setAttribute("aria-pressed", String(hide));
    byId("stage").classList.toggle("bare", hide);
  }
}
