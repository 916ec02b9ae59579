"use strict";
const token = document.currentScript.dataset.token;
const $ = (id) => document.getElementById(id);
const photo = $("photo"), mask = $("mask");
const names = { inpaint: "Inpaint", colorize: "Colorize", superres: "Super-resolution", stroke: "From strokes", denoise: "Denoise" };
const named = (task) => names[task] || task;
let side = 0, gray = false, history = [];

async function ask(action, asked) {
  const answer = await fetch("api/" + action, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Token": token },
    body: JSON.stringify(asked),
  });
  const document = await answer.json();
  if (!answer.ok) throw new Error(document.error);
  return document;
}

function say(text, bad) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", Boolean(bad));
}

// One thing at a time; what goes wrong is said where the person looks.
async function busy(words, work) {
  const buttons = [...document.querySelectorAll("button")];
  buttons.forEach((button) => (button.disabled = true));
  say(words + " ...");
  const start = performance.now();
  try {
    await work();
    say("done in " + ((performance.now() - start) / 1000).toFixed(1) + " s");
  } catch (error) {
    say(error.message, true);
  }
  buttons.forEach((button) => (button.disabled = false));
}

// Words stay whole where the line breaks: "--" at the end of a line reads as another option.
function told(answer) {
  const words = answer.command.split(" ").map((word) => Object.assign(document.createElement("span"), { textContent: word }));
  $("command").replaceChildren(...words.flatMap((word, i) => (i ? [" ", word] : [word])));
  const script = "data:text/plain;charset=utf-8," + encodeURIComponent(answer.command + "\n");
  const links = [{ name: "command.txt", uri: script }, ...answer.inputs].map(({ name, uri }) => link(name, uri, name));
  $("inputs").replaceChildren("Save: ", ...links);
}

function remember() {
  history.push([photo, mask].map((canvas) => canvas.getContext("2d").getImageData(0, 0, side, side)));
  if (history.length > 40) history.shift();
}

function draw(uri) {
  return new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => {
      remember();
      const pen = photo.getContext("2d"), short = Math.min(image.width, image.height);
      pen.imageSmoothingEnabled = image.width !== side;
      pen.imageSmoothingQuality = "high";
      pen.clearRect(0, 0, side, side); // a transparent picture shows nothing of the one before
      pen.drawImage(image, (image.width - short) / 2, (image.height - short) / 2, short, short, 0, 0, side, side);
      done();
    };
    image.onerror = () => failed(new Error("this file is no picture that the browser knows."));
    image.src = uri;
  });
}

function place(event) {
  const box = $("board").getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * side, ((event.clientY - box.top) / box.height) * side];
}

// Hard squares and not the canvas' own soft lines: a pixel is painted or not, and masks stay black and white.
function dab(x, y) {
  const painting = $("brush").value === "paint", pen = (painting ? photo : mask).getContext("2d");
  const size = Number($("size").value);
  pen.fillStyle = painting ? (gray ? grayOf($("color").value) : $("color").value) : "#ff3b9a";
  pen.fillRect(Math.round(x - size / 2), Math.round(y - size / 2), size, size);
}

function grayOf(color) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  const luma = Math.round(0.299 * r + 0.587 * g + 0.114 * b);
  return `rgb(${luma} ${luma} ${luma})`;
}

function stroke(from, to) {
  const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) * 2));
  for (let i = 0; i <= steps; i++) dab(from[0] + ((to[0] - from[0]) * i) / steps, from[1] + ((to[1] - from[1]) * i) / steps);
}

let last = null;
$("board").addEventListener("pointerdown", (event) => {
  $("board").setPointerCapture(event.pointerId);
  remember();
  last = place(event);
  stroke(last, last);
});
$("board").addEventListener("pointermove", (event) => {
  if (last === null) return;
  const next = place(event);
  stroke(last, next);
  last = next;
});
for (const name of ["pointerup", "pointercancel"]) $("board").addEventListener(name, () => (last = null));

const painted = (canvas) => canvas.getContext("2d").getImageData(0, 0, side, side).data.filter((_, i) => i % 4 === 3);

// Without a stroke of the mask, what is transparent in the picture is generated.
const erased = () => painted(mask).every((alpha) => alpha === 0) && painted(photo).some((alpha) => alpha < 255);

function maskUri() {
  const copy = document.createElement("canvas");
  copy.width = copy.height = side;
  const pen = copy.getContext("2d"), pixels = mask.getContext("2d").getImageData(0, 0, side, side);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const white = pixels.data[i + 3] > 0 ? 255 : 0;
    pixels.data.set([white, white, white, 255], i);
  }
  pen.putImageData(pixels, 0, 0);
  return copy.toDataURL("image/png");
}

