// Tables that are wider than the screen say so: a line above them, until the end has been seen.
(function () {
  document.addEventListener("DOMContentLoaded", function () {
    for (const box of document.querySelectorAll(".scroll")) {
      const hint = document.createElement("p");
      hint.className = "hint";
      hint.textContent = document.body.dataset.scrollHint;
      box.before(hint);
      let seen = false;
      const look = function () {
        const hidden = box.scrollWidth - box.clientWidth;
        seen = seen || (hidden > 1 && box.scrollLeft >= hidden - 1);
        hint.hidden = seen || hidden <= 1;
        box.classList.toggle("more", hidden - box.scrollLeft > 1);
        if (hidden > 1) box.tabIndex = 0; else box.removeAttribute("tabindex");
      };
      box.addEventListener("scroll", look, { passive: true });
      new ResizeObserver(look).observe(box);
      look();
    }
  });
})();
