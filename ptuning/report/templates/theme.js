// Light or dark: the system's choice, until the button says otherwise. Storage may be closed to pages from disk.
(function () {
  const root = document.documentElement, key = "ptuning-report-theme";
  try { const kept = localStorage.getItem(key); if (kept) root.dataset.theme = kept; } catch { /* not kept */ }
  document.addEventListener("DOMContentLoaded", function () {
    const button = document.querySelector(".theme");
    button.hidden = false;
    const isDark = () => root.dataset.theme
      ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    button.addEventListener("click", function () {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem(key, root.dataset.theme); } catch { /* not kept */ }
    });
  });
})();
