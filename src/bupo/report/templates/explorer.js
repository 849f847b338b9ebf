"use strict";
// The heat map of the token explorer. Reads the data block, draws on a canvas, shows a cell's details on hover and focus.
// Text from the data is only ever drawn or set as textContent.
(() => {
  const data = JSON.parse(document.getElementById("tokens-data").textContent);
  const root = document.getElementById("explorer");
  const pick = (name) => root.querySelector(`[data-part="${name}"]`);
  const canvas = pick("map"), scroll = pick("scroll"), gutter = pick("layers"), tip = pick("tip"), mark = pick("mark"), text = pick("text");
  const chooser = pick("sample"), bar = pick("bar"), low = pick("low"), high = pick("high"), prompt = pick("prompt");
  const measures = {
    entropy: { title: "Entropy", unit: " nats", floor: 0 },
    logprob: { title: "Log-probability of the realised token", unit: "", ceiling: 0 },
    kl: { title: "KL to the final policy", unit: " nats", floor: 0 },
    rank: { title: "Rank of the realised token", unit: "", floor: 1, log: true },
  };
  // viridis, told apart with every common colour vision
  const stops = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
    [170, 220, 50], [253, 231, 37]];
  const LABELS = 84; // height below the cells for token texts
  let sample = null, measure = "entropy", range = [0, 1], cell = { w: 16, h: 14 }, at = null;

  const shown = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣").replace(/[\u0000-\u001f\u007f-\u009f]/g, "·");
  const number = (v, digits) => v === null || v === undefined ? "–" : v.toFixed(digits).replace("-", "−");
  const colour = (v) => {
    if (v === null) return null;
    const part = Math.min(1, Math.max(0, v)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(part)), f = part - i;
    return `rgb(${stops[i].map((c, k) => Math.round(c + f * (stops[i + 1][k] - c))).join(",")})`;
  };
  const scaled = (v) => {
    if (v === null || v === undefined) return null;
    const on = (x) => measures[measure].log ? Math.log(Math.max(1, x)) : x, [a, b] = range.map(on);
    return b > a ? (on(v) - a) / (b - a) : 0.5;
  };

  function setRange() {
    const all = sample[measure].flat().filter((v) => v !== null).sort((a, b) => a - b), { floor, ceiling } = measures[measure];
    const quantile = (q) => all.length ? all[Math.min(all.length - 1, Math.floor(q * all.length))] : 0;
    range = [floor ?? quantile(0.02), ceiling ?? quantile(0.98)];
    const digits = measure === "rank" ? 0 : 2, unit = measures[measure].unit;
    low.textContent = (floor === undefined ? "≤ " : "") + number(range[0], digits) + unit;
    high.textContent = (ceiling === undefined ? "≥ " : "") + number(range[1], digits) + unit;
  }

  function draw() {
    const L = sample.layers, T = sample.tokens.length, style = getComputedStyle(root);
    const room = Math.max(200, scroll.clientWidth - 2);
    cell = { w: Math.min(44, Math.max(T * 14 > 12000 ? Math.max(2, Math.floor(12000 / T)) : 14, Math.floor(room / T))),
      h: Math.max(8, Math.min(24, Math.floor(380 / L))) };
    const width = T * cell.w, height = L * cell.h + (cell.w >= 10 ? LABELS : 0), ratio = Math.min(devicePixelRatio || 1, 24000 / Math.max(width, height));
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    canvas.dataset.cell = cell.w; gutter.dataset.cell = cell.h;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const gap = cell.w > 6 ? 0.5 : 0, empty = style.getPropertyValue("--grid");
    for (let l = 0; l < L; l++) for (let t = 0; t < T; t++) {
      pen.fillStyle = colour(scaled(sample[measure][l][t])) || empty;
      pen.fillRect(t * cell.w, (L - 1 - l) * cell.h, cell.w - gap, cell.h - gap);
    }
    if (cell.w >= 10) {
      pen.fillStyle = style.getPropertyValue("--ink");
      pen.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
      pen.textAlign = "right"; pen.textBaseline = "middle";
      sample.tokens.forEach((token, t) => {
        const word = shown(token);
        pen.save();
        pen.translate((t + 0.5) * cell.w, L * cell.h + 5);
        pen.rotate(-Math.PI / 2);
        pen.fillText(word.length > 11 ? word.slice(0, 10) + "…" : word, 0, 0);
        pen.restore();
      });
    }
  }

  function labelLayers() {
    const L = sample.layers, step = Math.max(1, Math.ceil(14 / cell.h));
    gutter.style.height = `${L * cell.h}px`;
    gutter.replaceChildren(...Array.from({ length: L }, (_, i) => i + 1)
      .filter((l) => l === 1 || l === L || (l % (step * (L > 14 ? 2 : 1)) === 0 && L - l >= step)).map((l) => {
        const label = document.createElement("span");
        label.textContent = l;
        label.style.top = `${(L - l + 0.5) * cell.h}px`;
        return label;
      }));
  }

  const element = (tag, content, name) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.append(...[content].flat());
    return made;
  };

  function describe() {
    const { l, t } = at, value = (name) => sample[name] ? sample[name][l][t] : null;
    const facts = [["entropy", "entropy", 3], ["logprob", "log-prob", 3], ["rank", "rank", 0], ["kl", "KL to final", 3]]
      .filter(([name]) => sample[name]).map(([name, label, digits]) => `${label} ${number(value(name), digits)}`);
    const lines = [element("p", [`Layer ${l + 1}, token ${t + 1}: `, element("bdi", shown(sample.tokens[t]), "token")], "where"),
      element("p", facts.join(", "))];
    const top = sample.top ? sample.top[l][t] : [];
    if (top.length) lines.push(element("ol", top.map(([token, p]) => {
      const row = element("li", [element("bdi", shown(token), "token"), element("span", `${number(100 * p, 1)} %`, "share")]);
      row.style.setProperty("--share", `${Math.round(100 * p)}%`);
      if (token === sample.tokens[t]) row.className = "realised";
      return row;
    })));
    return lines;
  }

  function show(l, t, follow) {
    at = { l: Math.max(0, Math.min(sample.layers - 1, l)), t: Math.max(0, Math.min(sample.tokens.length - 1, t)) };
    text.querySelector(".now")?.classList.remove("now");
    text.children[at.t].classList.add("now");
    tip.replaceChildren(...describe());
    tip.hidden = mark.hidden = false;
    mark.style.cssText = `left:${at.t * cell.w}px;top:${(sample.layers - 1 - at.l) * cell.h}px;width:${cell.w}px;height:${cell.h}px`;
    if (follow) {
      const left = at.t * cell.w;
      if (left < scroll.scrollLeft) scroll.scrollLeft = left - 20;
      if (left + cell.w > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = left + cell.w - scroll.clientWidth + 20;
    }
    const box = pick("frame").getBoundingClientRect(), place = canvas.getBoundingClientRect();
    const x = place.left - box.left + at.t * cell.w, y = place.top - box.top + (sample.layers - 1 - at.l) * cell.h;
    const right = x + cell.w + 10;
    tip.style.left = `${Math.max(0, right + tip.offsetWidth > box.width ? x - tip.offsetWidth - 10 : right)}px`;
    tip.style.top = `${Math.max(0, Math.min(y, box.height - tip.offsetHeight))}px`;
  }

  function hide() {
    if (!at) return;
    at = null;
    tip.hidden = mark.hidden = true;
    text.querySelector(".now")?.classList.remove("now");
  }

  function load() {
    const [m, s] = chooser.value.split("/").map(Number);
    sample = data.models[m].samples[s];
    at = null; tip.hidden = mark.hidden = true;
    for (const input of root.querySelectorAll("input[name=measure]")) {
      input.disabled = !sample[input.value];
      if (input.disabled && input.checked) root.querySelector("input[value=entropy]").checked = true;
    }
    measure = root.querySelector("input[name=measure]:checked").value;
    prompt.textContent = sample.prompt ?? "";
    text.replaceChildren(...sample.tokens.map((token) => element("span", token)));
    refresh();
  }

  function refresh() {
    setRange(); draw(); labelLayers();
    canvas.setAttribute("aria-label", `${measures[measure].title}, ${sample.layers} layers by ${sample.tokens.length} tokens. ` +
      "Move with the arrow keys; the values of a cell are read out.");
  }

  data.models.forEach((model, m) => {
    const group = document.createElement("optgroup");
    group.label = model.name;
    model.samples.forEach((one, s) => group.append(new Option(`${data.models.length > 1 ? model.name + ": " : ""}${one.problem_id ?? "sample " + (s + 1)}`, `${m}/${s}`)));
    chooser.append(group);
  });
  bar.style.background = `linear-gradient(to right, ${stops.map((c) => `rgb(${c.join(",")})`).join(",")})`;
  chooser.addEventListener("change", load);
  for (const input of root.querySelectorAll("input[name=measure]")) input.addEventListener("change", () => { measure = input.value; hide(); refresh(); });
  canvas.addEventListener("pointermove", (event) => {
    const l = sample.layers - 1 - Math.floor(event.offsetY / cell.h), t = Math.floor(event.offsetX / cell.w);
    if (l < 0) return hide();
    if (!at || at.l !== l || at.t !== t) show(l, t);
  });
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) show(at ? at.l : sample.layers - 1, at ? at.t : 0, true); });
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    const now = at || { l: sample.layers - 1, t: 0 };
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0], PageUp: [0, -10], PageDown: [0, 10] };
    if (event.key === "Escape") return hide();
    const move = moves[event.key] || (event.key === "Home" ? [0, -now.t] : event.key === "End" ? [0, sample.tokens.length] : null);
    if (!move) return;
    event.preventDefault();
    show(now.l + move[0], now.t + move[1], true);
  });
  text.addEventListener("pointerover", (event) => {
    const t = Array.prototype.indexOf.call(text.children, event.target);
    if (t >= 0) show(at ? at.l : sample.layers - 1, t, true);
  });
  text.addEventListener("pointerleave", hide);
  addEventListener("resize", () => { hide(); draw(); labelLayers(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  root.classList.add("ready");
  root.hidden = false;
  load();
})();
