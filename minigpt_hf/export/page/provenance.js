"use strict";
/* The view "Provenance": the figures of the model card, the losses and samples of the run, and the surprisal of any text. */

const HEADLINE = 4; // figures shown large
const LONG_PASSAGE = 32; // tokens of a passage that is shaded fully

function provenanceView() {
  const { facts, log, storage } = page;
  const size =
    storage.bytes >= 1e6 ? `${(storage.bytes / 1e6).toFixed(1)} MB` : `${(storage.bytes / 1e3).toFixed(0)} kB`;
  const all = [...facts, ["weights in this page", `${storage.dtype}, ${size}`]];
  byId("headline").append(
    ...all
      .slice(0, HEADLINE)
      .map(([label, value]) => element("div.figure", {}, element("dd", {}, value), element("dt", {}, label))),
  );
  byId("facts").append(
    ...all.slice(HEADLINE).flatMap(([label, value]) => [element("dt", {}, label), element("dd", {}, value)]),
  );
  byId("deviation").textContent =
    storage.dtype === "float32"
      ? "The weights of this page are those of the model."
      : `Stored as ${storage.dtype}, the weights change a logit by at most ${storage.difference.toPrecision(2)}; ` +
        `${storage.equal} of ${storage.prompts} greedy continuations are those of the model.`;

  // -- loss and samples ------------------------------------------------------------------------------------------------

  byId("training").hidden = !log.train.length && !log.validation.length && !log.samples.length;
  let cursor = null;

  function drawChart() {
    const points = [...log.train, ...log.validation];
    const longest = Math.max(0, ...points.map(([x]) => x));
    byId("chart").hidden = points.length < 2 || longest === 0;
    if (byId("chart").hidden) return;
    const width = Math.max(320, byId("chart").clientWidth);
    const [height, left, bottom, top, right] = [280, 36, 34, 14, 72];
    const losses = points.map(([, y]) => y);
    // Losses before the first tenth of the run are far above the others and would flatten the curve.
    const later = points.filter(([x]) => x > longest / 10).map(([, y]) => y);
    const [low, high] = [Math.min(...losses), Math.min(Math.max(...losses), Math.max(...later) * 1.25)];
    const x = (tokens) => left + (tokens / longest) * (width - left - right);
    const y = (loss) => top + ((high - Math.min(loss, high)) / (high - low || 1)) * (height - top - bottom);
    const chart = svg("svg", {
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "img",
      "aria-label": `Loss against training tokens: from ${losses[0].toFixed(2)} to ${losses.at(-1).toFixed(2)} nats per token`,
    });
    for (const tick of ticks(low, high, 4)) {
      chart.append(
        svg("line.grid", { x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
        svg("text.tick", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(tick % 1 ? 1 : 0)),
      );
    }
    for (const tick of ticks(0, longest, width > 600 ? 6 : 3)) {
      chart.append(svg("text.tick", { x: x(tick), y: height - 12, "text-anchor": "middle" }, compact(tick)));
    }
    chart.append(svg("text.tick", { x: width - right + 8, y: height - 12 }, "tokens"));
    const path = (rows) =>
      rows.map(([tokens, loss], i) => `${i ? "L" : "M"}${x(tokens).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
    chart.append(svg("path.train", { d: path(log.train) }), svg("path.validation", { d: path(log.validation) }));
    chart.append(
      ...log.validation.map(([tokens, loss]) => svg("circle.validation", { cx: x(tokens), cy: y(loss), r: 2.5 })),
    );
    // Names at the ends of the curves, at least a line apart.
    const ends = [
      ["train", log.train.at(-1)],
      ["validation", log.validation.at(-1)],
    ].filter(([, end]) => end);
    ends.sort((a, b) => b[1][1] - a[1][1]);
    const places = ends.map(([, [, loss]]) => y(loss) + 4);
    for (let i = 1; i < places.length; i++) places[i] = Math.max(places[i], places[i - 1] + 15);
    const excess = Math.max(0, places.at(-1) - (height - bottom)); // the name of the axis is below
    ends.forEach(([name], i) =>
      chart.append(
        svg(`text.name.${name}`, { x: width - right + 8, y: places[i] - excess }, name === "train" ? "training" : name),
      ),
    );
    cursor = svg("line.cursor", { x1: left, x2: left, y1: top, y2: height - bottom });
    chart.append(cursor);
    cursor.moveTo = (tokens) => {
      cursor.setAttribute("x1", x(tokens));
      cursor.setAttribute("x2", x(tokens));
    };
    byId("chart").replaceChildren(chart);
  }

  // Round numbers between two values, about `count` of them.
  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const magnitude = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * magnitude).find((each) => each >= rough);
    return Array.from({ length: count + 2 }, (_, i) => (Math.ceil(low / step) + i) * step).filter(
      (tick) => tick <= high * (1 + 1e-9),
    );
  }

  const compact = (n) => Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(n);

  function showSample(index) {
    const [tokens, text] = log.samples[index];
    const loss = log.validation.findLast(([x]) => x <= tokens)?.[1];
    byId("sample-title").textContent =
      tokens === 0
        ? "Before training"
        : `After ${integer(tokens)} tokens${loss === undefined ? "" : `, validation loss ${loss.toFixed(3)} nats`}`;
    byId("sample").textContent = text;
    byId("sample-slider").setAttribute("aria-valuetext", byId("sample-title").textContent);
    cursor?.moveTo(tokens);
  }

  byId("samples").hidden = log.samples.length === 0;
  if (log.samples.length) {
    const slider = byId("sample-slider");
    slider.max = log.samples.length - 1;
    slider.addEventListener("input", () => showSample(Number(slider.value)));
    slider.value = slider.max;
  }

  // -- verbatim copying --------------------------------------------------------------------------------------------------

  const { copying, samples } = page;
  byId("copying").hidden = !copying && !samples;
  byId("copying-figures").parentNode.hidden = !copying;
  if (copying) {
    byId("copying-figures").append(
      element("thead", {}, element("tr", {}, copying.header.map((cell) => element("th", { scope: "col" }, cell)))),
      element(
        "tbody",
        {},
        copying.rows.map(([name, ...cells]) =>
          element("tr", {}, [element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell))]),
        ),
      ),
    );
  }
  byId("copying-note").textContent = samples
    ? `Each token is shaded by the length of the longest shared passage that contains it, fully from ${LONG_PASSAGE} tokens on; ` +
      "select one to see the passage in the training text."
    : "The longest stretch of each sample:";
  if (samples) byId("copied").append(...samples.flatMap(copiedSample));
  else if (copying) {
    byId("copied").append(
      ...copying.stretches.flatMap(({ text, length }, i) => [
        element("h3", {}, `Sample ${i + 1}: ${length}`),
        element("div.sample", {}, text),
      ]),
    );
  }

  // A sample as a list of tokens, and below it the passage that contains the selected one.
  function copiedSample({ given, ids, passages }, number) {
    const longest = ids.map((_, i) =>
      passages
        .filter(({ start, tokens }) => start <= i && i < start + tokens)
        .reduce((best, passage) => (best === null || passage.tokens > best.tokens ? passage : best), null),
    );
    const [box, source] = [element("div", { id: `copied-${number}` }), element("div.passage", { role: "status" })];
    const title = `Sample ${number + 1}`;
    const list = new TokenList(box, `${title}, shaded by the length of shared passages`, (index, { passage }) =>
      source.replaceChildren(...(passage ? shownPassage(passage) : [element("p.note", {}, noPassage(index))])),
    );
    const prompt = given === "" ? [] : tokenizer.encode(given);
    const noPassage = (index) =>
      index < prompt.length ? "Given to the model." : "In no passage of 8 tokens or more that the training text contains.";
    list.set([
      ...prompt.map((id) => ({ id, isPrompt: true })),
      ...ids.map((id, i) => ({
        id,
        passage: longest[i],
        share: longest[i] ? Math.min(1, longest[i].tokens / LONG_PASSAGE) : 0,
        note: longest[i] ? `in a passage of ${longest[i].tokens} tokens` : "in no shared passage",
      })),
    ]);
    return [element("h3", {}, title), box, source];
  }

  function shownPassage({ document: number, tokens, before, text, after }) {
    return [
      element("p.note", {}, `${integer(tokens)} tokens in document ${integer(number)} of the training text, where they occur first:`),
      element("blockquote", {}, before, element("mark", {}, text), after),
    ];
  }

  // -- surprisal -------------------------------------------------------------------------------------------------------

  let job = null;
  const list = new TokenList(byId("scored"), "Text, shaded by surprisal", (index, token) => {
    byId("scored-token").textContent =
      `“${tokenLabel(token.id)}”: ${percent(token.p)}, ${bits(token.p).toFixed(2)} bits`;
  });

  async function score() {
    if (job !== null) return engine.stop(job);
    const question = byId("question-field").hidden ? "" : byId("score-question").value;
    const text = byId("score-text").value;
    const given = question === "" ? [] : views.generate.idsOf(question);
    const own = text === "" ? [] : encoded(text);
    if (!own?.length || given === null) return undefined;
    const isConversation = given.length > 0;
    const ids = isConversation ? [...given, ...own, page.chat.end] : own;
    const running = engine.run("score", { ids, isConversation }, ({ share }) => {
      byId("score-result").textContent = `${Math.round(100 * share)} %`;
    });
    job = running.job;
    byId("score").textContent = "Stop";
    try {
      const scoredFrom = Math.max(0, given.length - 1); // the first label of a conversation is its second token
      const [labels, losses] = await running.then((result) =>
        [result.labels, result.losses].map((each) => each.slice(scoredFrom)),
      );
      if (!losses.length) throw new Error("the text is too short to be scored");
      const scored = losses.map((loss, i) => ({ id: labels[i], p: Math.exp(-loss) }));
      list.set(scored);
      const total = losses.reduce((sum, loss) => sum + loss, 0) / Math.LN2;
      const bytes = scored.reduce((sum, { id }) => sum + (tokenizer.special.has(id) ? 0 : tokenizer.bytes(id).length), 0);
      byId("score-result").textContent =
        `${(total / bytes).toFixed(3)} bits per byte · ${(total / losses.length).toFixed(3)} bits per token · ${integer(losses.length)} tokens`;
    } catch (error) {
      reportError(error);
    }
    job = null;
    byId("score").textContent = "Score";
    return undefined;
  }

  byId("score").addEventListener("click", score);
  addEventListener("resize", () => byId("view-provenance").hidden || views.provenance.show());
  return {
    show() {
      drawChart();
      if (log.samples.length) showSample(Number(byId("sample-slider").value));
      const isChat = views.generate.isChat();
      byId("question-field").hidden = !isChat;
      byId("score-label").textContent = isChat ? "Answer" : "Text";
      if (byId("score-text").value || !log.samples.length) return;
      const sample = log.samples.at(-1)[1];
      if (isChat && sample.startsWith(`${page.prompt}\n`)) {
        byId("score-question").value = page.prompt; // a sample is a question and its answer, followed by others
        byId("score-text").value = sample.slice(page.prompt.length + 1).split("\n\n")[0];
      } else byId("score-text").value = sample;
    },
  };
}
