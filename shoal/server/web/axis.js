// Axes: where a number lies between both ends (its share, 0 to 1) and which round numbers are written beside it.

// Round numbers that span [low, high], about `count` of them.
export function ticks(low, high, count = 5) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = power * [1, 2, 5, 10].find((factor) => span / (power * factor) <= count);
  const out = [];
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  for (let index = Math.floor(low / step + 1e-9); index <= Math.ceil(high / step - 1e-9); index += 1) {
    out.push(Number((index * step).toFixed(Math.min(digits, 20))));
  }
  return out;
}

// From data to data: steps begin and end where the lines do.
export function linearAcross(low, high) {
  const span = high - low || 1;
  return {
    ticks: ticks(low, high, 6).filter((tick) => tick >= low && tick <= high),
    share: (value) => (value - low) / span,
    at: (share) => low + share * span,
  };
}

// From tick to tick, from zero where that is asked for.
export function linearUp(low, high, fromZero) {
  const bottom = fromZero ? Math.min(0, low) : low;
  const values = ticks(bottom, high === bottom ? bottom + (Math.abs(bottom) || 1) * 0.1 : high);
  const span = values.at(-1) - values[0];
  return { ticks: values, share: (value) => (value - values[0]) / span };
}

// Equal factors are equally far apart; both ends must be above zero. Contexts double, so ticks are powers of four.
export function logarithmicAcross(low, high) {
  const span = Math.log(high / low) || 1;
  return {
    ticks: powers(4, low, high),
    share: (value) => Math.log(value / low) / span,
    at: (share) => low * Math.exp(Math.max(0, Math.min(1, share)) * span),
  };
}

export function logarithmicUp(low, high) {
  const bottom = 10 ** Math.floor(Math.log10(low) + 1e-9);
  const top = Math.max(10 ** Math.ceil(Math.log10(high) - 1e-9), bottom * 10);
  const span = Math.log(top / bottom);
  return { ticks: powers(10, bottom, top), share: (value) => Math.log(Math.max(value, bottom) / bottom) / span };
}

function powers(base, low, high) {
  const first = Math.ceil(Math.log(low) / Math.log(base) - 1e-9);
  const last = Math.floor(Math.log(high) / Math.log(base) + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, index) => base ** (first + index));
}
