"use strict";
/* The view "Look inside": the computation for one text, stage by stage. `intact` is the result for this text, `current` the
result with the ablated heads; they are the same object if no head is ablated. */

const LONGEST_TEXT = Math.min(64, page.config.max_position_embeddings); // tokens; the last ones of a longer text
const SHOWN_PREDICTIONS = 15;

function insideView() {
  const { num_hidden_layers: L, num_attention_heads: N, num_key_value_heads: K, head_dim: D } = page.config;
  const { hidden_size: H, intermediate_size: F, vocab_size: V } = page.config;
  const state = { position: 0, layer: 0, head: 0, ablated: new Set(), temperature: 1, topK: 0, topP: 1 };
  let [intact, current, run] = [null, null, 0];
  let [ids, analyzed] = [[], null]; // of the text, and of the results, which are older while the text is analyzed
  const text = byId("inside-text");
  const list = new TokenList(byId("inside-tokens"), "Tokens of the text", select);

  describe("embedding", "x = E[id]", `E [${V}, ${H}]\nx [T, ${H}]`, ["embedding"]);
  describe("attention", "softmax(q · kᵀ / √D) · v", `q [T, ${N}, ${D}]\nk, v [T, ${K}, ${D}]\nweights [${N}, T, T]`, [
    "query",
    "scores",
    "weights",
    "output",
  ]);
  describe(
    "residual",
    "x ← x + attention(norm(x))\nx ← x + mlp(norm(x))\nmlp(n) = down(silu(gate(n)) ⊙ up(n))",
    `x, n [T, ${H}]\ngate(n), up(n) [T, ${F}]`,
    ["attention", "mlp"],
  );
  describe("lens", "softmax(W · norm(x))", `x [T, ${H}]\nW [${V}, ${H}]\nprobabilities [T, ${V}]`, ["norm"]);
  describe("prediction", "softmax(logits / temperature)", `logits [T, ${V}]`, ["logits"]);

  function describe(stage, formula, shapes, lines) {
    const source = lines.map((name) =>
      element("li", {}, element("span.line", {}, page.stages[name].line), element("code", {}, page.stages[name].code)),
    );
    byId(`about-${stage}`).append(
      element("div.formula", {}, formula),
      element("div.shapes", {}, shapes),
      element("p.file", {}, "modeling_minigpt.py"),
      element("ul.source", { "aria-label": "Lines of the model file" }, source),
    );
  }

  // -- analysis --------------------------------------------------------------------------------------------------------

  function analyze(all, note = "") {
    ids = all.slice(-LONGEST_TEXT);
    byId("inside-note").textContent =
      ids.length < all.length ? `The last ${LONGEST_TEXT} of ${integer(all.length)} tokens. ${note}` : note;
    list.set(ids.map((id) => ({ id })));
    state.position = ids.length - 1;
    return update();
  }

  async function update() {
    const number = ++run; // results of earlier texts are discarded
    try {
      const whole = analyzed === ids ? intact : await engine.run("inspect", { ids, ablated: [] });
      const changed = state.ablated.size ? await engine.run("inspect", { ids, ablated: [...state.ablated] }) : whole;
      if (number !== run) return;
      [intact, current, analyzed] = [whole, changed, ids];
      byId("inside-stages").hidden = false;
      showHeads();
      select(Math.min(state.position, ids.length - 1));
      showAblation();
    } catch (error) {
      reportError(error);
    }
  }

  function select(position) {
    state.position = position;
    list.select(position, false);
    const slider = byId("position");
    slider.max = current.ids.length - 1;
    slider.value = position;
    const context = current.ids
      .slice(Math.max(0, position - 12), position)
      .map(tokenLabel)
      .join("");
    const next = current.ids[position + 1];
    byId("position-text").replaceChildren(
      element("span.context", {}, context),
      element("mark", {}, tokenLabel(current.ids[position])),
      element("span.context", {}, next === undefined ? " → ?" : ` → ${tokenLabel(next)}`),
    );
    slider.setAttribute("aria-valuetext", `token ${position + 1}, ${tokenLabel(current.ids[position])}`);
    byId("position-number").textContent = `Token ${position + 1} of ${current.ids.length}`;
    showNeighbors();
    showHead();
    showResidual();
    showLens();
    showPrediction();
  }

  // -- stages ----------------------------------------------------------------------------------------------------------

  async function showNeighbors() {
    const id = current.ids[state.position];
    const { id: shown, neighbors } = await engine.run("neighbors", { id });
    if (shown !== current.ids[state.position]) return;
    byId("neighbors-title").textContent = `Nearest to “${tokenLabel(id)}” (id ${id})`;
    byId("neighbors").replaceChildren(
      ...neighbors.map(([other, cosine]) => probabilityRow(other, cosine, { text: cosine.toFixed(2) })),
    );
  }

  const weightsOf = (result, layer, head) => {
    const size = result.ids.length ** 2;
    return result.attention.subarray((layer * N + head) * size, (layer * N + head + 1) * size);
  };

  // Draws weights [T, T] with the color of the text; small weights stay visible through the square root.
  function drawMatrix(canvas, weights, T) {
    canvas.width = canvas.height = T;
    const [red, green, blue] = getComputedStyle(canvas)
      .color.match(/[\d.]+/g)
      .map(Number);
    const image = new ImageData(T, T);
    for (let i = 0; i < T * T; i++) image.data.set([red, green, blue, 255 * Math.sqrt(weights[i])], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function showHeads() {
    const rows = Array.from({ length: L }, (_, layer) => {
      const heads = Array.from({ length: N }, (_, head) => {
        const weights = weightsOf(current, layer, head);
        const scores = headScores(weights, current.ids);
        const canvas = element("canvas", { "aria-hidden": "true" });
        const isChosen = layer === state.layer && head === state.head;
        const isAblated = state.ablated.has(layer * N + head);
        const button = element(
          `button.head${isAblated ? ".ablated" : ""}`,
          {
            type: "button",
            "aria-pressed": String(isChosen),
            "aria-label": `Layer ${layer + 1}, head ${head + 1}: ${headLabel(scores)}, score ${scores[0].score.toFixed(2)}${isAblated ? ", ablated" : ""}`,
            onclick: () => {
              Object.assign(state, { layer, head });
              for (const other of byId("heads").querySelectorAll(".head"))
                other.setAttribute("aria-pressed", String(other === button));
              showHead();
            },
          },
          canvas,
          element("span.behavior", {}, isAblated ? "ablated" : headLabel(scores)),
          element("span.score", {}, scores[0].score.toFixed(2)),
        );
        requestAnimationFrame(() => drawMatrix(canvas, weights, current.ids.length));
        return button;
      });
      return element(
        "div.layer",
        {},
        element("span.layer-name", {}, `Layer ${layer + 1}`),
        element("div.layer-heads", {}, heads),
      );
    });
    byId("heads").replaceChildren(...rows);
  }

  function showHead() {
    const { layer, head, position } = state;
    const [T, weights] = [current.ids.length, weightsOf(current, layer, head)];
    const scores = headScores(weights, current.ids);
    const isAblated = state.ablated.has(layer * N + head);
    byId("head-title").textContent = `Layer ${layer + 1}, head ${head + 1}`;
    byId("head-scores").replaceChildren(
      ...scores.slice(0, 3).map(({ name, score }) => element("span.chip", {}, `${name} ${score.toFixed(2)}`)),
    );
    byId("ablate").textContent = isAblated ? "Restore this head" : "Ablate this head";
    drawMatrix(byId("matrix"), weights, T);
    byId("matrix-row").style.setProperty("--row", (position / T).toFixed(4));
    byId("matrix-row").style.setProperty("--rows", T);
    drawLines(weights, T);
    const row = Array.from(weights.subarray(position * T, position * T + position + 1), (p, s) => [s, p]);
    const strongest = row.sort((a, b) => b[1] - a[1]).slice(0, 5);
    byId("attended-title").textContent = `“${tokenLabel(current.ids[position])}” attends to`;
    byId("attended").replaceChildren(
      ...strongest.map(([s, p]) => {
        const distance = position - s;
        const place = distance === 0 ? "itself" : distance === 1 ? "the previous token" : `${distance} back`;
        const node = probabilityRow(current.ids[s], p);
        node.querySelector(".label").append(element("small", {}, ` ${place}`));
        return node;
      }),
    );
  }

  function drawLines(weights, T) {
    const labels = Array.from(current.ids, (id) => tokenLabel(id).slice(0, 12));
    const side = 20 + 7.3 * Math.max(...labels.map((label) => label.length)); // width of a column of tokens
    const [height, left, right, width] = [19, side, side + 150, 2 * side + 150];
    const y = (t) => height * (t + 0.5);
    const lines = svg("svg.lines", {
      viewBox: `0 0 ${width} ${height * T}`,
      width,
      height: height * T,
      role: "img",
      "aria-label": `Attention from each token on the left to the tokens on the right; the list below names the strongest of the selected token`,
    });
    for (let t = 0; t < T; t++) {
      for (let s = 0; s <= t; s++) {
        const weight = weights[t * T + s];
        const isSelected = t === state.position;
        if (weight < (isSelected ? 0.005 : 0.1)) continue;
        lines.append(
          svg(`line${isSelected ? ".selected" : ""}`, {
            x1: left,
            y1: y(t),
            x2: right,
            y2: y(s),
            "stroke-opacity": (isSelected ? 0.15 + 0.85 * weight : 0.45 * weight).toFixed(3),
            "stroke-width": (0.6 + 2.4 * weight).toFixed(2),
          }),
        );
      }
    }
    for (let t = 0; t < T; t++) {
      const query = svg(
        `text${t === state.position ? ".selected" : ""}`,
        { x: left - 8, y: y(t) + 4, "text-anchor": "end", onclick: () => select(t) },
        labels[t],
      );
      const strength = weights[state.position * T + t] > 0.1 && t <= state.position ? ".attended" : "";
      lines.append(query, svg(`text${strength}`, { x: right + 8, y: y(t) + 4 }, labels[t]));
    }
    const box = byId("lines");
    box.replaceChildren(lines);
    const target = y(state.position) - box.clientHeight / 2;
    box.scrollTop = target;
  }

  byId("matrix-box").addEventListener("click", (event) => {
    const box = byId("matrix").getBoundingClientRect();
    select(
      Math.min(
        current.ids.length - 1,
        Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * current.ids.length)),
      ),
    );
  });
  byId("matrix-box").addEventListener("mousemove", (event) => {
    const [box, T] = [byId("matrix").getBoundingClientRect(), current.ids.length];
    const [t, s] = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width].map((share) =>
      Math.floor(share * T),
    );
    if (t < 0 || s < 0 || t >= T || s >= T) return;
    const weight = weightsOf(current, state.layer, state.head)[t * T + s];
    byId("matrix-text").textContent =
      s > t
        ? "later tokens are masked"
        : `“${tokenLabel(current.ids[t])}” (${t + 1}) → “${tokenLabel(current.ids[s])}” (${s + 1}): ${percent(weight)}`;
  });

  function showResidual() {
    const { norms, updates } = current;
    const at = (stage) => [norms[stage][state.position], updates[stage][state.position]];
    const largest = Math.max(...norms.map((norm) => norm[state.position]));
    const name = (stage) =>
      stage === 0 ? "embedding" : `layer ${Math.ceil(stage / 2)} ${stage % 2 ? "attention" : "MLP"}`;
    const rows = norms.map((_, stage) => {
      const [norm, added] = at(stage);
      return element(
        "div.residual-row",
        {},
        element("span.label", {}, name(stage)),
        element(
          "span.bar",
          { "--share": (norm / largest).toFixed(4) },
          element("span.added", { "--share": Math.min(1, added / largest).toFixed(4) }),
        ),
        element("span.number", {}, stage === 0 ? norm.toFixed(1) : `+${added.toFixed(1)} → ${norm.toFixed(1)}`),
      );
    });
    byId("residual").replaceChildren(...rows);
  }

  function showLens() {
    const T = current.ids.length;
    const cell = (layer, t) => {
      const [id, p] = current.lens[layer][t][0];
      const isRight = id === current.ids[t + 1];
      return element(
        `td${isRight ? ".right" : ""}${t === state.position ? ".selected" : ""}`,
        { "--share": p.toFixed(3), title: `${tokenLabel(id)} ${percent(p)}`, onclick: () => select(t) },
        tokenLabel(id).slice(0, 10),
      );
    };
    const name = (layer) => (layer === 0 ? "embedding" : `layer ${layer}`);
    const header = (label, token) =>
      element(
        "tr.tokens-row",
        {},
        element("th", { scope: "row" }, label),
        Array.from({ length: T }, (_, t) =>
          element(`td${t === state.position ? ".selected" : ""}`, { onclick: () => select(t) }, token(t)),
        ),
      );
    byId("lens").replaceChildren(
      header("token", (t) => tokenLabel(current.ids[t]).slice(0, 10)),
      ...current.lens.map((_, layer) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, name(layer)),
          Array.from({ length: T }, (_, t) => cell(layer, t)),
        ),
      ),
      header("next", (t) => (t + 1 < T ? tokenLabel(current.ids[t + 1]).slice(0, 10) : "?")),
    );
    const box = byId("lens-box");
    const column = byId("lens").querySelector("tr").children[state.position + 1];
    box.scrollLeft = column.offsetLeft - box.clientWidth / 2;
    byId("lens-layers").replaceChildren(
      ...current.lens.map((layer, i) =>
        element(
          "div.lens-layer",
          {},
          element("h4", {}, name(i)),
          layer[state.position].map(([id, p]) =>
            probabilityRow(id, p, { isChosen: id === current.ids[state.position + 1] }),
          ),
        ),
      ),
    );
  }

  function showPrediction() {
    const row = (result) => result.logits.subarray(state.position * V, (state.position + 1) * V);
    const options = { temperature: state.temperature, topK: state.topK, topP: state.topP };
    const [plain, before] = [softmax(Float64Array.from(row(current))), softmax(Float64Array.from(row(intact)))];
    const drawn = distribution(row(current), options);
    const order = Array.from(plain.keys())
      .sort((a, b) => plain[b] - plain[a])
      .slice(0, SHOWN_PREDICTIONS);
    const next = current.ids[state.position + 1];
    const kept = drawn.reduce((count, p) => count + (p > 0), 0);
    const entropy = drawn.reduce((sum, p) => sum + (p > 0 ? p * bits(p) : 0), 0);
    byId("prediction").replaceChildren(
      ...order.map((id) => {
        const options = { isChosen: id === next, ...(current === intact ? {} : { mark: before[id] }) };
        const node = probabilityRow(id, drawn[id], options);
        if (drawn[id] === 0) node.classList.add("excluded");
        return node;
      }),
    );
    const facts = [`${integer(kept)} of ${integer(V)} tokens can be drawn`, `entropy ${entropy.toFixed(2)} bits`];
    if (next !== undefined)
      facts.push(
        `next in the text: “${tokenLabel(next)}”, ${percent(plain[next])} = ${bits(plain[next]).toFixed(2)} bits at temperature 1`,
      );
    byId("prediction-note").textContent = facts.join(" · ");
  }

  // -- ablation --------------------------------------------------------------------------------------------------------

  // Mean surprisal of the tokens after the first, in bits.
  function surprisal({ ids, logits }) {
    let sum = 0;
    for (let t = 0; t + 1 < ids.length; t++)
      sum += bits(softmax(Float64Array.from(logits.subarray(t * V, (t + 1) * V)))[ids[t + 1]]);
    return sum / (ids.length - 1);
  }

  function showAblation() {
    const heads = [...state.ablated].sort((a, b) => a - b);
    byId("ablation").hidden = heads.length === 0;
    byId("ablated-heads").replaceChildren(
      ...heads.map((head) =>
        element(
          "button.chip",
          {
            type: "button",
            title: "Restore this head",
            onclick: () => {
              state.ablated.delete(head);
              update();
            },
          },
          `layer ${Math.floor(head / N) + 1}, head ${(head % N) + 1} ×`,
        ),
      ),
    );
    if (!heads.length || current.ids.length < 2) return;
    const [before, after] = [surprisal(intact), surprisal(current)];
    byId("ablation-effect").textContent =
      `Surprisal of this text: ${before.toFixed(2)} → ${after.toFixed(2)} bits per token`;
  }

  byId("ablate").addEventListener("click", () => {
    const head = state.layer * N + state.head;
    if (!state.ablated.delete(head)) state.ablated.add(head);
    update();
  });
  byId("restore").addEventListener("click", () => {
    state.ablated.clear();
    update();
  });

  // -- controls --------------------------------------------------------------------------------------------------------

  let timer;
  text.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const entered = views.generate.idsOf(text.value);
      if (entered) analyze(entered);
    }, 300);
  });
  byId("use-generated").addEventListener("click", useGenerated);
  byId("position").addEventListener("input", (event) => select(Number(event.target.value)));
  byId("prediction-sliders").append(
    slider("Temperature", state, "temperature", {
      min: 0.05,
      max: 2,
      step: 0.05,
      value: 1,
      format: (x) => x.toFixed(2),
      onchange: () => current && showPrediction(),
    }),
    slider("Top-k", state, "topK", {
      min: 0,
      max: Math.min(50, V),
      step: 1,
      value: 0,
      format: (k) => (k === 0 ? "off" : k),
      onchange: () => current && showPrediction(),
    }),
    slider("Top-p", state, "topP", {
      min: 0.05,
      max: 1,
      step: 0.01,
      value: 1,
      format: (p) => (p === 1 ? "off" : p.toFixed(2)),
      onchange: () => current && showPrediction(),
    }),
  );

  function useGenerated() {
    const generated = views.generate.currentIds();
    if (!generated.length) return false;
    text.value = views.generate.isChat()
      ? views.generate.lastQuestion()
      : tokenizer.decode(generated.slice(-LONGEST_TEXT)).replace(/^\ufffd+/, "");
    analyze(generated);
    return true;
  }

  return {
    show() {
      const isChat = views.generate.isChat();
      byId("inside-label").textContent = isChat ? "Question" : "Text";
      if (current || useGenerated()) return;
      text.value = (!isChat && page.log.samples.at(-1)?.[1].slice(0, 48)) || page.prompt || "";
      const entered = views.generate.idsOf(text.value);
      if (entered) analyze(entered);
    },
    redraw() {
      if (!current) return;
      showHeads();
      showHead();
    },
  };
}
