"use strict";
(() => {
  const articles = [...document.querySelectorAll("article")];
  const slider = document.getElementById("budget");
  if (slider) {
    slider.parentElement.hidden = false;
    const show = () => {
      articles.forEach((each, place) => { each.hidden = place !== Number(slider.value); });
      const budget = articles[Number(slider.value)].dataset.budget;
      slider.parentElement.querySelector("output").textContent = budget;
      slider.setAttribute("aria-valuetext", budget);
    };
    slider.addEventListener("input", show);
    show();
  }
  for (const map of document.querySelectorAll("svg.heat")) {
    const readout = map.parentElement.querySelector(".readout");
    const cells = [...map.querySelectorAll("title")].map((title) => title.parentElement);
    const rows = new Map();
    for (const cell of cells) {
      const row = cell.textContent.split(",")[0].split(":")[0];
      rows.set(row, (rows.get(row) || 0) + 1);
    }
    const wide = rows.values().next().value;
    let at = 0;
    const say = (place) => {
      cells[at].classList.remove("at");
      at = Math.min(Math.max(place, 0), cells.length - 1);
      cells[at].classList.add("at");
      readout.textContent = cells[at].textContent;
    };
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide };
    map.setAttribute("tabindex", "0");
    map.addEventListener("keydown", (event) => {
      if (event.key in steps) { event.preventDefault(); say(at + steps[event.key]); }
    });
    map.addEventListener("pointerover", (event) => {
      const place = cells.indexOf(event.target);
      if (place >= 0) say(place);
    });
  }
})();
