// Draws each chart where its data lies. Colours are the style's variables, so light, dark and paper need nothing here.
"use strict";
const problems = [];
window.addEventListener("error", (event) => problems.push(event.message));
window.addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => problems.push(`refused: ${event.violatedDirective}`));

const tip = document.getElementById("tip");
function showTip(handler, event, item, value) {
  if (value === null || value === undefined || value === "") {
    tip.hidden = true;
    return;
  }
  const lines = typeof value === "object" ? Object.entries(value).map(([key, of]) => `${key}: ${of}`) : [String(value)];
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = event.clientY + 18 + tip.offsetHeight > window.innerHeight;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${above ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18}px`;
}

async function draw(figure) {
  const place = figure.querySelector(".chart");
  const spec = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  await vegaEmbed(place, spec, {
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip: showTip,
  });
  const drawn = place.querySelector("svg");
  drawn.setAttribute("aria-hidden", "true"); // the frame says what it is, and the table below it the figures
  drawn.removeAttribute("role");
}

async function drawAll() {
  for (const figure of document.querySelectorAll("figure")) {
    try {
      await draw(figure);
    } catch (error) {
      problems.push(`${figure.id}: ${error.message}`);
      figure.querySelector("details").open = true;
    }
  }
  document.documentElement.dataset.charts = problems.length ? problems.join("; ") : "drawn";
}

let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details[data-print]:not([open])")];
  opened.forEach((one) => { one.open = true; });
});
window.addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
drawAll();
