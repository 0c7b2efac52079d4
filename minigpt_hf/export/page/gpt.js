"use strict";
/* MiniGPT in JavaScript, without dependencies: token ids in, logits of the next token out, and sampling.

This is the model of `modeling_minigpt.py` for a single sequence, in the same order: norm, rotary embedding, attention,
feed-forward network, layers, logits; then sampling. A matrix is a flat array in row-major order, stored
as [outputs, inputs] like the weights of `nn.Linear`; the configuration is that of `config.json`.

Shapes in the comments:
    T  current tokens   H  hidden_size         N  num_attention_heads   D  head_dim
    S  tokens so far    F  intermediate_size   K  num_key_value_heads   V  vocab_size
*/

// -- model -------------------------------------------------------------------------------------------------------------

// out [T, outputs] = x [T, inputs] · weightᵀ. Four sums, because each addition would otherwise wait for the previous one.
function matmul(out, x, weight, length, inputs, outputs) {
  for (let o = 0; o < outputs; o++) {
    for (let t = 0; t < length; t++) {
      let a = 0,
        b = 0,
        c = 0,
        d = 0,
        w = o * inputs,
        i = t * inputs;
      const end = i + inputs;
      for (; i + 3 < end; i += 4, w += 4) {
        a += x[i] * weight[w];
        b += x[i + 1] * weight[w + 1];
        c += x[i + 2] * weight[w + 2];
        d += x[i + 3] * weight[w + 3];
      }
      for (; i < end; i++, w++) a += x[i] * weight[w];
      out[t * outputs + o] = a + b + (c + d);
    }
  }
}

// RMSNorm: rescale each vector of `width` numbers to a root mean square of 1, then multiply by the weight.
function rmsNorm(out, x, weight, length, width, epsilon) {
  for (let start = 0; start < length * width; start += width) {
    let sum = 0;
    for (let i = 0; i < width; i++) sum += x[start + i] ** 2;
    const scale = 1 / Math.sqrt(sum / width + epsilon);
    for (let i = 0; i < width; i++) out[start + i] = weight[i] * (x[start + i] * scale);
  }
}

// RoPE: rotate the pair (i, i + D/2) of each head at `position` by the angle position · θ^(-2i/D).
// Angles are rounded to float32 like those of torch, because at large positions the rounding is visible.
function rotate(x, start, heads, headDim, position, frequencies) {
  const half = headDim / 2;
  for (let i = 0; i < half; i++) {
    const angle = Math.fround(position * frequencies[i]);
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
    for (let first = start + i; first < start + heads * headDim; first += headDim) {
      const [a, b] = [x[first], x[first + half]];
      x[first] = a * cos - b * sin;
      x[first + half] = b * cos + a * sin;
    }
  }
}

// Logits -> probabilities, in place, for the first `length` elements.
function softmax(x, length = x.length) {
  let [maximum, sum] = [-Infinity, 0];
  for (let i = 0; i < length; i++) if (x[i] > maximum) maximum = x[i];
  for (let i = 0; i < length; i++) sum += x[i] = Math.exp(x[i] - maximum); // the maximum is subtracted against overflow
  for (let i = 0; i < length; i++) x[i] /= sum;
  return x;
}

/* Keys and values of the previous tokens. A layer with a sliding window keeps only the tokens inside it: position p is in row
   p mod capacity, so that a new token replaces the one that leaves the window. */
class Cache {
  constructor(config) {
    this.width = config.num_key_value_heads * config.head_dim; // K·D
    this.length = 0; // S: positions so far
    this.layers = config.layer_types.map((type) => {
      const window = type === "sliding_attention" ? config.sliding_window : Infinity;
      return { window, capacity: 0, keys: new Float32Array(0), values: new Float32Array(0) }; // [capacity, K·D]
    });
  }

  write(layer, position, key, value) {
    if (position >= layer.capacity && layer.capacity < layer.window) {
      layer.capacity = Math.min(Math.max(64, 2 * layer.capacity), layer.window);
      for (const name of ["keys", "values"]) {
        const larger = new Float32Array(layer.capacity * this.width);
        larger.set(layer[name]);
        layer[name] = larger;
      }
    }
    layer.keys.set(key, (position % layer.capacity) * this.width);
    layer.values.set(value, (position % layer.capacity) * this.width);
  }
}

const CHUNK = 64; // tokens per pass through the layers, which bounds the memory for long prompts

// Number of elements per token of each intermediate result.
function bufferSizes(config) {
  const { hidden_size: H, intermediate_size: F, num_attention_heads: N, num_key_value_heads: K, head_dim: D } = config;
  return { x: H, normed: H, output: H, q: N * D, k: K * D, v: K * D, mixed: N * D, gate: F, up: F };
}

