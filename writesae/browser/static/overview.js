"use strict";
/* What stands in the pane before an atom is opened: the whole dictionary in a few numbers and one picture. */

(() => {
  const { el, svg, fixed, percent, whole } = AtomPage;
  const WIDE = 640, TALL = 340, PAD = { left: 40, right: 12, top: 14, bottom: 34 };

  function summary() {
    const { table, about } = AtomPage, n = AtomPage.count();
    const of = (kind) => Array.from({ length: n }, (_, atom) => AtomPage.kindOf(atom)).filter((one) => one === kind).length;
    const won = table.won.reduce((sum, x) => sum + x, 0), tested = table.tested.reduce((sum, x) => sum + x, 0);
    const measured = table.tested.filter((x) => x > 0).length;
    const item = (name, value, more) => el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, more)));
    return el("dl", { class: "figures" },
      item("register", whole(of("register")), `cosine ${about.browser.threshold} or more`),
      item("bundle", whole(of("bundle")), "cosine below"),
      item("silent", whole(of("silent")), "never fired on this text"),
      item("wins", tested ? percent(won / tested) : "–", tested ? `of ${whole(tested)} against deletion, ${whole(measured)} atoms` : "not measured"));
  }

  function map() {
    const { table } = AtomPage, alive = [];
    for (let atom = 0; atom < AtomPage.count(); atom++) if (table.firings[atom] > 0 && Number.isFinite(table.cosine[atom])) alive.push(atom);
    if (!alive.length) return el("p", { class: "note" }, "No atom fired on this text.");
    const rates = alive.map((atom) => Math.log10(table.rate[atom])), cosines = alive.map((atom) => table.cosine[atom]);
    const low = Math.floor(Math.min(...rates)), high = Math.max(Math.ceil(Math.max(...rates)), low + 1);
    const down = Math.min(0, ...cosines), up = Math.max(0.1, ...cosines);
    const x = (rate) => PAD.left + ((rate - low) / (high - low)) * (WIDE - PAD.left - PAD.right);
    const y = (cosine) => TALL - PAD.bottom - ((cosine - down) / (up - down)) * (TALL - PAD.top - PAD.bottom);
    const grid = [];
    for (let power = low; power <= high; power++) {
      grid.push(svg("line", { x1: x(power), x2: x(power), y1: PAD.top, y2: TALL - PAD.bottom }),
        svg("text", { x: x(power), y: TALL - PAD.bottom + 16, class: "middle" }, `${Number((100 * 10 ** power).toPrecision(1))}%`));
    }
    for (let tick = Math.ceil(down * 5) / 5; tick <= up; tick += 0.2) {
      grid.push(svg("line", { x1: PAD.left, x2: WIDE - PAD.right, y1: y(tick), y2: y(tick) }),
        svg("text", { x: PAD.left - 6, y: y(tick) + 4, class: "end" }, fixed(tick, 1)));
    }
    const dots = alive.map((atom, i) => svg("circle", { cx: x(rates[i]).toFixed(1), cy: y(cosines[i]).toFixed(1), r: 3.4, "data-open": atom, class: AtomPage.kindOf(atom) }));
    const label = `${whole(alive.length)} atoms by firing rate, ${percent(10 ** Math.min(...rates))} to ${percent(10 ** Math.max(...rates))} of tokens, and cosine to native writes, ${fixed(Math.min(...cosines))} to ${fixed(Math.max(...cosines))}`;
    const picture = svg("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, class: "chart map", role: "img", "aria-label": label },
      grid, dots,
      svg("text", { x: WIDE - PAD.right, y: TALL - 2, class: "end" }, "share of tokens at which the atom fires"),
      svg("text", { x: PAD.left, y: PAD.top - 4 }, "cosine to native writes"));
    picture.addEventListener("pointerover", (event) => {
      const atom = event.target.dataset && event.target.dataset.open;
      if (atom === undefined) return AtomPage.hideCard();
      const chips = AtomPage.listOf("fires_on", Number(atom)).slice(0, 3).map(([word]) => AtomPage.chip(AtomPage.words.text[word]));
      AtomPage.showCard(picture, [el("div", { class: "card-token" }, `Atom ${atom} `, chips)], { x: event.clientX, y: event.clientY });
    });
    picture.addEventListener("pointerleave", AtomPage.hideCard);
    return el("figure", {}, picture, el("figcaption", { class: "note" }, "Every atom that fired. Choose a dot, or a row of the table."));
  }

  AtomPage.overview = () => [
    el("header", { class: "atom-head" }, el("h2", {}, "The dictionary")),
    summary(),
    map(),
  ];
})();
