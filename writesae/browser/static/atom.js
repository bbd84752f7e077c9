"use strict";
/* The open atom: where it fires, what it looks like, what it does. Everything that is not measured says so. */

(() => {
  const { el, number, fixed, percent, whole, byId, chip } = AtomPage;

  const panel = (title, ...children) => el("section", { class: "panel" }, el("h3", {}, title), children);
  const note = (...text) => el("p", { class: "note" }, text);
  const figure = (name, value, more = "") =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : null));

  function figures(atom) {
    const { table, about } = AtomPage, tokens = about.passages * about.length;
    return el("dl", { class: "figures" },
      figure("firing rate", percent(table.rate[atom]), `${whole(table.firings[atom])} of ${whole(tokens)} tokens`),
      figure("median coefficient", number(table.median[atom]), `largest ${number(table.largest[atom])}`),
      figure("cosine to native writes", fixed(table.cosine[atom]), "median over firings"));
  }

  function context(one, atom, largest) {
    const firing = one.tokens[one.at];
    const line = AtomPage.passage(one.tokens, {
      largest,
      at: one.at,
      label: `${one.file}, token ${one.position}`,
      facts: (token, index) => [
        ["coefficient", token.weight > 0 ? number(token.weight) : "silent"],
        ["of its largest", percent(token.weight / largest)],
        ["position", String(one.position - one.at + index)],
        ["token", String(token.id)],
      ],
    });
    return el("li", {},
      el("p", { class: "where" }, el("bdi", { class: "file" }, AtomPage.visible(one.file, true)), el("span", {}, `token ${one.position}`),
        el("span", { class: "coef" }, number(firing.weight))),
      line);
  }

  function contexts(atom) {
    const all = AtomPage.contextsOf(atom), largest = AtomPage.table.largest[atom];
    if (!all.length) return panel("Contexts", note("This atom did not fire on this text."));
    const part = (title, random, empty) => {
      const mine = all.filter((one) => one.random === random);
      return [el("h4", {}, title), mine.length ? el("ol", { class: "contexts" }, mine.map((one) => context(one, atom, largest))) : note(empty)];
    };
    return el("section", { class: "panel plain" },
      el("div", { class: "with-legend" }, el("h3", {}, "Contexts"), legend(largest)),
      part("Strongest, one per passage", false, ""),
      part("At random", true, "Every firing is shown above."));
  }

  const legend = (largest) => el("p", { class: "legend" },
    el("span", {}, "0"), el("span", { class: "ramp", "aria-hidden": "true" }), el("span", {}, number(largest)),
    el("span", { class: "framed" }, "fires here"));

  function shape(atom) {
    const { shapes } = AtomPage, wide = shapes.key_width, high = shapes.value_width;
    const key = shapes.key.slice(atom * wide, (atom + 1) * wide), value = shapes.value.slice(atom * high, (atom + 1) * high);
    const share = shapes.leading[atom];
    return panel("Shape", AtomPage.heatMap(Array.from(key), Array.from(value)),
      note(`${wide} key entries down, ${high} value entries across. `, el("span", { class: "plus" }, "Positive"), ", ",
        el("span", { class: "minus" }, "negative"), "; strength by the square root.",
        share < 0.9995 ? ` The leading outer product, ${percent(share)} of the atom's squared norm.` : ""));
  }

  function coefficients(atom) {
    const { shapes, table } = AtomPage, bins = shapes.histogram_width;
    if (!table.firings[atom]) return null;
    return panel("Coefficients", AtomPage.histogram(shapes.histogram.slice(atom * bins, (atom + 1) * bins), table.largest[atom]));
  }

  function replaced(atom) {
    const { table, about } = AtomPage, tested = table.tested[atom];
    const title = "In place of the write";
    if (!tested) {
      return panel(title, el("p", { class: "unmeasured" }, "Not measured."),
        note(about.browser.tested_atoms ? `The ${whole(about.browser.tested_atoms)} most frequent atoms were.` : "No replacement was run for this page."));
    }
    return panel(title,
      AtomPage.bars([["atom", table.kl_atom[atom], "plus"], ["nothing", table.kl_delete[atom], "muted"], ["random", table.kl_random[atom], "muted"]]),
      note(`KL at the token in nats, median over ${tested} ${tested === 1 ? "firing" : "firings"}; smaller is closer to the model's own. `,
        `The atom was closer than deletion ("wins") in ${table.won[atom]} of ${tested}.`));
  }

  function tokens(title, name, atom, style, more) {
    const list = AtomPage.listOf(name, atom);
    if (!list.length) return panel(title, note("The atom did not fire."));
    const largest = Math.max(...list.map(([, value]) => Math.abs(value)), 1e-300);
    const shown = name === "fires_on" ? percent : (value) => number(value, true);
    return panel(title, el("ol", { class: `words ${style}` }, list.map(([word, value]) => el("li", { title: `token ${AtomPage.words.id[word]}` },
      chip(AtomPage.words.text[word]), el("span", { class: "track", "aria-hidden": "true" }, el("span", { class: "fill", "--w": `${(100 * Math.abs(value)) / largest}%` })),
      el("span", { class: "value" }, shown(value))))), more ? note(more) : null);
  }

  const PREDICTED = "Predicted, not measured: through this head's read-out, W_O, the final norm and W_U, without the layers above.";

  function nearest(atom) {
    const list = AtomPage.listOf("neighbours", atom);
    if (!list.length) return null;
    return panel("Nearest atoms", el("ol", { class: "nearest" }, list.map(([other, cosine]) => el("li", {},
      el("a", { href: AtomPage.address({ atom: other }), "data-open": other }, String(other)),
      el("span", { class: "chips" }, AtomPage.table.firings[other] ? AtomPage.listOf("fires_on", other).slice(0, 2).map(([word]) => chip(AtomPage.words.text[word])) : el("small", {}, "silent")),
      el("span", { class: "value" }, fixed(cosine))))));
  }

  function draw(atom) {
    const kind = AtomPage.kindOf(atom);
    const step = (by, label, sign) => {
      const other = AtomPage.neighbourInList(by);
      return el("button", { type: "button", class: "quiet", "aria-label": label, title: label, "data-step": by, disabled: other === null }, sign);
    };
    return [
      el("header", { class: "atom-head" },
        el("a", { href: AtomPage.address({ atom: "" }), class: "back", "data-open": "" }, "All atoms"),
        el("h2", { id: "atom-title", tabindex: -1 }, `Atom ${atom}`),
        el("span", { class: `kind ${kind}` }, kind),
        el("span", { class: "steps" }, step(-1, "Previous atom in the list (k)", "↑"), step(1, "Next atom in the list (j)", "↓"))),
      figures(atom),
      el("div", { class: "atom-body" },
        contexts(atom),
        el("div", { class: "side" },
          shape(atom), coefficients(atom), replaced(atom),
          tokens("Fires on", "fires_on", atom, "plus"),
          tokens("Raises", "promoted", atom, "plus", PREDICTED), tokens("Lowers", "suppressed", atom, "minus"), nearest(atom))),
    ];
  }

  AtomPage.on("open", (atom) => {
    const pane = byId("atom-pane");
    document.body.classList.toggle("has-atom", atom !== null);
    AtomPage.hideCard();
    pane.replaceChildren(...(atom === null ? AtomPage.overview() : draw(atom)));
    pane.scrollTop = 0;
    if (atom === null) return;
    AtomPage.say(`Atom ${atom} is open`);
    if (AtomPage.isNarrow()) {
      scrollTo(0, 0);
      byId("atom-title").focus({ preventScroll: true });
    }
  });

  AtomPage.startAtom = () => {
    byId("atom-pane").addEventListener("click", (event) => {
      const target = event.target.closest("[data-open], [data-step]");
      if (!target || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      if (target.dataset.step) {
        const other = AtomPage.neighbourInList(Number(target.dataset.step));
        if (other !== null) AtomPage.open(other);
        const again = byId("atom-pane").querySelector(`[data-step="${target.dataset.step}"]`);
        if (again) again.focus();
      } else AtomPage.open(target.dataset.open === "" ? null : Number(target.dataset.open));
    });
  };
})();
