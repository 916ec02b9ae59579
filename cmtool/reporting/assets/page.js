"use strict";
// One slider for each run: it shows the grid of the step it stands on. Arrow keys move it (it is a range input).
for (const box of document.querySelectorAll(".slider")) {
  const frames = JSON.parse(box.querySelector("script").textContent);
  const input = box.querySelector("input"), image = box.querySelector("img"), output = box.querySelector("output");
  if (!input) continue; // a single grid has nothing to slide through
  input.addEventListener("input", () => {
    const frame = frames[input.value];
    image.src = frame.uri;
    image.alt = "samples at step " + frame.step;
    output.textContent = "step " + frame.step;
  });
}
