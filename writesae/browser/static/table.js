"use strict";
/* The table of all atoms: searched, sorted, and drawn only where it is looked at. Rows are equally tall, so two empty rows stand
   for those above and below; the numbers of rows and columns are told to assistive software.                            */

(() => {
  const { el, number, fixed, percent, whole, byId } = AtomPage;
  const EXTRA = 12; // rows drawn beyond either edge
  let rowHeight = 40;
  let order = []; // the atoms that are listed, in their order
  let active = 0; // the row that the keyboard is on
  let haystacks = null;

  const share = (atom) => (AtomPage.table.tested[atom] ? AtomPage.table.won[atom] / AtomPage.table.tested[atom] : NaN);
  const column = (name) => (atom) => AtomPage.table[name][atom];

  AtomPage.columns = [
    { name: "atom", label: "Atom", first: "asc", sort: (atom) => atom },
    { name: "fires_on", label: "Fires on", hint: "The tokens with the largest share of its coefficient", plain: true,
      cell: (atom) => el("span", { class: "chips" }, AtomPage.listOf("fires_on", atom).slice(0, 4).map(([word]) => AtomPage.chip(AtomPage.words.text[word]))) },
    { name: "firings", label: "Rate", hint: "Share of all tokens at which it fires", sort: column("firings"),
      cell: (atom) => percent(AtomPage.table.rate[atom]) },
    { name: "median", label: "Coef.", hint: "Median coefficient where it fires", sort: column("median"),
      cell: (atom) => number(AtomPage.table.median[atom]), wide: "wider" },
    { name: "cosine", label: "Cosine", hint: "Median cosine to the native writes", sort: column("cosine"),
      cell: (atom) => fixed(AtomPage.table.cosine[atom]) },
    { name: "closer", label: "Wins", hint: "Firings at which the atom, put in the write's place, moves the output less than deletion",
      sort: share, wide: "wide",
      cell: (atom) => (AtomPage.table.tested[atom] ? `${AtomPage.table.won[atom]} of ${AtomPage.table.tested[atom]}` : "–") },
  ];

  // --- which atoms, in which order ----------------------------------------------------------------------------------

  /** Per atom all the text that is shown of it, in lower case; made when it is first searched. */
  function searched() {
    if (haystacks) return haystacks;
    const texts = AtomPage.words.text.map((text) => text.toLowerCase());
    haystacks = Array.from({ length: AtomPage.count() }, (_, atom) => {
      const parts = ["fires_on", "promoted", "suppressed"].flatMap((name) => AtomPage.listOf(name, atom).map(([word]) => texts[word]));
      const { first, word, word_width: width } = AtomPage.contexts;
      for (let i = first[atom]; i < first[atom + 1]; i++) {
        let line = "";
        for (let place = i * width; place < (i + 1) * width && word[place] >= 0; place++) line += texts[word[place]];
        parts.push(line);
      }
      return parts.join("\u0000");
    });
    return haystacks;
  }

  function matching(query, kind) {
    let atoms = Array.from({ length: AtomPage.count() }, (_, atom) => atom);
    if (kind) atoms = atoms.filter((atom) => AtomPage.kindOf(atom) === kind);
    const wanted = query.toLowerCase(), asNumber = /^\s*#?(\d+)\s*$/.exec(query);
    if (!wanted) return atoms;
    const texts = searched();
    return atoms.filter((atom) => texts[atom].includes(wanted) || (asNumber && atom === Number(asNumber[1])));
  }

  function sorted(atoms, name, direction, query) {
    const { sort } = AtomPage.columns.find((one) => one.name === name), sign = direction === "asc" ? 1 : -1;
    const values = new Map(atoms.map((atom) => [atom, sort(atom)]));
    const asNumber = /^\s*#?(\d+)\s*$/.exec(query), called = asNumber ? Number(asNumber[1]) : -1;
    return atoms.sort((a, b) => {
      if (a === called || b === called) return a === called ? -1 : 1; // an atom's own number comes first
      const x = values.get(a), y = values.get(b), missing = Number.isNaN(x) - Number.isNaN(y);
      return missing || (Number.isNaN(x) ? 0 : sign * (x - y)) || a - b; // what was not measured comes last either way
    });
  }

  // --- drawing ------------------------------------------------------------------------------------------------------

  const shownColumns = () => AtomPage.columns;

  function drawHeads(state) {
    byId("heads").replaceChildren(...shownColumns().map((one) => {
      const here = one.name === state.sort, style = `c-${one.name}${one.wide ? ` ${one.wide}` : ""}`;
      if (one.plain) return el("th", { scope: "col", class: style, title: one.hint }, one.label);
      const arrow = here ? (state.dir === "asc" ? " ↑" : " ↓") : "";
      return el("th", { scope: "col", class: style, "aria-sort": here ? (state.dir === "asc" ? "ascending" : "descending") : null },
        el("button", { type: "button", "data-sort": one.name, title: one.hint }, one.label, el("span", { "aria-hidden": "true" }, arrow)));
    }));
  }

  function drawRow(row) {
    const atom = order[row], open = AtomPage.current() === atom;
    const link = el("a", { href: AtomPage.address({ atom }), tabindex: row === active ? 0 : -1, "aria-current": open ? "true" : null,
      "data-atom": atom, "aria-label": `Atom ${atom}` }, String(atom));
    return el("tr", { "aria-rowindex": row + 2, class: open ? "open" : null, "data-row": row },
      shownColumns().map((one) => el("td", { class: `c-${one.name}${one.wide ? ` ${one.wide}` : ""}` }, one.name === "atom" ? link : one.cell(atom))));
  }

  const spacer = (rows) => el("tr", { class: "gap", "aria-hidden": "true", "--h": `${rows * rowHeight}px` }, el("td", {}));

  /** Draw the rows in sight; `focus` is the row that shall have the focus, by default the one that has it now. */
  function drawRows(focus = null) {
    const scroll = byId("scroll"), body = byId("rows");
    const held = focus === null && body.contains(document.activeElement) ? Number(document.activeElement.closest("tr").dataset.row) : focus;
    const first = Math.max(0, Math.floor(scroll.scrollTop / rowHeight) - EXTRA);
    const last = Math.min(order.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / rowHeight) + EXTRA);
    const rows = [];
    for (let row = first; row < last; row++) rows.push(drawRow(row));
    body.replaceChildren(...(first ? [spacer(first)] : []), ...rows, ...(last < order.length ? [spacer(order.length - last)] : []));
    byId("table").setAttribute("aria-rowcount", order.length + 1);
    if (held === null) return;
    const link = body.querySelector(`tr[data-row="${held}"] a`); // a row that was scrolled away leaves the focus to the frame
    if (link) link.focus({ preventScroll: true });
    else scroll.focus({ preventScroll: true });
  }

  function reveal(row) {
    const scroll = byId("scroll"), head = byId("heads").getBoundingClientRect().height;
    const top = row * rowHeight, bottom = top + rowHeight;
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    else if (bottom > scroll.scrollTop + scroll.clientHeight - head) scroll.scrollTop = bottom - scroll.clientHeight + head;
  }

  function moveTo(row) {
    active = Math.max(0, Math.min(order.length - 1, row));
    reveal(active);
    drawRows(active);
  }

  /** The atom so many rows further in the listed order, or null. */
  AtomPage.neighbourInList = (step) => {
    const here = order.indexOf(AtomPage.current()), next = here < 0 ? (step > 0 ? 0 : -1) : here + step;
    return order[next] === undefined ? null : order[next];
  };

  let drawn = "";
  AtomPage.on("state", (state) => {
    const listed = JSON.stringify([state.q, state.kind, state.sort, state.dir]), fresh = listed !== drawn;
    if (fresh) {
      drawn = listed;
      order = sorted(matching(state.q, state.kind), state.sort, state.dir, state.q);
      active = 0;
      byId("scroll").scrollTop = 0;
      drawHeads(state);
      const all = whole(AtomPage.count());
      byId("found").textContent = order.length === AtomPage.count() ? `${all} atoms` : order.length ? `${whole(order.length)} of ${all} atoms` : "No atom has this. Try fewer letters, or all kinds.";
    }
    if (byId("search").value !== state.q) byId("search").value = state.q;
    if (byId("kind").value !== state.kind) byId("kind").value = state.kind;
    const open = order.indexOf(AtomPage.current());
    if (open >= 0) {
      active = open;
      reveal(open);
    }
    drawRows();
  });

  // --- events -------------------------------------------------------------------------------------------------------

  AtomPage.startTable = () => {
    const scroll = byId("scroll");
    rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row")) || rowHeight;
    scroll.tabIndex = -1;
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        drawRows();
      });
    };
    scroll.addEventListener("scroll", later, { passive: true });
    new ResizeObserver(later).observe(scroll);
    byId("heads").addEventListener("click", (event) => {
      const button = event.target.closest("button[data-sort]");
      if (!button) return;
      const { sort, dir } = AtomPage.state(), name = button.dataset.sort;
      const first = AtomPage.columns.find((one) => one.name === name).first || "desc";
      AtomPage.change({ sort: name, dir: sort === name ? (dir === "asc" ? "desc" : "asc") : first });
      byId("heads").querySelector(`button[data-sort="${name}"]`).focus();
    });
    byId("rows").addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-row]");
      if (!row || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      AtomPage.open(order[Number(row.dataset.row)]);
    });
    byId("rows").addEventListener("focusin", (event) => {
      const row = event.target.closest("tr[data-row]");
      if (row) active = Number(row.dataset.row);
    });
    scroll.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.floor(scroll.clientHeight / rowHeight) - 2);
      const to = { ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: order.length - 1 }[event.key];
      if (to === undefined || event.target.closest("thead")) return;
      event.preventDefault();
      moveTo(to);
    });
    byId("search").addEventListener("input", (event) => AtomPage.change({ q: event.target.value }));
    byId("search").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" && order.length) {
        event.preventDefault();
        moveTo(0);
      }
    });
    byId("kind").addEventListener("change", (event) => AtomPage.change({ kind: event.target.value }));
    byId("tools").addEventListener("submit", (event) => event.preventDefault());
  };
})();
