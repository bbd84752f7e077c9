"use strict";
/* What the changes did: the next-token distribution before and after, at the changed token, at the next, and where one looks;
   and what the model writes next.                                                                                         */

(() => {
  const { el, byId, chip, live } = AtomPage;

  /** A probability in per cent with two digits that count, never rounded to 0 or 100. */
  const digits = (p) => {
    const x = 100 * p;
    if (x < 0.01) return "<\u202f0.01";
    if (x > 99.99) return ">\u202f99.99";
    return x >= 99 ? x.toFixed(2) : x >= 10 ? x.toFixed(1) : x >= 1 ? x.toFixed(2) : String(Number(x.toPrecision(2)));
  };
  const percent = (p) => `${digits(p)}%`;

  const twin = (p, largest, style) => el("td", {}, el("div", { class: "twin" },
    el("span", { class: "track", "aria-hidden": "true" }, el("span", { class: `fill ${style}`, "--w": `${(100 * p) / largest}%` })), el("span", {}, percent(p))));

  function table(at, changed, name) {
    const entries = at.top.slice(0, 10), largest = Math.max(...entries.flatMap((entry) => [entry.before, entry.after]));
    return el("table", { class: changed ? "next" : "next same" },
      el("caption", { class: "unseen" }, `Likeliest tokens ${name}`),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "next token"), el("th", { scope: "col" }, changed ? "before" : "probability"),
        changed ? el("th", { scope: "col" }, "after") : null)),
      el("tbody", {}, entries.map((entry) => el("tr", { "data-id": entry.id, "data-before": entry.before, "data-after": entry.after },
        el("th", { scope: "row" }, chip(entry.text)), twin(entry.before, largest, "before"), changed ? twin(entry.after, largest, "after") : null))));
  }

  const movers = (title, entries) => el("div", {}, el("h5", {}, title),
    entries.length ? el("ol", {}, entries.slice(0, 5).map((entry) => el("li", {}, chip(entry.text), el("span", {}, `${digits(entry.before)} → ${percent(entry.after)}`)))) : el("p", { class: "note" }, "none"));

  function card(at, changed) {
    const name = `after token ${at.position}`;
    const roles = changed ? at.roles.map((role) => (role === "chosen" || role === "last" ? "looked at" : role)).join(", ") : "";
    return el("section", { class: "outcome", "data-position": at.position, "data-kl": at.kl, "aria-label": `What comes ${name}` },
      el("h4", {}, `After token ${at.position} `, live.chip(at.position), roles ? el("small", {}, ` ${roles}`) : null),
      changed ? el("p", { class: "kl" }, live.nats(at.kl), el("small", {}, " nats of KL")) : null,
      table(at, changed, name),
      changed ? el("div", { class: "movers" }, movers("more likely now", at.promoted), movers("less likely now", at.suppressed)) : null);
  }

  function draw() {
    const { outcome } = live, changed = live.outcome.first !== null;
    byId("live-outcome").replaceChildren(
      el("h3", { id: "live-outcome-title" }, changed ? "The next token, before and after" : "The next token"),
      changed ? "" : el("p", { class: "note" }, "Replace, remove or scale something above, and see what it does to this."),
      el("div", { class: "cards" }, outcome.at.map((at) => card(at, changed))));
    const told = outcome.at[0];
    if (changed) AtomPage.say(`After token ${told.position}: ${live.nats(told.kl)} nats`);
  }
  AtomPage.on("live-outcome", draw);

  // --- what the model writes next -----------------------------------------------------------------------------------

  function line(title, tokens, same) {
    const text = el("div", { class: "tokens", dir: "ltr" }, tokens.map((token, i) =>
      token.text ? el("bdi", { class: i === same ? "differs" : null }, AtomPage.visible(token.text)) : ""));
    return el("div", {}, el("h4", {}, title), text);
  }

  byId("live-how").addEventListener("change", (event) => {
    byId("live-sampling").hidden = event.target.value !== "sample";
  });
  byId("live-go").addEventListener("submit", (event) => {
    event.preventDefault();
    const sample = byId("live-how").value === "sample", changed = live.changes.length > 0;
    const settings = { new_tokens: Number(byId("live-new").value), sample };
    if (sample) Object.assign(settings, { temperature: Number(byId("live-temperature").value), seed: Number(byId("live-seed").value) });
    live.ask("/api/continuations", live.request(settings), (told) => {
      const end = told.same === told.plain.length && told.same === told.edited.length;
      byId("live-continued").replaceChildren(el("div", { class: "texts" },
        line(changed ? "untouched" : "", told.plain, end ? -1 : told.same),
        changed ? line(end ? "with the changes: the same" : "with the changes", told.edited, end ? -1 : told.same) : null));
      AtomPage.say(changed && !end ? `The texts part at token ${told.same + 1}` : "Continued");
    });
  });
  const forget = () => byId("live-continued").replaceChildren();
  AtomPage.on("live-changes", forget);
  AtomPage.on("live-read", forget);

  live.about = JSON.parse(byId("live-about").textContent);
  live.start();
})();
