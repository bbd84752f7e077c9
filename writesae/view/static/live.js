"use strict";
/* The prompt: what was typed, what the server says of it, and one question at a time.

     AtomPage.live.text, .tokens         the text that was read, its tokens {id, text, norm, n_active, atoms: [[atom, coefficient]]}
     .selected                           the token that is looked at
     .changes                            [{position, op, atom, amount}], what is done to writes, in order
     .outcome                            what the server measured of them
     .change(list), .select(position)    ask for what follows
   Events: live-read, live-select, live-changes, live-outcome.                                                             */

(() => {
  const { byId, tell } = AtomPage;
  const live = (AtomPage.live = { text: null, tokens: [], selected: 0, changes: [], reading: "in_recurrence", outcome: null });
  const TOP = 8, PATIENCE = 40, PAUSE = 250; // a busy server is asked again, for ten seconds

  // --- asking -------------------------------------------------------------------------------------------------------

  async function post(path, body) {
    for (let tries = 1; ; tries++) {
      let answer;
      try {
        answer = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
      } catch {
        throw new Error("the server does not answer: is `writesae view` still running?");
      }
      const told = await answer.json();
      if (answer.ok) return told;
      if (answer.status !== 429 || tries === PATIENCE) throw new Error(told.error);
      await new Promise((go) => setTimeout(go, PAUSE));
    }
  }

  const waiting = new Map(); // path -> the newest question; older ones have nobody who waits for their answer
  let working = false;

  live.ask = (path, body, then) => {
    waiting.set(path, { body, then });
    work();
  };

  async function work() {
    if (working) return;
    working = true;
    byId("live").setAttribute("aria-busy", "true");
    while (waiting.size) {
      const [path, { body, then }] = waiting.entries().next().value;
      waiting.delete(path);
      try {
        then(await post(path, body));
        live.wrong("");
      } catch (error) {
        live.wrong(error.message);
      }
    }
    working = false;
    byId("live").removeAttribute("aria-busy");
  }

  live.wrong = (sentence) => {
    byId("live-wrong").textContent = sentence && `${sentence[0].toUpperCase()}${sentence.slice(1)}.`;
  };

  // --- reading ------------------------------------------------------------------------------------------------------

  live.read = (text) => {
    live.ask("/api/read", { text }, (told) => {
      let same = 0;
      while (same < live.tokens.length && same < told.tokens.length && live.tokens[same].id === told.tokens[same].id) same++;
      live.text = text;
      live.tokens = told.tokens;
      // what comes after cannot reach back, so changes in the part that stayed still mean the same
      live.changes = live.changes.filter((change) => change.position < same);
      live.selected = told.tokens.length - 1;
      live.outcome = null;
      byId("live-body").hidden = false;
      byId("live-status").textContent = `${AtomPage.whole(told.tokens.length)} tokens`;
      tell("live-read");
      tell("live-select");
      tell("live-changes");
      live.measure();
    });
  };

  live.request = (more) => ({
    text: live.text,
    changes: live.changes.map(({ position, op, atom, amount }) => ({ position, op, atom, amount })),
    reading: live.reading,
    ...more,
  });

  live.measure = () => {
    const text = live.text;
    live.ask("/api/distributions", live.request({ position: live.selected, top: TOP }), (outcome) => {
      if (text !== live.text) return;
      live.outcome = outcome;
      tell("live-outcome");
    });
  };

  live.select = (position) => {
    live.selected = position;
    tell("live-select");
    live.measure();
  };

  /** Other changes. `redraw` false: a slider is being moved, and must stay where it is. */
  live.change = (changes, redraw = true) => {
    live.changes = changes;
    if (redraw) tell("live-changes");
    live.measure();
  };

  /** One more change; it takes the place of one of the same kind at the same token. */
  live.add = (change) => {
    const alike = (one) => one.position === change.position && one.atom === change.atom && (one.op === change.op || change.op === "scale" || one.op === "scale");
    const whole = (one) => one.position === change.position && isWhole(one) && isWhole(change);
    live.change([...live.changes.filter((one) => !alike(one) && !whole(one)), change]);
    AtomPage.say(`Changed: token ${change.position}`);
  };
  const isWhole = (change) => change.op === "replace" || change.atom === null;

  // --- the page -----------------------------------------------------------------------------------------------------

  live.front = (front) => document.body.classList.toggle("front", front);

  live.show = (prompting) => {
    document.body.classList.toggle("prompting", prompting);
    for (const button of document.querySelectorAll(".modes button")) {
      button.setAttribute("aria-pressed", String((button.dataset.mode === "prompt") === prompting));
    }
  };

  live.start = () => {
    const { el } = AtomPage, text = byId("live-text"), form = byId("live-form");
    document.querySelector(".panes").prepend(byId("live"));
    document.body.classList.remove("live"); // it is one of the panes now, which scroll by themselves
    const mode = (name, label) => el("button", { type: "button", "data-mode": name, "aria-pressed": "false", onclick: () => {
      live.front(true);
      live.show(name === "prompt");
    } }, label);
    document.querySelector(".titles").after(el("div", { class: "modes", role: "group", "aria-label": "Beside the open atom" }, mode("atoms", "Atoms"), mode("prompt", "Prompt")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (text.value) live.read(text.value);
      else live.wrong("the prompt is empty: type some text first");
    });
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    live.front(AtomPage.current() === null);
    live.show(true);
    if (text.value) live.read(text.value);
  };
})();
