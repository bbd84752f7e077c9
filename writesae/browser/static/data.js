"use strict";
/* The data, each block read when it is first asked for. packing.py says how an array is written.

     AtomPage.about                    what was run
     AtomPage.table.rate[atom]         and firings, median, largest, cosine, kind, tested, won, kl_atom, kl_delete, kl_random
     AtomPage.words.text[word]
     AtomPage.lists.promoted           {index, number, width}: entry atom * width + place; also suppressed, fires_on, neighbours
     AtomPage.contexts, AtomPage.shapes                                                                                      */

(() => {
  const TYPES = {
    i1: Int8Array, i2: Int16Array, i4: Int32Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array,
  };

  function unpack(packed) {
    const raw = atob(packed.data);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const values = new TYPES[packed.type](bytes.buffer);
    if (!packed.scale) return values;
    const scale = unpack(packed.scale), width = packed.shape[1], plain = new Float32Array(values.length);
    for (let i = 0; i < values.length; i++) plain[i] = values[i] * scale[Math.floor(i / width)];
    return plain;
  }

  function unpackAll(value) {
    if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
    if (typeof value.data === "string" && value.type in TYPES) return unpack(value);
    const made = {};
    for (const [name, inner] of Object.entries(value)) {
      made[name] = unpackAll(inner);
      const shape = inner && inner.shape;
      if (shape && shape.length === 2) made[`${name}_width`] = shape[1];
    }
    return made;
  }

  const kept = {};
  for (const name of ["about", "table", "words", "lists", "contexts", "shapes"]) {
    Object.defineProperty(AtomPage, name, {
      get() {
        if (!(name in kept)) {
          const read = JSON.parse(AtomPage.byId(`data-${name}`).textContent);
          kept[name] = name === "about" ? read : unpackAll(read);
        }
        return kept[name];
      },
    });
  }

  /** A short list of one atom as pairs [index, number]; shorter lists end early. */
  AtomPage.listOf = (name, atom) => {
    const list = AtomPage.lists[name], width = list.index_width, found = [];
    for (let place = atom * width; place < (atom + 1) * width; place++) {
      if (list.index[place] < 0) break;
      found.push([list.index[place], list.number[place]]);
    }
    return found;
  };

  /** The contexts of an atom: {random, file, position, at, tokens: [{word, text, weight}]}. */
  AtomPage.contextsOf = (atom) => {
    const all = AtomPage.contexts, words = AtomPage.words, width = all.word_width, found = [];
    for (let i = all.first[atom]; i < all.first[atom + 1]; i++) {
      const tokens = [];
      for (let place = i * width; place < (i + 1) * width && all.word[place] >= 0; place++) {
        const word = all.word[place];
        tokens.push({ word, id: words.id[word], text: words.text[word], weight: all.activation[place] });
      }
      const position = all.position[i];
      found.push({ random: all.random[i] === 1, file: AtomPage.about.files[all.passage[i]], position, at: all.at[i], tokens });
    }
    return found;
  };

  AtomPage.count = () => AtomPage.table.rate.length;
  AtomPage.kindOf = (atom) => AtomPage.about.kinds[AtomPage.table.kind[atom]];
})();
