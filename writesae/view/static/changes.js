"use strict";
/* What is done to writes: a line per change, with its amount as a number and as a slider. */

(() => {
  const { el, byId, live } = AtomPage;

  const WORDS = {
    delete: (atom) => (atom === null ? ["writes nothing"] : ["without its share of atom ", live.link(atom)]),
    scale: (atom) => (atom === null ? ["its write times"] : ["its share of atom ", live.link(atom), " times"]),
    replace: (atom) => ["writes atom ", live.link(atom), " instead, at"],
    add: (atom) => ["writes atom ", live.link(atom), " as well, at"],
  };

  /** Where the slider begins and ends: around 1 for factors, around what the token writes anyhow for coefficients. */
  function range(change) {
    if (change.op === "scale") return [-2, 4];
    const size = Math.max(live.tokens[change.position].norm, live.coefficient(change.position, change.atom), Math.abs(change.amount) / 2, 1e-6);
    return [-2 * size, 2 * size];
  }

  function amount(change, index) {
    const [low, high] = range(change), what = change.op === "scale" ? "Factor" : "Coefficient";
    const name = `${what} at token ${change.position}${change.atom === null ? "" : `, atom ${change.atom}`}`;
    const slider = el("input", { type: "range", min: low, max: high, step: change.op === "scale" ? 0.05 : (high - low) / 200, "aria-label": `${name}, slider` });
    const field = el("input", { type: "number", step: "any", min: -1e6, max: 1e6, required: true, "aria-label": name });
    slider.value = change.amount;
    field.value = Number(change.amount.toPrecision(4));
    const use = (value, other) => {
      other.value = Number(value.toPrecision(4));
      live.change(live.changes.map((one, i) => (i === index ? { ...one, amount: value } : one)), false);
    };
    slider.addEventListener("input", () => use(Number(slider.value), field));
    field.addEventListener("change", () => field.reportValidity() && use(Number(field.value), slider));
    return [slider, field];
  }

  function line(change, index) {
    const words = el("span", { class: change.op === "delete" ? "plain" : "" },
      `Token ${change.position} `, live.chip(change.position), ...WORDS[change.op](change.atom));
    return el("li", {}, words, change.amount === null ? [] : amount(change, index),
      el("button", { type: "button", class: "small", "aria-label": `Undo the change of token ${change.position}`, title: "Undo", onclick: () => {
        live.change(live.changes.filter((_, i) => i !== index));
        byId(live.changes.length ? "live-undo" : "live-outcome").focus();
      } }, "✕"));
  }

  function draw() {
    const box = byId("live-changes");
    box.hidden = live.changes.length === 0;
    const reading = el("select", { id: "live-reading", onchange: (event) => {
      live.reading = event.target.value;
      live.measure();
    } }, el("option", { value: "in_recurrence" }, "from the token itself on"), el("option", { value: "cache" }, "from the next token on"));
    reading.value = live.reading;
    box.replaceChildren(
      el("div", { class: "with-legend" }, el("h3", { id: "live-changes-title" }, "Changes"),
        el("p", { class: "live-row" }, el("label", {}, "in effect ", reading),
          el("button", { type: "button", class: "quiet", id: "live-undo", onclick: () => {
            live.change([]);
            byId("live-outcome").focus();
          } }, "Undo all"))),
      el("ol", { class: "changes" }, live.changes.map(line)));
  }

  AtomPage.on("live-changes", draw);
})();
