"use strict";
// Light or dark: as the system says, until the reader chooses. A page from a disk may have no storage.
(() => {
  const KEY = "harness-theme", root = document.documentElement;
  const kept = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const keep = (value) => { try { localStorage.setItem(KEY, value); } catch { /* this page only */ } };
  if (kept()) root.dataset.theme = kept();
  window.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      keep(root.dataset.theme);
      if (window.HARNESS && window.HARNESS.recolour) window.HARNESS.recolour();
    });
  });
})();
