"use strict";
/* Small pictures: bars and dots as inline SVG, matrices on a canvas (one of 128 x 128 would be 16,384 elements). Colours come
   from the page's style, so they follow its light and dark face; every picture says in words what it shows.              */

(() => {
  const { el, svg, number, whole } = AtomPage;

  /** Firings by coefficient; counts by their logarithm, since most atoms fire weakly far more often than strongly. */
  AtomPage.histogram = (counts, largest) => {
    const wide = 260, tall = 92, foot = 16, most = Math.max(...counts), bar = wide / counts.length;
    const total = counts.reduce((sum, count) => sum + count, 0);
    const label = `${whole(total)} firings by coefficient, from 0 to ${number(largest)}; at most ${whole(most)} in one bar`;
    const bars = Array.from(counts, (count, i) => {
      const height = count ? (tall * (1 + Math.log(count))) / (1 + Math.log(most)) : 0;
      const range = `${number((largest * i) / counts.length)} to ${number((largest * (i + 1)) / counts.length)}: ${whole(count)}`;
      return svg("rect", { x: i * bar + 0.75, y: tall - height, width: bar - 1.5, height, rx: 1 }, svg("title", {}, range));
    });
    return svg(
      "svg", { viewBox: `0 -12 ${wide} ${tall + foot + 12}`, class: "chart bars", role: "img", "aria-label": label },
      ...bars,
      svg("line", { x1: 0, x2: wide, y1: tall + 0.5, y2: tall + 0.5 }),
      svg("text", { x: 0, y: tall + foot - 1 }, "0"),
      svg("text", { x: wide, y: tall + foot - 1, class: "end" }, number(largest)),
      svg("text", { x: wide, y: -2, class: "end" }, `most ${whole(most)}, log scale`),
    );
  };

  /** Rows of [name, number, class] as bars from 0, with the number behind each. */
  AtomPage.bars = (rows) => {
    const largest = Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-300);
    return el("div", { class: "hbars" }, rows.map(([name, value, style]) => el("div", { class: `hbar ${style}` },
      el("span", { class: "name" }, name),
      el("span", { class: "track" }, el("span", { class: "fill", "--w": `${(100 * Math.abs(value)) / largest}%` })),
      el("span", { class: "value" }, number(value)))));
  };

  // --- an atom as a picture -----------------------------------------------------------------------------------------

  const LEFT = 8, STRIP = 5, GAP = 3; // shares of 100, as in the report of the replacement test

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const probe = el("span", { hidden: true });
    document.body.append(probe);
    const found = ["--plus", "--minus"].map((name) => {
      probe.style.color = style.getPropertyValue(name);
      return getComputedStyle(probe).color;
    });
    probe.remove();
    return found;
  }

  function paint(canvas, key, value) {
    const ratio = Math.min(3, window.devicePixelRatio || 1), size = Math.max(key.length, value.length);
    const cell = Math.max(1, Math.round((236 * ratio) / size));
    const left = Math.round((cell * size * LEFT) / 100), strip = Math.round((cell * size * STRIP) / 100);
    const gap = Math.round((cell * size * GAP) / 100);
    canvas.width = left + cell * value.length;
    canvas.height = cell * key.length + gap + strip;
    canvas.layout = { left, cell, gap };
    const context = canvas.getContext("2d"), [plus, minus] = colours();
    const draw = (x, size, x0, y0, w, h) => {
      context.globalAlpha = Math.sqrt(Math.abs(x) / size);
      context.fillStyle = x < 0 ? minus : plus;
      context.fillRect(x0, y0, w, h);
    };
    const most = (side) => side.reduce((best, x) => Math.max(best, Math.abs(x)), 1e-300);
    const keyMost = most(key), valueMost = most(value);
    key.forEach((k, i) => {
      draw(k, keyMost, 0, i * cell, strip, cell);
      value.forEach((v, j) => draw(k * v, keyMost * valueMost, left + j * cell, i * cell, cell, cell));
    });
    value.forEach((v, j) => draw(v, valueMost, left + j * cell, cell * key.length + gap, cell, strip));
  }

  const strongest = (side) =>
    Array.from(side, (x, i) => [i, x]).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 3)
      .map(([i, x]) => `${i} (${number(x, true)})`).join(", ");

  /** The outer product, its key side down the left, its value side along the foot. */
  AtomPage.heatMap = (key, value) => {
    const label = `Key side of ${key.length} entries, largest ${strongest(key)}; value side of ${value.length}, largest ${strongest(value)}`;
    const canvas = el("canvas", { class: "heat", role: "img", "aria-label": label });
    paint(canvas, key, value);
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), { left, cell } = canvas.layout, scale = canvas.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      const i = Math.floor(y / cell), j = Math.floor((x - left) / cell);
      const row = i < key.length, column = j >= 0 && j < value.length;
      if (!row && !column) return AtomPage.hideCard();
      const facts = [];
      if (row) facts.push([`key ${i}`, number(key[i], true)]);
      if (column) facts.push([`value ${j}`, number(value[j], true)]);
      if (row && column) facts.push(["product", number(key[i] * value[j], true)]);
      AtomPage.showCard(canvas, [el("dl", {}, facts.map(([name, x]) => el("div", {}, el("dt", {}, name), el("dd", {}, x))))],
        { x: event.clientX, y: event.clientY });
    });
    canvas.addEventListener("pointerleave", AtomPage.hideCard);
    canvas.again = () => paint(canvas, key, value);
    return canvas;
  };

  AtomPage.on("theme", () => document.querySelectorAll("canvas.heat").forEach((canvas) => canvas.again()));
})();
