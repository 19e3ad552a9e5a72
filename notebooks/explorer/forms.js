"use strict";
// Predictions as closed forms: sums of monomials in grid, channels and heads, with grids rounded as they are padded.
// The same as ablations/analysis/closed_form.py.

// Padding decides which operators copy: of nothing, of the width, of the height, or of both.
const paddingOf = (up, at) => (at.width % up ? 1 : 0) + (at.height % up ? 2 : 0);

function spatialTerms([up, coarse, down], at) {
  const rounded = (side) => {
    const once = Math.ceil(side / up) * up;
    return [once, (down ? Math.floor(once / coarse) : Math.ceil(once / coarse)) * coarse];
  };
  const [A, C] = rounded(at.height);
  const [B, D] = rounded(at.width);
  const sides = { 1: 1, H: at.height, W: at.width, A, B, C, D };
  return DATA.predictions.spatial.map((name) => [...name].reduce((product, letter) => product * sides[letter], 1));
}

// Scratch on CUDA that grows in steps: of a sum over the rows of a matrix, and of the memory-efficient kernel's backward
// pass. ColumnSum and TiledBackward of profiling/meters/cuda_scratch.py.
function ofSum(rows, columns, vector, bytes) {
  const threads = 512 / vector;
  const outputs = Math.floor(columns / vector);
  const power = (number) => (number >= threads ? threads : 2 ** Math.floor(Math.log2(number)));
  let width = Math.min(power(outputs), 32);
  const height = Math.min(power(rows), Math.floor(threads / width));
  width = Math.min(power(outputs), Math.floor(threads / height));
  const each = Math.ceil(rows / height);
  const grid = Math.ceil(outputs / width);
  const room = 132 * Math.floor(2048 / (width * height));
  if (rows < Math.min(16 * height, 256) || each < 256 || grid > room) return 0;
  const blocks = Math.max(Math.min(Math.ceil(room / grid), Math.ceil(each / 16)), Math.ceil(each / 256));
  return blocks === 1 ? 0 : bytes * columns * blocks * width * vector + 4 * grid;
}

const SCRATCH = {
  sum: ofSum,
  tiles: (heads, tokens, width) => 4 * heads * tokens + heads * Math.ceil(tokens / 64) * (16 + 4 * 64 * width),
};

// Bytes or MACs of a shape; null where the attention does not take it, or where no form was found for it.
function evaluateForm([rounding, byPadding], at) {
  if (at.dim % at.heads || at.heads < 2 || (at.batch ?? 1) !== 1) return null;
  const own = byPadding[paddingOf(rounding[0], at)];
  const forms = own.length ? own : byPadding[0].length ? byPadding[0] : byPadding[3];
  const spatial = spatialTerms(rounding, at);
  const channel = [1, at.dim, at.heads, at.dim * at.dim, (at.dim * at.dim) / at.heads];
  const sum = (form) => form.reduce((total, [factor, s, c]) => total + factor * spatial[s] * channel[c], 0);
  const whole = (form) => (Array.isArray(form) ? sum(form)
    : sum(form.alive) + SCRATCH[form.rule](...form.sizes.map((size) => Math.round(sum(size))), ...form.constants));
  return forms.length ? Math.max(...forms.map(whole)) : null;
}