class GPT {
  // weights: arrays by name as in `model.safetensors`; backend: `matmul`, and `allocate` for the arrays that it can read.
  constructor(config, weights, backend = { matmul, allocate: (size) => new Float32Array(size) }) {
    Object.assign(this, { config, weights, matmul: backend.matmul });
    const { head_dim: D, rope_theta: theta } = config;
    this.frequencies = Float32Array.from({ length: D / 2 }, (_, i) => 1 / Math.fround(theta ** ((2 * i) / D)));
    this.head = weights[config.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"]; // [V, H]
    const allocated = ([name, size]) => [name, backend.allocate(CHUNK * size)];
    this.buffers = Object.fromEntries(Object.entries(bufferSizes(config)).map(allocated));
    this.logits = backend.allocate(config.vocab_size);
  }

  // Number of elements that the constructor allocates.
  static workspace(config) {
    return Object.values(bufferSizes(config)).reduce((sum, size) => sum + CHUNK * size, config.vocab_size);
  }

  /* Append tokens to the cache, and return the logits [V] that follow the last one (overwritten by the next call).
     ablated: heads, as layer · N + head, whose output is replaced by 0.
     observe: functions that receive intermediate results: attention(layer, head, position, first, weights),
       residual(stage, position, x [H]) for stage 0 (embedding) to 2L (after each sublayer), logits(position, logits [V]). */
  forward(ids, cache, { ablated = new Set(), observe = {} } = {}) {
    for (let start = 0; start < ids.length; start += CHUNK) {
      const length = Math.min(CHUNK, ids.length - start);
      this.layers(ids.slice(start, start + length), cache, ablated, observe);
      for (let t = observe.logits ? 0 : length - 1; t < length; t++) {
        this.unembed(this.row("x", t, this.config.hidden_size));
        observe.logits?.(cache.length + t, this.logits);
      }
      cache.length += length;
    }
    return this.logits;
  }

  row(name, t, width) {
    return this.buffers[name].subarray(t * width, (t + 1) * width);
  }

  layers(ids, cache, ablated, observe) {
    const { hidden_size: H, rms_norm_eps: epsilon, num_hidden_layers: L } = this.config;
    const [{ x, normed, output }, w, T] = [this.buffers, this.weights, ids.length];
    const report = (stage) => {
      for (let t = 0; observe.residual && t < T; t++) observe.residual(stage, cache.length + t, this.row("x", t, H));
    };
    for (let t = 0; t < T; t++) x.set(w["model.embed_tokens.weight"].subarray(ids[t] * H, (ids[t] + 1) * H), t * H);
    report(0);
    for (let layer = 0; layer < L; layer++) {
      const name = `model.layers.${layer}`;
      rmsNorm(normed, x, w[`${name}.input_layernorm.weight`], T, H, epsilon);
      this.attention(`${name}.self_attn`, layer, T, cache, ablated, observe);
      for (let i = 0; i < T * H; i++) x[i] += output[i]; // x = x + attention(norm(x))
      report(2 * layer + 1);
      rmsNorm(normed, x, w[`${name}.post_attention_layernorm.weight`], T, H, epsilon);
      this.feedForward(`${name}.mlp`, T);
      for (let i = 0; i < T * H; i++) x[i] += output[i]; // x = x + mlp(norm(x))
      report(2 * layer + 2);
    }
  }

  // Causal grouped-query attention with QK-norm and RoPE: normed [T, H] -> output [T, H].
  attention(name, index, T, cache, ablated, observe) {
    const { hidden_size: H, num_attention_heads: N, num_key_value_heads: K, head_dim: D, rms_norm_eps } = this.config;
    const [{ normed, output, q, k, v, mixed }, w, layer] = [this.buffers, this.weights, cache.layers[index]];
    this.matmul(q, normed, w[`${name}.q_proj.weight`], T, H, N * D); // [T, N·D]
    this.matmul(k, normed, w[`${name}.k_proj.weight`], T, H, K * D); // [T, K·D]
    this.matmul(v, normed, w[`${name}.v_proj.weight`], T, H, K * D);
    rmsNorm(q, q, w[`${name}.q_norm.weight`], T * N, D, rms_norm_eps); // per head
    rmsNorm(k, k, w[`${name}.k_norm.weight`], T * K, D, rms_norm_eps);
    for (let t = 0; t < T; t++) {
      const position = cache.length + t;
      const first = Math.max(0, position - layer.window + 1); // the oldest token inside the window
      rotate(q, t * N * D, N, D, position, this.frequencies);
      rotate(k, t * K * D, K, D, position, this.frequencies);
      cache.write(layer, position, this.row("k", t, K * D), this.row("v", t, K * D));
      for (let head = 0; head < N; head++) {
        const query = q.subarray((t * N + head) * D, (t * N + head + 1) * D);
        const offset = Math.floor((head * K) / N) * D; // N / K query heads share a key and value head
        const weights = this.attend(query, layer, first, position, offset, this.row("mixed", t * N + head, D));
        observe.attention?.(index, head, position, first, weights);
        if (ablated.has(index * N + head)) mixed.fill(0, (t * N + head) * D, (t * N + head + 1) * D);
      }
    }
    this.matmul(output, mixed, w[`${name}.o_proj.weight`], T, N * D, H);
  }

  // One head and position: weights = softmax(query · keys / √D), out = the average of the values with these weights.
  attend(query, { keys, values, capacity }, first, last, offset, out) {
    const [D, width] = [query.length, this.config.num_key_value_heads * query.length];
    const weights = new Float32Array(last - first + 1);
    for (let s = first; s <= last; s++) {
      const row = (s % capacity) * width + offset;
      let even = 0; // two sums, as in `matmul`
      let odd = 0;
      for (let d = 0; d < D; d += 2) {
        even += query[d] * keys[row + d];
        odd += query[d + 1] * keys[row + d + 1];
      }
      weights[s - first] = (even + odd) / Math.sqrt(D);
    }
    softmax(weights);
    out.fill(0);
    for (let s = first; s <= last; s++) {
      const [row, weight] = [(s % capacity) * width + offset, weights[s - first]];
      for (let d = 0; d < D; d++) out[d] += weight * values[row + d];
    }
    return weights;
  }

  // SwiGLU, for each position: normed [T, H] -> output [T, H] through F hidden units.
  feedForward(name, T) {
    const [{ hidden_size: H, intermediate_size: F }, { normed, output, gate, up }] = [this.config, this.buffers];
    this.matmul(gate, normed, this.weights[`${name}.gate_proj.weight`], T, H, F);
    this.matmul(up, normed, this.weights[`${name}.up_proj.weight`], T, H, F);
    for (let i = 0; i < T * F; i++) gate[i] *= up[i] / (1 + Math.exp(-gate[i])); // silu(gate) · up
    this.matmul(output, gate, this.weights[`${name}.down_proj.weight`], T, F, H);
  }

  // Residual stream of one position [H] -> logits [V]. Applied to an earlier stage: the logit lens (nostalgebraist 2020).
  unembed(x) {
    const { hidden_size: H, vocab_size: V, rms_norm_eps } = this.config;
    rmsNorm(this.buffers.normed, x, this.weights["model.norm.weight"], 1, H, rms_norm_eps);
    this.matmul(this.logits, this.buffers.normed, this.head, 1, H, V);
    return this.logits;
  }
}

// -- generation --------------------------------------------------------------------------------------------------------

/* The distribution from which the next token is drawn. As in transformers: the repetition penalty for tokens in `previous`,
   then temperature, then the `topK` most probable tokens, then the fewest tokens with a total probability of `topP`. */
function distribution(logits, { temperature = 1, topK = 0, topP = 1, repetitionPenalty = 1 } = {}, previous = []) {
  const scores = Float64Array.from(logits);
  if (repetitionPenalty !== 1) {
    for (const id of new Set(previous)) scores[id] *= scores[id] < 0 ? repetitionPenalty : 1 / repetitionPenalty;
  }
  const best = scores.reduce((best, score, i) => (score > scores[best] ? i : best), 0);
  if (temperature === 0) return scores.fill(0).fill(1, best, best + 1); // greedy
  for (let i = 0; i < scores.length; i++) scores[i] /= temperature;
  if (topK > 0 && topK < scores.length) {
    const threshold = Float64Array.from(scores).sort()[scores.length - topK];
    for (let i = 0; i < scores.length; i++) if (scores[i] < threshold) scores[i] = -Infinity;
  }
  softmax(scores);
  if (topP < 1) {
    const order = Array.from(scores.keys())
      .filter((i) => scores[i] > 0)
      .sort((a, b) => scores[b] - scores[a]);
    let total = 0;
    for (const i of order) {
      const isKept = total < topP;
      total += scores[i];
      if (!isKept) scores[i] = 0;
    }
    const kept = scores.reduce((sum, p) => sum + p, 0);
    for (let i = 0; i < scores.length; i++) scores[i] /= kept;
  }
  return scores;
}

// Random numbers in [0, 1) that depend only on the seed (mulberry32).
function randomNumbers(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), seed | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

function draw(probabilities, random) {
  let [rest, last] = [random(), 0];
  for (let i = 0; i < probabilities.length; i++) {
    if (probabilities[i] === 0) continue;
    last = i;
    if ((rest -= probabilities[i]) < 0) break;
  }
  return last;
}

// Yield the next token and the logits it was drawn from, until a stop token or the end of the context.
function* generate(model, ids, { seed = 0, maxNewTokens = Infinity, stop = [], ...options } = {}) {
  const [cache, random, all] = [new Cache(model.config), randomNumbers(seed), [...ids]];
  const isUnlimited = cache.layers.every((layer) => layer.window < Infinity);
  const context = isUnlimited ? Infinity : model.config.max_position_embeddings;
  if (ids.length >= context)
    throw new Error(`the text has ${ids.length} tokens, and the model supports ${context}; shorten it`);
  const end = Math.min(ids.length + maxNewTokens, context);
  for (let next = ids; all.length < end; next = all.slice(-1)) {
    const logits = model.forward(next, cache);
    const id = draw(distribution(logits, options, all), random);
    all.push(id);
    yield { id, logits };
    if (stop.includes(id)) return;
  }
}

if (typeof module !== "undefined") {
  module.exports = { Cache, GPT, matmul, softmax, distribution, randomNumbers, draw, generate };
}
