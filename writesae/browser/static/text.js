"use strict";
/* Text from a corpus shown as text. Control characters become their pictures, marks that cannot be seen their code point in a
   box, line ends and tabs signs, spaces dots, as in writesae/report/text.py; each token is isolated (bdi), so that text that runs
   from right to left cannot reorder its neighbours. Only text nodes are made.                                              */

(() => {
  const { el } = AtomPage;
  const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u;
  const JOINER = "\u200d";

  function picture(character) {
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return UNSEEN.test(character) ? `U+${code.toString(16).toUpperCase().padStart(4, "0")}` : null;
  }

  const code = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

  /** Nodes for a text. With `flat`, a line end is its sign alone, for chips and cells of one line. */
  AtomPage.visible = (text, flat = false) => {
    if (text === "") return [el("i", { class: "ctl" }, "empty")];
    const nodes = [], characters = Array.from(text);
    let run = "";
    const flush = () => {
      if (run) nodes.push(document.createTextNode(run));
      run = "";
    };
    characters.forEach((character, i) => {
      const shown = picture(character);
      const joins = character === JOINER && characters[i - 1] > "\u2000" && characters[i + 1] > "\u2000";
      if (character === " ") {
        flush();
        nodes.push(el("i", { class: "sp" }, " "));
      } else if (character === "\n" || character === "\t") {
        flush();
        nodes.push(el("i", { class: character === "\n" ? "nl" : "tab" }, character === "\n" ? "↵" : "⇥"));
        if (character === "\n" && !flat) nodes.push(document.createTextNode("\n"));
      } else if (shown === null || joins) {
        run += character;
      } else {
        flush();
        nodes.push(el("i", { class: shown.length === 1 ? "ctl pic" : "ctl", title: code(character) }, shown));
      }
    });
    flush();
    return nodes;
  };

  /** One token on one line. */
  AtomPage.chip = (text) => el("bdi", { class: "chip" }, AtomPage.visible(text, true));

  /** How a token is read out: its text, with words for what has no sound. */
  const spoken = (text) => text.replace(/\n/g, " line end ").replace(/\t/g, " tab ").trim() || "space";

  // --- the card -----------------------------------------------------------------------------------------------------

  const card = AtomPage.byId("card");
  let owner = null;

  /** Show the card beside a node (or at a point) with these children; one card at a time. */
  AtomPage.showCard = (node, children, point = null) => {
    card.replaceChildren(...children);
    card.hidden = false;
    if (owner && owner !== node) owner.removeAttribute("aria-describedby");
    owner = node;
    node.setAttribute("aria-describedby", "card");
    const box = point ? { left: point.x, right: point.x, top: point.y - 12, bottom: point.y + 12 } : node.getBoundingClientRect();
    const { width, height } = card.getBoundingClientRect();
    const left = Math.max(8, Math.min((box.left + box.right - width) / 2, innerWidth - width - 8));
    const above = box.top - height - 8;
    card.style.left = `${left}px`;
    card.style.top = `${above >= 8 ? above : Math.min(box.bottom + 8, innerHeight - height - 8)}px`;
  };

  AtomPage.hideCard = () => {
    card.hidden = true;
    if (owner) owner.removeAttribute("aria-describedby");
    owner = null;
  };

  // --- a line of tokens ---------------------------------------------------------------------------------------------

  const shown = new WeakMap(); // token element -> what its card says

  /**
   * A line of tokens, shaded. tokens: [{text, weight, id, position}]; options: largest (drawn at full strength), at (the
   * index that is framed), label, facts(token, index) -> [[name, value], ...] for the card.
   */
  AtomPage.passage = (tokens, { largest, at = -1, label, facts }) => {
    const line = el("div", { class: "tokens", role: "group", "aria-label": label, dir: "ltr" });
    tokens.forEach((token, index) => {
      const strength = largest > 0 ? Math.min(1, Math.max(0, token.weight / largest)) : 0;
      const nodes = AtomPage.visible(token.text);
      const lastIsBreak = token.text.endsWith("\n") ? nodes.pop() : null; // the break stands outside, or a frame would reach into the next line
      const node = el("bdi", { class: index === at ? "tok at" : "tok", tabindex: index === Math.max(at, 0) ? 0 : -1 }, nodes);
      if (strength >= 0.005) node.style.setProperty("--a", strength.toFixed(3));
      if (strength >= 0.15) node.classList.add("strong"); // its signs take the ink, which can be read on any shade
      node.dataset.spoken = spoken(token.text);
      shown.set(node, () => [
        el("div", { class: "card-token" }, el("bdi", {}, AtomPage.visible(token.text, true))),
        el("dl", {}, facts(token, index).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      ]);
      line.append(node);
      if (lastIsBreak) line.append(lastIsBreak);
    });
    return line;
  };

  const tokenAt = (event) => (event.target instanceof Element ? event.target.closest(".tok") : null);
  const open = (node) => AtomPage.showCard(node, shown.get(node)());
  document.addEventListener("pointerover", (event) => {
    const node = tokenAt(event);
    if (node) open(node);
    else if (owner && owner.classList.contains("tok") && document.activeElement !== owner) AtomPage.hideCard();
  });
  document.addEventListener("focusin", (event) => {
    const node = tokenAt(event);
    if (node) open(node);
    else AtomPage.hideCard();
  });
  document.addEventListener("scroll", () => owner && AtomPage.hideCard(), { capture: true, passive: true });
  document.addEventListener("keydown", (event) => {
    const node = tokenAt(event);
    if (event.key === "Escape") AtomPage.hideCard();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!node || !step) return;
    const all = [...node.parentNode.querySelectorAll(".tok")], next = all[all.indexOf(node) + step];
    if (!next) return;
    event.preventDefault();
    node.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
})();
