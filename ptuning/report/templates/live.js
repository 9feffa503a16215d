// The run goes on and writes this file again: load it while somebody looks at it, and say so when it has gone silent. What was
// opened and where the page stood is kept over a load.
(function () {
  const SILENT = 10 * 60e3, place = "ptuning-report:" + location.pathname;
  document.addEventListener("DOMContentLoaded", function () {
    const live = document.querySelector(".live"), silent = document.getElementById("silent");
    const folds = Array.from(document.querySelectorAll("details"));
    try {
      const kept = JSON.parse(sessionStorage.getItem(place));
      sessionStorage.removeItem(place);
      if (kept) {
        folds.forEach((fold, i) => { if (i in kept.open) fold.open = kept.open[i]; });
        history.scrollRestoration = "manual";
        scrollTo(0, kept.y);
      }
    } catch { /* nothing kept */ }
    const look = function () {
      const quiet = Date.now() - live.dataset.written;
      silent.hidden = quiet < SILENT;
      silent.textContent = silent.dataset.words.replace("#", Math.floor(quiet / 60e3));
    };
    const load = function () {
      look();
      if (document.hidden || !getSelection().isCollapsed) return;
      try {
        sessionStorage.setItem(place, JSON.stringify({ y: scrollY, open: folds.map((fold) => fold.open) }));
      } catch { /* not kept */ }
      location.reload();
    };
    look();
    setInterval(load, live.dataset.reload * 1000);
    document.addEventListener("visibilitychange", function () { if (!document.hidden) load(); });
  });
})();
