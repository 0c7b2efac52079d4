"use strict";
/* The matrix product of `gpt.js` in WebAssembly with SIMD: each instruction multiplies or adds four float32 numbers.

The module is assembled here, byte by byte, from the instructions below; the format is that of the WebAssembly specification.
Where WebAssembly is not available, `createBackend` returns the JavaScript version. */

const I32 = 0x7f,
  F32 = 0x7d,
  V128 = 0x7b,
  NONE = 0x40;
const get = (local) => [0x20, local];
const set = (local) => [0x21, local];
const i32 = (value) => [0x41, ...leb(value, true)];
const [ADD, MULTIPLY, AND, LESS, EQUALS_ZERO] = [[0x6a], [0x6c], [0x71], [0x49], [0x45]]; // of i32
const [F32_ADD, F32_MULTIPLY, F32_LOAD, F32_STORE] = [[0x92], [0x94], [0x2a, 2, 0], [0x38, 2, 0]];
const [V_ADD, V_MULTIPLY] = [
  [0xfd, 0xe4, 0x01],
  [0xfd, 0xe6, 0x01],
]; // f32x4
const V_ZERO = [0xfd, 0x0c, ...new Array(16).fill(0)];
const vLoad = (offset) => [0xfd, 0x00, 0, offset];
const lane = (index) => [0xfd, 0x1f, index];
const increase = (local, amount) => [...get(local), ...amount, ...ADD, ...set(local)];
// block { loop { if not condition: leave the block; body; repeat } }
const whileLoop = (condition, ...body) => [
  0x02,
  NONE,
  0x03,
  NONE,
  ...condition,
  ...EQUALS_ZERO,
  0x0d,
  1,
  ...body.flat(),
  0x0c,
  0,
  0x0b,
  0x0b,
];

// Integers in LEB128: seven bits per byte, the lowest first.
function leb(value, signed = false) {
  const bytes = [];
  for (;;) {
    const byte = value & 0x7f;
    value >>= 7;
    const isLast = signed ? value === (byte & 0x40 ? -1 : 0) : value === 0;
    bytes.push(isLast ? byte : byte | 0x80);
    if (isLast) return bytes;
  }
}

/* matmul(out, x, weight, length, inputs, outputs): pointers in bytes, sizes in elements.

     for o < outputs, t < length:
       four vector sums over x[t] · weight[o], 16 elements per iteration, then the remaining elements one by one
       out[t · outputs + o] = the sum

   After the inputs of row t, the pointer into x is at row t + 1. */
function assemble() {
  const [OUT, X, WEIGHT, LENGTH, INPUTS, OUTPUTS, O, T, XP, WP, END, SUM, A] = Array(13).keys(); // A to A + 3: vector sums
  const factors = (load) => [...get(XP), ...load, ...get(WP), ...load];
  const product = (i) => [...get(A + i), ...factors(vLoad(16 * i)), ...V_MULTIPLY, ...V_ADD, ...set(A + i)];
  const advance = (bytes) => [...increase(XP, i32(bytes)), ...increase(WP, i32(bytes))];
  const times4 = (count) => [...count, ...i32(4), ...MULTIPLY];
  const body = whileLoop(
    [...get(O), ...get(OUTPUTS), ...LESS],
    [...i32(0), ...set(T), ...get(X), ...set(XP)],
    whileLoop(
      [...get(T), ...get(LENGTH), ...LESS],
      [...get(WEIGHT), ...set(WP)],
      [0, 1, 2, 3].flatMap((i) => [...V_ZERO, ...set(A + i)]),
      [...get(XP), ...times4([...get(INPUTS), ...i32(-16), ...AND]), ...ADD, ...set(END)],
      whileLoop([...get(XP), ...get(END), ...LESS], [0, 1, 2, 3].flatMap(product), advance(64)),
      [...get(A), ...get(A + 1), ...V_ADD, ...get(A + 2), ...get(A + 3), ...V_ADD, ...V_ADD, ...set(A)],
      [...get(A), ...lane(0), ...get(A), ...lane(1), ...F32_ADD],
      [...get(A), ...lane(2), ...get(A), ...lane(3), ...F32_ADD, ...F32_ADD, ...set(SUM)],
      increase(END, times4([...get(INPUTS), ...i32(15), ...AND])),
      whileLoop(
        [...get(XP), ...get(END), ...LESS],
        [...get(SUM), ...factors(F32_LOAD), ...F32_MULTIPLY, ...F32_ADD, ...set(SUM)],
        advance(4),
      ),
      [...get(OUT), ...times4([...get(T), ...get(OUTPUTS), ...MULTIPLY, ...get(O), ...ADD]), ...ADD],
      [...get(SUM), ...F32_STORE],
      increase(T, i32(1)),
    ),
    increase(WEIGHT, times4(get(INPUTS))),
    increase(O, i32(1)),
  );
  const vector = (items) => [...leb(items.length), ...items.flat()];
  const section = (id, content) => [id, ...leb(content.length), ...content];
  const text = (name) => vector([...new TextEncoder().encode(name)]);
  const locals = vector([
    [5, I32],
    [1, F32],
    [4, V128],
  ]); // O to END, SUM, A to A + 3
  const code = [...locals, ...body, 0x0b];
  return Uint8Array.from([
    ...[0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // "\0asm", version 1
    ...section(1, vector([[0x60, ...vector(Array(6).fill(I32)), 0]])), // type: six i32 -> nothing
    ...section(2, vector([[...text("page"), ...text("memory"), 0x02, 0x00, 0]])), // import: memory
    ...section(3, vector([0])), // function of type 0
    ...section(7, vector([[...text("matmul"), 0x00, 0]])), // export
    ...section(10, vector([[...leb(code.length), ...code]])),
  ]);
}

// `matmul`, and `allocate` for arrays that it can read: views of one memory of `capacity` float32 numbers.
function createBackend(capacity) {
  try {
    const memory = new WebAssembly.Memory({ initial: Math.ceil((4 * capacity) / 65536) + 1 });
    const { exports } = new WebAssembly.Instance(new WebAssembly.Module(assemble()), { page: { memory } });
    let used = 0;
    return {
      name: "WebAssembly",
      allocate: (size) => new Float32Array(memory.buffer, 4 * (used += size) - 4 * size, size),
      matmul: (out, x, weight, ...sizes) => exports.matmul(out.byteOffset, x.byteOffset, weight.byteOffset, ...sizes),
    };
  } catch {
    return { name: "JavaScript", allocate: (size) => new Float32Array(size), matmul };
  }
}

if (typeof module !== "undefined") module.exports = { createBackend };
