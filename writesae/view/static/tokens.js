"use strict";
/* The tokens of the prompt, shaded, and under them the one that is looked at: its write, and the atoms that fire there. */

(() => {
  const { el, byId, number, live } = AtomPage;
  const SHOWN = 10; // firings listed before "all"
  const shade = { by: "strongest", atom: 0 };
  let every = false; // whether all firings are listed

  const coefficientOf = (token, atom) => (token.atoms.find(([one]) => one === atom) || [atom, 0])[1];
  live.coefficient = (position, atom) => coefficientOf(live.tokens[position], atom);

  const weight = (token) => {
    if (shade.by === "norm") return token.norm;
    return shade.by === "atom" ? coefficientOf(token, shade.atom) : token.atoms.length ? token.atoms[0][1] : 0;
  };

  /** A token as text; one whose character ends in a later token has none of its own. */
  live.word = (text) => text || "⋯";
  live.chip = (position) => AtomPage.chip(live.word(live.tokens[position].text));

  // --- the line -----------------------------------------------------------------------------------------------------

  function facts(token, position) {
    const list = token.atoms.slice(0, 4).map(([atom, value]) => [`atom ${atom}`, number(value)]);
    const kl = live.outcome && live.outcome.first !== null && position >= live.outcome.first ? [["KL after it", nats(live.outcome.kl[position])]] : [];
    const part = token.text ? [] : [["part of a character", ""]];
    return [["position", String(position)], ...part, ...list, ["size of the write", number(token.norm)], ...kl];
  }

  const FLOOR = 1e-9; // below it there is only rounding
  const nats = (live.nats = (kl) => (kl < FLOOR ? `< ${number(FLOOR)}` : number(kl)));

  function drawLine() {
    const tokens = live.tokens.map((token) => ({ ...token, text: live.word(token.text), source: token, weight: weight(token) }));
    const largest = Math.max(...tokens.map((token) => token.weight), 0);
    const line = AtomPage.passage(tokens, {
      largest, at: live.selected, label: "Tokens of the prompt", facts: (token, index) => facts(token.source, index),
    });
    line.setAttribute("role", "listbox");
    line.querySelectorAll(".tok").forEach((node, index) => {
      node.dataset.index = index;
      node.setAttribute("role", "option");
      const [strongest] = live.tokens[index].atoms;
      node.setAttribute("aria-label", `${node.dataset.spoken}, token ${index}, ${strongest ? `strongest atom ${strongest[0]} at ${number(strongest[1])}` : "no atom"}`);
    });
    byId("live-line").replaceChildren(line);
    byId("live-legend").replaceChildren(
      el("span", {}, "0"), el("span", { class: "ramp", "aria-hidden": "true" }), el("span", {}, number(largest)),
      el("span", { class: "framed" }, "looked at"), el("span", { class: "kl-ramp", "aria-hidden": "true" }), el("span", { id: "live-kl-legend" }));
    markSelected();
    markOutcome();
  }

  const nodes = () => [...byId("live-line").querySelectorAll(".tok")];

  function markSelected() {
    nodes().forEach((node, index) => {
      const here = index === live.selected;
      node.classList.toggle("at", here);
      node.setAttribute("aria-selected", String(here));
      node.tabIndex = here ? 0 : -1;
    });
  }

  function markOutcome() {
    const outcome = live.outcome, kl = outcome && outcome.first !== null ? outcome.kl : [];
    const largest = Math.max(...kl, FLOOR), places = new Set(live.changes.map((change) => change.position));
    nodes().forEach((node, index) => {
      const strength = outcome && index >= outcome.first && kl.length ? Math.max(0, kl[index] / largest) : 0;
      node.style.setProperty("--k", strength.toFixed(3));
      node.classList.toggle("changed", places.has(index));
    });
    const most = kl.length ? `what follows moves by up to ${nats(Math.max(...kl))} nats` : "how far a change moves what follows";
    byId("live-kl-legend").textContent = most;
  }

  const tokenOf = (event) => (event.target instanceof Element ? event.target.closest("#live-line .tok") : null);
  byId("live-line").addEventListener("click", (event) => {
    const node = tokenOf(event);
    if (node) live.select(Number(node.dataset.index));
  });
  byId("live-line").addEventListener("keydown", (event) => {
    const node = tokenOf(event);
    if (!node || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    live.select(Number(node.dataset.index));
  });

  // --- the token that is looked at ----------------------------------------------------------------------------------

  const small = (label, name, act) => el("button", { type: "button", class: "small", "aria-label": name, title: name, onclick: act }, label);

  /** A link to an atom of the page. */
  live.link = (atom) => el("a", { href: AtomPage.address({ atom }), class: "live-atom", "data-atom": atom, title: `Open atom ${atom}` }, String(atom));

  function firing([atom, value], largest, position) {
    const at = { position, atom, amount: null };
    const chips = AtomPage.listOf("fires_on", atom).slice(0, 3).map(([word]) => AtomPage.chip(AtomPage.words.text[word]));
    return el("tr", { "data-atom": atom },
      el("th", { scope: "row" }, live.link(atom)),
      el("td", { class: "c-chips" }, el("div", { class: "chips" }, chips)),
      el("td", { class: "size" }, el("div", {},
        el("span", { class: "track plus", "aria-hidden": "true" }, el("span", { class: "fill", "--w": `${(100 * value) / largest}%` })),
        el("span", { class: "value" }, number(value)))),
      el("td", { class: "does" },
        small("Replace", `Replace the write of token ${position} by atom ${atom}`, () => live.add({ ...at, op: "replace", amount: value })),
        small("Remove", `Take atom ${atom} out of the write of token ${position}`, () => live.add({ ...at, op: "delete" })),
        small("Scale", `Scale atom ${atom} in the write of token ${position}`, () => live.add({ ...at, op: "scale", amount: 2 }))));
  }

  function another(position) {
    const open = AtomPage.current(), n = AtomPage.live.about.n_atoms;
    const median = open === null ? NaN : AtomPage.table.median[open];
    const atom = el("input", { type: "number", id: "live-other", min: 0, max: n - 1, step: 1, value: open === null ? 0 : open, required: true });
    const amount = el("input", { type: "number", id: "live-amount", step: "any", value: Number((median > 0 ? median : live.tokens[position].norm).toPrecision(3)), required: true });
    const act = (op) => () => {
      if (atom.reportValidity() && amount.reportValidity()) live.add({ position, op, atom: Number(atom.value), amount: Number(amount.value) });
    };
    return el("div", { class: "live-row another", role: "group", "aria-label": "Any other atom" },
      el("label", {}, "any atom ", atom), el("label", {}, "at ", amount),
      small("Replace the write", "Replace the write by this atom", act("replace")), small("Add", "Write this atom as well", act("add")));
  }

  function drawToken() {
    const position = live.selected, token = live.tokens[position], largest = token.atoms.length ? token.atoms[0][1] : 1;
    const rows = every ? token.atoms : token.atoms.slice(0, SHOWN), whole = { position, atom: null, amount: null };
    const more = token.atoms.length - rows.length;
    byId("live-token").replaceChildren(
      el("div", { class: "token-head" },
        el("h3", { id: "live-token-title" }, `Token ${position} `, live.chip(position)),
        el("p", { class: "note" }, `writes ${number(token.norm)} in all; ${token.n_active} ${token.n_active === 1 ? "atom fires" : "atoms fire"}`),
        small("Delete write", `Delete the write of token ${position}`, () => live.add({ ...whole, op: "delete" })),
        small("Scale write", `Scale the write of token ${position}`, () => live.add({ ...whole, op: "scale", amount: 0.5 }))),
      el("table", { class: "firings" },
        el("caption", { class: "unseen" }, `Atoms that fire on token ${position}`),
        el("thead", {}, el("tr", {}, 
          el("th", { scope: "col", class: "c-atom" }, "Atom"), el("th", { scope: "col", class: "c-chips" }, "Usually fires on"),
          el("th", { scope: "col", class: "c-size" }, "Coefficient"), el("td", { class: "c-does" }))),
        el("tbody", {}, rows.map((pair) => firing(pair, largest, position)))),
      more > 0 ? small(`All ${token.atoms.length}`, "List all atoms that fire here", () => {
        every = true;
        drawToken();
      }) : "",
      another(position));
    markAtom(AtomPage.current());
  }

  function markAtom(atom) {
    for (const row of byId("live-token").querySelectorAll("tr[data-atom]")) row.classList.toggle("chosen", Number(row.dataset.atom) === atom);
  }

  // --- the page's atom, here and there ------------------------------------------------------------------------------

  function shadeBy(by, atom = shade.atom) {
    Object.assign(shade, { by, atom });
    byId("live-shade").value = by;
    byId("live-shade-atom").hidden = by !== "atom";
    byId("live-shade-number").value = atom;
    if (live.tokens.length) drawLine();
  }
  byId("live-shade").addEventListener("change", (event) => shadeBy(event.target.value, AtomPage.current() ?? shade.atom));
  byId("live-shade-number").addEventListener("change", (event) => {
    if (event.target.reportValidity() && event.target.value !== "") shadeBy("atom", Number(event.target.value));
  });

  byId("live").addEventListener("click", (event) => {
    const link = event.target.closest("a.live-atom");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    live.front(false);
    AtomPage.open(Number(link.dataset.atom));
  });

  function tryIt(atom) {
    live.show(true);
    live.front(true);
    shadeBy("atom", atom);
    if (!live.tokens.length) return;
    const best = live.tokens.reduce((top, token, index) => (coefficientOf(token, atom) > coefficientOf(live.tokens[top], atom) ? index : top), live.selected);
    if (coefficientOf(live.tokens[best], atom) > 0) live.select(best);
    else drawToken();
    AtomPage.say(coefficientOf(live.tokens[best], atom) > 0 ? `Atom ${atom} fires most on token ${best}` : `Atom ${atom} is silent in this prompt`);
    byId(coefficientOf(live.tokens[best], atom) > 0 ? "live-token" : "live-other").scrollIntoView({ block: "nearest" });
  }

  function offer(atom) {
    if (atom === null) return;
    const head = byId("atom-pane").querySelector(".atom-head");
    const button = el("button", { type: "button", class: "quiet", id: "live-try", onclick: () => tryIt(atom) }, "Try in the prompt");
    head.insertBefore(button, head.querySelector(".steps"));
  }

  AtomPage.on("open", (atom) => {
    offer(atom);
    if (live.tokens.length) drawToken();
  });
  AtomPage.on("live-read", drawLine);
  AtomPage.on("live-select", () => {
    every = false;
    markSelected();
    drawToken();
  });
  AtomPage.on("live-changes", markOutcome);
  AtomPage.on("live-outcome", markOutcome);
  offer(AtomPage.current());
})();
