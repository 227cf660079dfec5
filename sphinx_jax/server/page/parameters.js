/** The sampling parameters of the next questions. They begin as the server's defaults. */

const NAMES = ["temperature", "top_p", "max_tokens", "seed"];

export class Parameters {
  /** `form` has a number field for each name; `summary` shows what is not the default; `onChange()` follows an edit. */
  constructor(form, summary, onChange) {
    this.form = form;
    this.summary = summary;
    this.defaults = {};
    form.addEventListener("input", () => {
      this.summarise();
      onChange();
    });
    // Enter in a field is no reason to reload the page.
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Fill in the server's defaults, and over them what the user had set before a reload. */
  setDefaults(defaults, changed = {}) {
    this.defaults = Object.fromEntries(NAMES.map((name) => [name, defaults[name] ?? null]));
    this.fill({ ...this.defaults, ...changed });
  }

  restoreDefaults() {
    this.fill(this.defaults);
  }

  fill(values) {
    for (const name of NAMES) this.form.elements[name].value = values[name] ?? "";
    this.summarise();
  }

  /** The values by name; those of empty fields are left out, and are the server's choice. */
  values() {
    const filled = NAMES.filter((name) => this.form.elements[name].value !== "");
    return Object.fromEntries(filled.map((name) => [name, Number(this.form.elements[name].value)]));
  }

  /** What differs from the defaults; null where a field was emptied. */
  changes() {
    const values = this.values();
    const changed = NAMES.filter((name) => (values[name] ?? null) !== this.defaults[name]);
    return Object.fromEntries(changed.map((name) => [name, values[name] ?? null]));
  }

  /** The first field that holds no valid number, or null. */
  invalidField() {
    return NAMES.map((name) => this.form.elements[name]).find((field) => !field.checkValidity()) ?? null;
  }

  summarise() {
    const changes = Object.entries(this.changes()).map(([name, value]) => `${name.replace("_", "-")} ${value ?? "unset"}`);
    this.summary.textContent = changes.join(", ");
    for (const name of NAMES) {
      const field = this.form.elements[name];
      field.setAttribute("aria-invalid", String(!field.checkValidity()));
    }
  }
}