function link(name, uri, text) {
  const anchor = document.createElement("a");
  anchor.href = uri;
  anchor.download = name;
  anchor.textContent = text;
  return anchor;
}

function show(images, task) {
  $("results").replaceChildren(
    ...images.map((uri, index) => {
      const figure = document.createElement("figure"), image = new Image(), row = document.createElement("div");
      image.src = uri;
      image.alt = named(task) + ", answer " + (index + 1);
      row.className = "row";
      const use = document.createElement("a");
      use.href = "#";
      use.textContent = "use";
      use.addEventListener("click", (event) => {
        event.preventDefault();
        draw(uri).catch((error) => say(error.message, true));
      });
      row.append(link(`${task}-${index + 1}.png`, uri, "download"), use);
      figure.append(image, row);
      return figure;
    }),
  );
}

function edit(task) {
  return busy(named(task), async () => {
    const asked = { task, picture: photo.toDataURL("image/png"), num: $("num").value, seed: $("seed").value, label: $("class").value };
    if (task === "inpaint" && !erased()) asked.mask = maskUri();
    if (task === "superres") asked.factor = $("factor").value;
    if (task === "denoise") asked.sigma = $("sigma").value;
    const answer = await ask("edit", asked);
    show(answer.images, task);
    told(answer);
  });
}

let walking = false, again = false;
async function walk() {
  // Only the newest place is asked for while an answer is under way.
  if (walking) return (again = true);
  walking = true;
  do {
    again = false;
    try {
      const answer = await ask("walk", { from: $("from").value, to: $("to").value, place: $("place").value, label: $("class").value });
      $("walk").src = answer.images[0];
      $("walked").hidden = false;
      $("walk-link").replaceChildren(link(`walk-${$("place").value}.png`, answer.images[0], "download"));
      told(answer);
    } catch (error) {
      say(error.message, true);
    }
  } while (again);
  walking = false;
}
for (const id of ["place", "from", "to"]) $(id).addEventListener("input", walk);
$("class").addEventListener("change", () => $("walked").hidden || walk());
$("color").addEventListener("input", () => ($("brush").value = "paint"));

let next = 0;
const fresh = () =>
  busy("Sampling", async () => {
    const answer = await ask("sample", { seed: next++, label: $("class").value });
    await draw(answer.images[0]);
    told(answer);
  });
$("new").addEventListener("click", fresh);
$("open").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (file) draw(URL.createObjectURL(file)).catch((error) => say(error.message, true));
});
$("wipe").addEventListener("click", () => {
  remember();
  $("brush").value = "paint";
  const pen = photo.getContext("2d");
  pen.fillStyle = "#808080";
  pen.fillRect(0, 0, side, side);
});
$("unmask").addEventListener("click", () => {
  remember();
  mask.getContext("2d").clearRect(0, 0, side, side);
});
const undo = () => {
  const before = history.pop();
  if (before) [photo, mask].forEach((canvas, i) => canvas.getContext("2d").putImageData(before[i], 0, 0));
};
$("undo").addEventListener("click", undo);
document.addEventListener("keydown", (event) => {
  if (event.key !== "z" || !(event.ctrlKey || event.metaKey) || event.target.type === "number") return;
  event.preventDefault();
  undo();
});
$("copy").addEventListener("click", () =>
  navigator.clipboard.writeText($("command").textContent).then(() => say("copied"), () => say("the browser did not allow copying", true)));
async function begin() {
  const about = await ask("about", {});
  side = about.side;
  gray = about.channels === 1;
  $("about").textContent = `${about.name}, ${side} x ${side}${gray ? ", gray" : ""}`;
  for (const canvas of [photo, mask]) canvas.width = canvas.height = side;
  $("size").max = Math.max(2, Math.floor(side / 3));
  $("size").value = Math.max(1, Math.round(side / 8));
  $("class").append(...about.classes.map((name) => new Option(name, name)));
  $("class-label").hidden = !about.classes.length;
  $("factor").append(...about.factors.map((factor) => new Option(factor + " times", factor)));
  for (const task of about.tasks) {
    const button = document.createElement("button");
    button.id = task;
    button.textContent = named(task);
    button.addEventListener("click", () => edit(task));
    $("tasks").append(button);
  }
  photo.getContext("2d", { willReadFrequently: true });
  await fresh();
  history = [];
}
begin().catch((error) => say(error.message, true));
