"use strict";
/* Colours, keys, the dialog, and the start. */

(() => {
  const { byId } = AtomPage;
  const THEMES = ["auto", "light", "dark"], KEY = "writesae-theme";

  function remembered() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // a page from a file or in a frame may have no storage
    }
  }

  function useTheme(theme) {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
    byId("theme").setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}`);
    byId("theme").dataset.now = theme;
    AtomPage.tell("theme", theme);
  }

  byId("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(byId("theme").dataset.now) + 1) % THEMES.length];
    try {
      localStorage.setItem(KEY, next);
    } catch {
      // then it lasts as long as the page
    }
    useTheme(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => AtomPage.tell("theme", "auto"));

  const dialog = byId("about");
  byId("about-open").addEventListener("click", () => {
    dialog.showModal();
    byId("about-title").focus(); // else the first thing that scrolls takes the focus, and what stands above is out of sight
    dialog.scrollTop = 0;
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest && event.target.closest("input, textarea, select, dialog");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing) {
      if (event.key === "Escape" && event.target.id === "search" && event.target.value) AtomPage.change({ q: "" });
      return;
    }
    if (event.key === "/") {
      event.preventDefault();
      byId("search").focus();
      byId("search").select();
    } else if (event.key === "j" || event.key === "k") {
      const atom = AtomPage.neighbourInList(event.key === "j" ? 1 : -1);
      if (atom !== null) AtomPage.open(atom);
    }
  });

  document.querySelector("[data-skip]").addEventListener("click", (event) => {
    event.preventDefault(); // the address is the page's state, not a place
    byId("atom-pane").focus();
  });

  const theme = remembered();
  useTheme(THEMES.includes(theme) ? theme : "auto");
  AtomPage.startTable();
  AtomPage.startAtom();
  AtomPage.startState();
})();
