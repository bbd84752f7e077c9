"use strict";
/* What is looked at stands in the address: #atom=123&q=self&sort=rate&dir=asc&kind=register. Opening an atom is a step that
   "back" undoes; searching and sorting replace the address. What has its usual value is left out.                       */

(() => {
  const USUAL = { atom: "", q: "", kind: "", sort: "firings", dir: "desc" };
  let state = { ...USUAL };
  let lastOpen;

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    const made = { ...USUAL };
    for (const name of Object.keys(USUAL)) if (given.has(name)) made[name] = given.get(name);
    if (!/^\d+$/.test(made.atom) || Number(made.atom) >= AtomPage.count()) made.atom = "";
    if (!AtomPage.columns.some((column) => column.name === made.sort)) made.sort = USUAL.sort;
    if (made.dir !== "asc") made.dir = "desc";
    if (!AtomPage.about.kinds.includes(made.kind)) made.kind = "";
    return made;
  }

  /** The address of a state that differs from the present one in these fields. */
  AtomPage.address = (changes) => {
    const wanted = { ...state, ...changes }, parts = new URLSearchParams();
    for (const name of Object.keys(USUAL)) if (String(wanted[name]) !== USUAL[name]) parts.set(name, String(wanted[name]));
    return `#${parts}`;
  };

  function apply() {
    AtomPage.tell("state", state);
    const atom = AtomPage.current();
    if (atom !== lastOpen) {
      lastOpen = atom;
      AtomPage.tell("open", atom);
    }
  }

  AtomPage.state = () => state;
  AtomPage.current = () => (state.atom === "" ? null : Number(state.atom));

  /** Change some fields; `step` makes it one that "back" undoes. */
  AtomPage.change = (changes, step = false) => {
    const address = AtomPage.address(changes);
    if (address !== (location.hash || "#")) history[step ? "pushState" : "replaceState"](null, "", address);
    state = read();
    apply();
  };

  /** Open an atom, or null for none; unknown numbers open nothing. */
  AtomPage.open = (atom) => AtomPage.change({ atom: atom === null ? "" : atom }, true);

  AtomPage.startState = () => {
    state = read();
    addEventListener("popstate", () => {
      state = read();
      apply();
    });
    apply();
  };
})();
