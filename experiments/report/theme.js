"use strict";
// Light or dark: the reader's choice, else the system's. Others are told by the event "themechange" on document.

const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const printing = matchMedia("print");

/** What was chosen before on this page, if the browser lets a file remember it. */
function storedTheme() {
  try { return localStorage.getItem("cut-theme"); } catch { return null; }
}

/** Whether the page is dark now; paper never is. */
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return !printing.matches && (chosen ? chosen === "dark" : darkSystem.matches);
}

/** Set the theme; null follows the system. */
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  document.getElementById("theme").setAttribute("aria-pressed", String(isDark()));
  document.dispatchEvent(new Event("themechange"));
}

/** A colour of the style sheet, resolved for the theme: --name to rgb(...). */
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function startTheme() {
  const stored = storedTheme();
  setTheme(stored === "dark" || stored === "light" ? stored : null);
  document.getElementById("theme").addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    try { localStorage.setItem("cut-theme", next); } catch { /* nothing is remembered then */ }
    setTheme(next);
  });
  darkSystem.addEventListener("change", () => setTheme(document.documentElement.dataset.theme ?? null));
}
