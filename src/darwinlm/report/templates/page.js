// Shows tooltips immediately: browsers delay those of <title>, and phones do not show them.
(() => {
  const tip = document.getElementById("tip");
  for (const title of document.querySelectorAll("svg.plot title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }
  const show = (event) => {
    const mark = event.target.closest?.("[data-tip]");
    if (!mark) {
      tip.hidden = true;
      return;
    }
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight, room = document.documentElement.clientWidth;
    tip.style.left = Math.max(8, Math.min(event.clientX - width / 2, room - width - 8)) + "px";
    tip.style.top = (event.clientY > height + 24 ? event.clientY - height - 14 : event.clientY + 20) + "px";
  };
  for (const name of ["pointermove", "pointerdown"]) document.addEventListener(name, show);
  for (const name of ["pointerleave", "scroll"]) document.addEventListener(name, () => (tip.hidden = true), true);
})();
