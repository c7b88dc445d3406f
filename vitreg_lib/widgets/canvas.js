// One model's panels: attention over the image, norms, components, neighbour similarity, histogram with the cutoff.
// State lives in Python: `view` comes whole, choices go back as messages {kind: query | cutoff | upload}. Only what must
// follow the pointer at once (hover, a cutoff being dragged, the overlay's opacity) is drawn from here.

const SIZE = 288; // pixels of a panel's canvas; the page scales it
const OUTLIER = "#56B4E9";
const HISTOGRAM = [54, 10, 8, 30]; // margins of the histogram's canvas of 400 x 288: left, right, top, bottom
const PANELS = ["attention", "norms", "components", "similarity"];

const floats = (data) => {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
  return new Float32Array(bytes.buffer);
};
const bytesOf = (data) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
const short = (value) => String(Number(Math.abs(value) < 1 ? value.toFixed(2) : value.toPrecision(3)));
const percent = (value) => `${(100 * value).toFixed(1)} %`;

function element(parent, tag, name, attributes = {}) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

/** A canvas of `width` x `height` pixels from RGB bytes. */
function fromRGB(rgb, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    image.data.set(rgb.subarray(3 * i, 3 * i + 3), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** RGB bytes of values on a palette of 256 colours, from `low` to `high`. */
function coloured(values, palette, low, high) {
  const rgb = new Uint8Array(3 * values.length);
  values.forEach((value, i) => {
    const step = Math.round((255 * (value - low)) / (high - low));
    rgb.set(palette.subarray(3 * Math.min(255, Math.max(0, step)), 3 * Math.min(255, Math.max(0, step)) + 3), 3 * i);
  });
  return rgb;
}

const limits = ({ low, high }) => [low, high];

/** The picture of a map to lay over the image: at opacity 1 all of it, below that the low values fade first. */
function overlay(view, opacity) {
  const [rows, cols] = view.grid;
  const picture = fromRGB(view.overlay, cols, rows);
  const pen = picture.getContext("2d");
  const image = pen.getImageData(0, 0, cols, rows);
  const { low, high } = view.scales.attention;
  view.attention.forEach((value, i) => {
    const strength = Math.min(1, Math.max(0, (value - low) / (high - low)));
    image.data[4 * i + 3] = 255 * opacity ** (3 - 2 * strength);
  });
  pen.putImageData(image, 0, 0);
  return picture;
}

function gradient(palette) {
  const stops = [];
  for (let i = 0; i <= 8; i++) stops.push(`rgb(${palette.subarray(3 * ((255 * i) >> 3), 3 * ((255 * i) >> 3) + 3).join(",")})`);
  return `linear-gradient(to right, ${stops.join(",")})`;
}

function build(el) {
  const root = element(el, "div", "vr-card", { "data-lm-suppress-shortcuts": "true" });
  const page = { root, parts: {} };
  const head = element(root, "div", "vr-head");
  for (const name of ["label", "role", "verdict", "title"]) page.parts[name] = element(head, "span", `vr-${name}`, { "data-name": name });
  page.parts.notes = element(root, "div", "vr-notes", { "data-name": "notes", role: "status" });
  const row = element(root, "div", "vr-row");
  page.maps = element(row, "div", "vr-maps", { tabindex: "0", role: "application" });
  page.panels = {};
  for (const key of PANELS) {
    const figure = element(page.maps, "figure", "vr-panel");
    const panel = { title: element(figure, "figcaption", "vr-panel-title") };
    const frame = element(figure, "div", "vr-frame");
    panel.canvas = element(frame, "canvas", "", { "data-panel": key, "aria-hidden": "true" });
    panel.reason = element(frame, "div", "vr-reason", { "data-reason": key }); // why there is no map
    const legend = element(figure, "div", "vr-legend");
    for (const name of ["low", "bar", "high"]) panel[name] = element(legend, "span", `vr-${name}`);
    page.panels[key] = panel;
  }
  const figure = element(row, "figure", "vr-panel vr-histogram");
  page.panels.histogram = { title: element(figure, "figcaption", "vr-panel-title") };
  page.histogram = element(figure, "canvas", "", { "data-panel": "histogram", tabindex: "0", role: "slider" });
  const legend = element(figure, "div", "vr-legend");
  element(legend, "span", "").textContent = "L2 norm (grey: all images)";
  page.parts.above = element(figure, "div", "vr-above", { "data-name": "above" });
  const read = element(root, "div", "vr-read");
  page.parts.patch = element(read, "span", "vr-patch", { "data-name": "patch" });
  for (const [name, text] of [["norm", "norm"], ["rank", "rank"], ["attention", "attention"], ["similarity", "similarity"]]) {
    const item = element(read, "span", "vr-number");
    element(item, "span", "vr-key").textContent = text;
    page.parts[name] = element(item, "b", "", { "data-name": name });
  }
  const budget = element(root, "div", "vr-read vr-budget");
  element(budget, "span", "vr-patch").textContent = "The query's attention goes to";
  page.shares = element(budget, "span", "vr-shares", { "aria-hidden": "true" });
  for (const name of ["cls", "registers", "outliers", "patches"]) {
    element(page.shares, "i", `vr-share vr-${name}`);
    const item = element(budget, "span", "vr-number");
    element(item, "i", `vr-dot vr-${name}`);
    element(item, "span", "vr-key").textContent = name === "patches" ? "the rest" : name;
    page.parts[`on-${name}`] = element(item, "b", "", { "data-name": `on-${name}` });
  }
  return page;
}

function render({ model, el }) {
  const page = build(el);
  let view = null; // what Python sent, with its maps decoded
  let hover = null; // [row, col] under the pointer
  let dragged = null; // the cutoff while it is being dragged
  let waiting = false; // a query was sent and its view has not come: the last one wanted is sent then
  let wanted = null;

  const cutoff = () => (dragged !== null ? dragged : view.cutoff);
  const isOutlier = (i) => cutoff() !== null && view.norms[i] > cutoff();

  function decode() {
    const sent = model.get("view");
    if (!sent || !sent.grid) return false;
    const palettes = Object.fromEntries(Object.entries(model.get("palettes")).map(([k, v]) => [k, bytesOf(v)]));
    const [rows, cols] = sent.grid;
    view = { ...sent, pictures: {} };
    for (const name of ["attention", "norms", "similarity", "share", "edges", "counts", "set_counts"]) view[name] = floats(sent[name]);
    for (const key of PANELS) page.panels[key].canvas.parentElement.parentElement.classList.toggle("vr-off", key in sent.missing);
    for (const [name, { palette, low, high }] of Object.entries(sent.scales)) {
      if (name !== "attention") view.pictures[name] = fromRGB(coloured(view[name], palettes[palette], low, high), cols, rows);
      const panel = page.panels[name];
      panel.bar.style.background = gradient(palettes[palette]);
      panel.low.textContent = short(low);
      panel.high.textContent = short(high);
    }
    const components = page.panels.components;
    if (sent.component) {
      view.pictures.components = fromRGB(coloured(floats(sent.components), palettes.RdBu_r, -3, 3), cols, rows);
      components.bar.style.background = gradient(palettes.RdBu_r);
    } else {
      view.pictures.components = fromRGB(bytesOf(sent.components), cols, rows);
      components.bar.style.background = "linear-gradient(to right, red 33%, lime 33% 66%, blue 66%)";
    }
    components.low.textContent = "−3";
    components.high.textContent = "3 σ";
    view.overlay = coloured(view.attention, palettes[sent.scales.attention.palette], ...limits(sent.scales.attention));
    view.image = fromRGB(bytesOf(sent.pixels), sent.size[1], sent.size[0]);
    return true;
  }

  function drawPanel(key) {
    const { canvas } = page.panels[key];
    const [rows, cols] = view.grid;
    const width = SIZE;
    const height = Math.round((SIZE * rows) / cols);
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.clearRect(0, 0, width, height);
    if (key === "attention") pen.drawImage(view.image, 0, 0, width, height);
    pen.imageSmoothingEnabled = false;
    if (!(key in view.missing))
      pen.drawImage(key === "attention" ? overlay(view, model.get("opacity")) : view.pictures[key], 0, 0, width, height);
    pen.imageSmoothingEnabled = true;
    const square = (row, col, colour, wide, inset = 0) => {
      const [w, h] = [width / cols, height / rows];
      for (const [line, style] of [[wide + 2.5, "#000"], [wide, colour]]) {
        pen.lineWidth = line;
        pen.strokeStyle = style;
        pen.strokeRect(col * w + inset, row * h + inset, w - 2 * inset, h - 2 * inset);
      }
    };
    if (key === "attention" || key === "norms")
      for (let i = 0; i < rows * cols; i++) if (isOutlier(i)) square(Math.floor(i / cols), i % cols, OUTLIER, 2, 2);
    if (view.patch) square(view.patch[0], view.patch[1], "#fff", 4);
    if (hover) square(hover[0], hover[1], "#ffd166", 2, -2);
  }

  function drawHistogram() {
    const canvas = page.histogram;
    const [width, height] = [400, 288];
    if (canvas.width !== width) [canvas.width, canvas.height] = [width, height];
    const pen = canvas.getContext("2d");
    const ink = getComputedStyle(page.root).color;
    const [left, right, top, bottom] = HISTOGRAM;
    const high = view.edges[view.edges.length - 1];
    const most = Math.max(...view.counts, ...view.set_counts);
    const x = (norm) => left + (norm / high) * (width - left - right);
    const y = (share) => height - bottom - Math.sqrt(share / most) * (height - top - bottom);
    pen.clearRect(0, 0, width, height);
    pen.font = "21px sans-serif";
    pen.fillStyle = pen.strokeStyle = ink;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const share of [0.01, 0.05, 0.2, 0.5].filter((s) => s < most)) {
      pen.globalAlpha = 0.2;
      pen.fillRect(left, y(share), width - left - right, 1);
      pen.globalAlpha = 0.85;
      pen.fillText(`${100 * share}%`, left - 5, y(share));
    }
    pen.globalAlpha = 0.3;
    view.set_counts.forEach((share, i) => pen.fillRect(x(view.edges[i]), y(share), x(view.edges[i + 1]) - x(view.edges[i]), y(0) - y(share)));
    pen.globalAlpha = 1;
    pen.lineWidth = 2.5;
    pen.strokeStyle = "#3b8fd4";
    pen.beginPath();
    pen.moveTo(x(0), y(0));
    view.counts.forEach((share, i) => {
      pen.lineTo(x(view.edges[i]), y(share));
      pen.lineTo(x(view.edges[i + 1]), y(share));
    });
    pen.stroke();
    pen.globalAlpha = 0.85;
    pen.fillRect(left, y(0), width - left - right, 1.5);
    pen.textBaseline = "top";
    pen.textAlign = "center";
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500].find((s) => high / s <= 5) || high;
    for (let norm = 0; norm <= high; norm += step) pen.fillText(short(norm), Math.max(x(norm), left + 5), y(0) + 6);
    pen.globalAlpha = 1;
    const at = cutoff() === null || cutoff() > high ? high : cutoff(); // at the edge where there is none
    pen.fillStyle = "#d55e00";
    if (cutoff() === null) pen.globalAlpha = 0.45;
    pen.fillRect(x(at) - 1.5, top, 3, y(0) - top);
    pen.beginPath();
    pen.arc(x(at), top + 10, 8, 0, 7);
    pen.fill();
    pen.globalAlpha = 1;
    const count = [...view.norms].filter((norm, i) => isOutlier(i)).length;
    const how = dragged !== null || !view.by_rule ? "by hand" : "by rule";
    const text = cutoff() === null ? "cutoff: none by rule" : `cutoff ${short(cutoff())} ${how}`;
    page.parts.above.textContent = `outliers: ${count} of ${view.norms.length} (${percent(count / view.norms.length)})`;
    page.panels.histogram.title.textContent = text;
    page.panels.histogram.title.dataset.name = "cutoff";
    for (const [key, value] of [["valuemin", 0], ["valuemax", short(high)], ["valuenow", short(at)], ["valuetext", text]])
      canvas.setAttribute(`aria-${key}`, value);
    canvas.setAttribute("aria-label", `cutoff of norms, ${view.label}`);
  }

  function drawNumbers() {
    const parts = page.parts;
    for (const name of ["label", "role", "verdict", "title"]) parts[name].textContent = view[name];
    parts.verdict.title = view.because;
    for (const key of PANELS) page.panels[key].reason.textContent = view.missing[key] || "";
    parts.notes.textContent = view.notes.join("; ");
    page.maps.setAttribute("aria-label", `Patches of ${view.label}. ${view.replayed ? "" : "Arrow keys move the query patch, Home asks cls. "}${view.title}`);
    const titles = { attention: "attention (× even)", norms: "norm (L2)", similarity: "neighbour similarity" };
    titles.components = view.component ? `component ${view.component} (σ)` : "components 1 to 3";
    for (const key of PANELS) page.panels[key].title.textContent = titles[key];
    const at = hover || view.patch;
    parts.patch.textContent = at ? `Patch (${at[0]}, ${at[1]})` : `Point at a patch${view.replayed ? "" : ", or click to ask it"}`;
    page.maps.classList.toggle("vr-replayed", view.replayed);
    const i = at ? at[0] * view.grid[1] + at[1] : 0;
    parts.norm.textContent = at ? short(view.norms[i]) : "–";
    parts.rank.textContent = at ? `${1 + view.norms.filter((norm) => norm > view.norms[i]).length} of ${view.norms.length}` : "–";
    parts.attention.textContent = at && view.budget ? `${(100 * view.share[i]).toPrecision(3)} % (${short(view.attention[i])} × even)` : "–";
    parts.similarity.textContent = at && !view.missing.similarity ? view.similarity[i].toFixed(2) : "–";
    const none = { cls: null, registers: null, outliers: null, patches: null }; // the query was not measured
    const shares = { ...(view.budget || none) };
    if (dragged !== null && view.budget) {
      const [total, on] = [shares.outliers + shares.patches, [...view.share].reduce((sum, s, i) => sum + (isOutlier(i) ? s : 0), 0)];
      [shares.outliers, shares.patches] = [on, total - on];
    }
    for (const [name, share] of Object.entries(shares)) {
      parts[`on-${name}`].textContent = share === null ? "–" : percent(share);
      page.shares.querySelector(`.vr-${name}`).style.width = `${100 * (share || 0)}%`;
    }
  }

  function draw() {
    if (!view) return;
    PANELS.forEach(drawPanel);
    drawHistogram();
    drawNumbers();
    page.root.dataset.opacity = model.get("opacity");
    page.root.view = view; // what is drawn, for who looks at the page from a script
  }

  function onView() {
    if (!decode()) return;
    dragged = null;
    waiting = false;
    draw();
    page.root.dataset.serial = view.serial;
    if (wanted) [wanted] = [null, ask(wanted)];
  }

  function ask(query) {
    if (waiting) wanted = query;
    else {
      waiting = true;
      model.send({ kind: "query", query });
    }
  }

  function cell(event) {
    const box = event.target.getBoundingClientRect();
    const at = (position, size, count) => Math.max(0, Math.min(count - 1, Math.floor((position / size) * count)));
    return [at(event.clientY - box.top, box.height, view.grid[0]), at(event.clientX - box.left, box.width, view.grid[1])];
  }

  for (const key of PANELS) {
    const { canvas } = page.panels[key];
    canvas.addEventListener("pointermove", (event) => {
      if (!view) return;
      const at = cell(event);
      if (hover && hover[0] === at[0] && hover[1] === at[1]) return;
      hover = at;
      draw();
    });
    canvas.addEventListener("pointerleave", () => ((hover = null), draw()));
    canvas.addEventListener("click", (event) => view && ask(cell(event)));
  }
  page.maps.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!view || (!step && event.key !== "Home")) return;
    event.preventDefault();
    event.stopPropagation();
    if (!step) return ask(null);
    const [rows, cols] = view.grid;
    const [row, col] = wanted || view.patch || [(rows >> 1) - step[0], (cols >> 1) - step[1]];
    ask([Math.max(0, Math.min(rows - 1, row + step[0])), Math.max(0, Math.min(cols - 1, col + step[1]))]);
  });

  const normAt = (event) => {
    const box = page.histogram.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 400;
    const high = view.edges[view.edges.length - 1];
    return Math.max(0, Math.min(high, ((x - HISTOGRAM[0]) / (400 - HISTOGRAM[0] - HISTOGRAM[1])) * high));
  };
  page.histogram.addEventListener("pointerdown", (event) => {
    if (!view) return;
    page.histogram.setPointerCapture(event.pointerId);
    dragged = normAt(event);
    draw();
  });
  page.histogram.addEventListener("pointermove", (event) => {
    if (dragged === null || !page.histogram.hasPointerCapture(event.pointerId)) return;
    dragged = normAt(event);
    draw();
  });
  page.histogram.addEventListener("pointerup", () => dragged !== null && model.send({ kind: "cutoff", value: dragged }));
  page.histogram.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (!view || (!step && event.key !== "Home")) return;
    event.preventDefault();
    event.stopPropagation();
    if (!step) return model.send({ kind: "cutoff", value: null });
    const high = view.edges[view.edges.length - 1];
    dragged = Math.max(0, Math.min(high, (cutoff() === null ? high : cutoff()) + (step * high) / 100));
    draw();
    model.send({ kind: "cutoff", value: dragged });
  });

  page.root.addEventListener("dragover", (event) => (event.preventDefault(), page.root.classList.add("vr-drop")));
  page.root.addEventListener("dragleave", () => page.root.classList.remove("vr-drop"));
  page.root.addEventListener("drop", async (event) => {
    event.preventDefault();
    page.root.classList.remove("vr-drop");
    const file = event.dataTransfer.files[0];
    if (file) model.send({ kind: "upload", name: file.name }, undefined, [await file.arrayBuffer()]);
  });

  const onMessage = (message) => {
    if (message.kind === "copy") navigator.clipboard?.writeText(message.text).catch(() => {}); // the text is shown as well
  };
  const theme = new MutationObserver(draw);
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  model.on("change:view", onView);
  model.on("change:opacity", draw);
  model.on("msg:custom", onMessage);
  onView();
  return () => {
    theme.disconnect();
    model.off("change:view", onView);
    model.off("change:opacity", draw);
    model.off("msg:custom", onMessage);
  };
}

export default { render };
