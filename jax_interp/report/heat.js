// Values -> colours. One scale for all that is compared; zero is exactly neutral; what is not known is hatched.

/** Where a value stands on its scale: -1 to 1, exactly 0 for 0, NaN when it is not known. */
function heat(value, scale) {
  if (!Number.isFinite(value)) return NaN;
  return scale > 0 ? Math.max(-1, Math.min(1, value / scale)) : Math.sign(value);
}

/** The CSS image of a heat: nothing for 0, hatched for NaN. */
function paint(heat) {
  if (Number.isNaN(heat)) return 'var(--hatch)';
  if (heat === 0) return 'none';
  const colour = `rgb(var(--${heat < 0 ? 'cold' : 'hot'}) / ${Math.abs(heat).toFixed(3)})`;
  return `linear-gradient(${colour}, ${colour})`;
}
