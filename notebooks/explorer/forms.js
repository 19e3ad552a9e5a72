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

// Bytes or MACs of a shape; null where the attention does not take it, or where no form was found for it.
function evaluateForm([rounding, byPadding], at) {
  if (at.dim % at.heads || at.heads < 2 || (at.batch ?? 1) !== 1) return null;
  const own = byPadding[paddingOf(rounding[0], at)];
  const forms = own.length ? own : byPadding[0].length ? byPadding[0] : byPadding[3];
  const spatial = spatialTerms(rounding, at);
  const channel = [1, at.dim, at.heads, at.dim * at.dim, (at.dim * at.dim) / at.heads];
  const sum = (form) => form.reduce((total, [factor, s, c]) => total + factor * spatial[s] * channel[c], 0);
  return forms.length ? Math.max(...forms.map(sum)) : null;
}
