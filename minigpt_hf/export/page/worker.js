"use strict";
/* The model in its own thread, so that the page never blocks. Each message has a type and a job number; replies carry the same
job number. A job pauses regularly to receive messages, and ends when another message stops it. */

const TOP = 10; // alternatives that are reported for each token
const running = new Set(); // jobs
let data, model;

const channel = new MessageChannel();
const pause = () =>
  new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });

// The `count` most probable tokens as [id, probability].
function top(probabilities, count) {
  const best = [];
  for (let id = 0; id < probabilities.length; id++) {
    const p = probabilities[id];
    if (best.length === count && p <= best[count - 1][1]) continue;
    let i = best.length;
    while (i > 0 && best[i - 1][1] < p) i--;
    best.splice(i, 0, [id, p]);
    if (best.length > count) best.pop();
  }
  return best;
}

const jobs = {
  load({ data: received, weights }) {
    data = received;
    const start = performance.now();
    const backend = createBackend(data.parameters + GPT.workspace(data.config));
    model = new GPT(data.config, decodeWeights(weights, data.tensors, backend.allocate), backend);
    return { backend: backend.name, milliseconds: performance.now() - start };
  },

  // Sends the tokens in groups, at most 30 times per second.
  async generate({ job, ids, options }) {
    let [tokens, sent, total] = [[], performance.now(), 0];
    const start = performance.now();
    const tokensPerSecond = () => (1000 * total) / (performance.now() - start || 1);
    const flush = () => postMessage({ job, type: "tokens", tokens, tokensPerSecond: tokensPerSecond() });
    for (const { id, logits } of generate(model, ids, { stop: data.stop, ...options })) {
      const probabilities = softmax(Float64Array.from(logits));
      tokens.push({ id, p: probabilities[id], top: top(probabilities, TOP) });
      total++;
      if (performance.now() - sent < 33) continue;
      flush();
      [tokens, sent] = [[], performance.now()];
      await pause();
      if (!running.has(job)) break;
    }
    if (tokens.length) flush();
    return { stopped: !running.has(job), tokensPerSecond: tokensPerSecond() };
  },

  // Everything that the view "Look inside" shows: T tokens, L layers, N heads.
  inspect({ ids, ablated }) {
    const { num_hidden_layers: L, num_attention_heads: N, hidden_size: H, vocab_size: V } = data.config;
    const T = ids.length;
    const attention = new Float32Array(L * N * T * T); // [L, N, T, T]
    const residual = Array.from({ length: 2 * L + 1 }, () => new Float32Array(T * H)); // after each sublayer
    const logits = new Float32Array(T * V);
    model.forward(ids, new Cache(data.config), {
      ablated: new Set(ablated),
      observe: {
        attention: (layer, head, position, first, weights) =>
          attention.set(weights, ((layer * N + head) * T + position) * T + first),
        residual: (stage, position, x) => residual[stage].set(x, position * H),
        logits: (position, values) => logits.set(values, position * V),
      },
    });
    const norm = (stage, t, before) => {
      let sum = 0;
      for (let i = t * H; i < (t + 1) * H; i++)
        sum += (residual[stage][i] - (before ? residual[stage - 1][i] : 0)) ** 2;
      return Math.sqrt(sum);
    };
    const positions = [...Array(T).keys()];
    return {
      ids,
      attention,
      logits,
      norms: residual.map((_, stage) => positions.map((t) => norm(stage, t, false))),
      updates: residual.map((_, stage) => positions.map((t) => norm(stage, t, stage > 0))),
      lens: Array.from({ length: L + 1 }, (_, layer) =>
        positions.map((t) => {
          const x = residual[2 * layer].slice(t * H, (t + 1) * H);
          return top(softmax(Float64Array.from(model.unembed(x))), 5);
        }),
      ),
    };
  },

  // The tokens whose embeddings have the largest cosine similarity.
  neighbors({ id }) {
    const [H, embedding] = [data.config.hidden_size, model.weights["model.embed_tokens.weight"]];
    const similarity = new Float64Array(data.config.vocab_size);
    for (let other = 0; other < similarity.length; other++) {
      let [dot, a, b] = [0, 0, 0];
      for (let i = 0; i < H; i++) {
        const [x, y] = [embedding[id * H + i], embedding[other * H + i]];
        [dot, a, b] = [dot + x * y, a + x * x, b + y * y];
      }
      similarity[other] = other === id || a * b === 0 ? -1 : dot / Math.sqrt(a * b);
    }
    return { id, neighbors: top(similarity, 8) };
  },

  /* Negative log-likelihood of each token in nats. A text follows the BOS token, if there is one; a conversation does not, and
     its first token is not scored. Unless every layer has a sliding window, a text beyond the context is scored in windows; each
     starts with the last token of the previous one. */
  async score({ job, ids, isConversation = false }) {
    const isUnlimited = data.config.layer_types.every((type) => type === "sliding_attention");
    const inputs = [...(data.bos === null || isConversation ? [] : [data.bos]), ...ids.slice(0, -1)];
    const labels = ids.slice(ids.length - inputs.length);
    const losses = [];
    const window = isUnlimited ? Infinity : data.config.max_position_embeddings;
    let cache = new Cache(data.config);
    for (let start = 0; start < inputs.length;) {
      if (cache.length >= window) cache = new Cache(data.config);
      const part = inputs.slice(start, start + Math.min(CHUNK, window - cache.length));
      const observe = {
        logits: (_, logits) => {
          const maximum = logits.reduce((a, b) => Math.max(a, b));
          const sum = logits.reduce((total, logit) => total + Math.exp(logit - maximum), 0);
          losses.push(Math.log(sum) + maximum - logits[labels[losses.length]]);
        },
      };
      model.forward(part, cache, { observe });
      start += part.length;
      postMessage({ job, type: "progress", share: start / inputs.length });
      await pause();
      if (!running.has(job)) return { labels, losses };
    }
    return { labels, losses };
  },
};

onmessage = async ({ data: message }) => {
  const { type, job } = message;
  if (type === "stop") return running.delete(job);
  running.add(job);
  try {
    postMessage({ job, type: "done", result: await jobs[type](message) });
  } catch (error) {
    postMessage({ job, type: "failed", message: error.message });
  }
  return running.delete(job);
};
