"use strict";
// Draws the figures that stand as JSON in the page, in the colours of the style sheet.
const root = document.documentElement;
const figures = [...document.querySelectorAll("script[data-figure]")].map((script) => ({
  place: document.getElementById(script.dataset.figure),
  ...JSON.parse(script.textContent),
}));

// Replaces every "var(--name)" by its present value: plotly knows no CSS variables.
function painted(value, style) {
  if (typeof value === "string" && value.startsWith("var(")) {
    return style.getPropertyValue(value.slice(4, -1)).trim();
  }
  if (Array.isArray(value)) return value.map((item) => painted(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, style)]));
}

function draw(some) {
  const style = getComputedStyle(root);
  for (const figure of some) {
    figure.drawn = true;
    Plotly.react(figure.place, painted(figure.data, style), painted(figure.layout, style), {
      responsive: true,
      displayModeBar: false,
    });
  }
}

// A figure is drawn when it is about to come into view: the page is there at once.
const watch = new IntersectionObserver((entries) => {
  const near = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
  draw(figures.filter((figure) => near.includes(figure.place) && !figure.drawn));
}, { rootMargin: "800px" });
for (const figure of figures) watch.observe(figure.place);

const slider = document.getElementById("epoch");
if (slider) {
  const steps = slider.dataset.steps.split(",");
  slider.addEventListener("input", () => {
    const at = Number(slider.value);
    slider.nextElementSibling.value = steps[at];
    slider.setAttribute("aria-valuetext", `epoch ${steps[at]}`);
    for (const figure of figures.filter((f) => f.frames.length)) {
      figure.data[0].z = figure.frames[at];
      if (figure.drawn) Plotly.restyle(figure.place, { z: [figure.frames[at]] }, [0]);
    }
  });
}

// Paper is white: print in light colours, whatever the screen shows.
addEventListener("beforeprint", () => { root.classList.add("paper"); draw(figures); });
addEventListener("afterprint", () => { root.classList.remove("paper"); draw(figures); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  draw(figures.filter((figure) => figure.drawn));
});
