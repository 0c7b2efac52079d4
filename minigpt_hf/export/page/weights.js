"use strict";
/* The weights of the page -> arrays by name. They are stored one after another in one base64 string, each as float32, float16
or int8. An int8 matrix is preceded by one float32 per row, the step: weight = step · integer. All become float32. */

function decodeWeights(base64, tensors, allocate) {
  const bytes = decodeBase64(base64);
  const float16 = tensors.some((tensor) => tensor.dtype === "float16") ? float16Values() : null;
  const weights = {};
  for (const { name, shape, dtype, offset } of tensors) {
    const [size, width] = [shape.reduce((product, n) => product * n, 1), shape.at(-1)];
    const out = (weights[name] = allocate(size));
    if (dtype === "float32") {
      out.set(new Float32Array(bytes.buffer, offset, size));
    } else if (dtype === "float16") {
      const bits = new Uint16Array(bytes.buffer, offset, size);
      for (let i = 0; i < size; i++) out[i] = float16[bits[i]];
    } else {
      const steps = new Float32Array(bytes.buffer, offset, size / width); // one per row
      const integers = new Int8Array(bytes.buffer, offset + steps.byteLength, size);
      for (let i = 0; i < size; i++) out[i] = integers[i] * steps[Math.floor(i / width)];
    }
  }
  return weights;
}

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

// The value of each of the 65,536 float16 numbers: a sign, 5 bits of exponent and 10 of mantissa.
function float16Values() {
  return Float32Array.from({ length: 1 << 16 }, (_, bits) => {
    const [sign, exponent, mantissa] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + mantissa / 1024) : 2 ** -14 * (mantissa / 1024));
  });
}

if (typeof module !== "undefined") module.exports = { decodeWeights };
