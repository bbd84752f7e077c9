"use strict";
/* The page's tools, as one global object that every later script adds to. A live page may use them too:

     AtomPage.el(name, attributes, ...children)  an element; strings become text, never markup
     AtomPage.on(event, listener)                "open" (atom or null), "theme"
     AtomPage.open(atom), AtomPage.current()     open an atom; the one that is open, or null
     AtomPage.visible(text)                      nodes in which every character of a text can be seen
     AtomPage.passage(tokens, options)           a line of tokens shaded by numbers, with a card for each (text.js)
     AtomPage.number(x), AtomPage.percent(x)     as the page writes them
     AtomPage.about, AtomPage.table, ...         the data (data.js)                                                       */

const AtomPage = (() => {
  const listeners = new Map();

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "class") node.setAttribute("class", value);
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name.startsWith("--")) node.style.setProperty(name, value);
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }

  const SIGN = "−"; // a minus sign as wide as a plus

  /** Three digits, and powers of ten where there would be many zeros. */
  function number(x, signed = false) {
    if (!Number.isFinite(x)) return "–";
    if (x === 0) return "0";
    const size = Math.abs(x);
    let text = size >= 1e-3 && size < 1e5 ? String(Number(size.toPrecision(3))) : size.toExponential(1);
    text = text.replace("e-", "e" + SIGN).replace("e+", "e");
    return (x < 0 ? SIGN : signed ? "+" : "") + text;
  }

  return {
    el: (name, attributes, ...children) => fill(document.createElement(name), attributes, children),
    svg: (name, attributes, ...children) =>
      fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children),
    number,
    fixed: (x, digits = 2) => (Number.isFinite(x) ? (x < 0 ? SIGN : "") + Math.abs(x).toFixed(digits) : "–"),
    percent: (x) => (!Number.isFinite(x) ? "–" : x === 0 ? "0%" : x < 1e-4 ? "< 0.01%" : `${Number((100 * x).toPrecision(2))}%`),
    whole: (x) => x.toLocaleString("en"),
    on(event, listener) {
      listeners.set(event, [...(listeners.get(event) || []), listener]);
    },
    tell(event, value) {
      for (const listener of listeners.get(event) || []) listener(value);
    },
    /** What a screen reader is told. */
    say(text) {
      document.getElementById("said").textContent = text;
    },
    byId: (id) => document.getElementById(id),
    isNarrow: () => window.matchMedia("(max-width: 860px)").matches,
  };
})();
