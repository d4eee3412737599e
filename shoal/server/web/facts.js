// What an answer took, as short text: tokens, speed, first token, cache, money, energy. Only what is known is said.

export function factsOf(node) {
  const { usage } = node;
  const facts = [];
  if (node.tokens) facts.push(`${usage ? "" : "≈"}${node.tokens} tokens`);
  if (node.tokens_per_s) facts.push(`${rounded(node.tokens_per_s)} tokens/s`);
  if (node.first_s !== undefined && node.first_s !== null) facts.push(`first after ${duration(node.first_s)}`);
  if (usage?.prompt_tokens) facts.push(promptFact(usage));
  const cost = Number(usage?.cost_usd ?? NaN);
  if (Number.isFinite(cost)) facts.push(dollars(cost));
  const joules = Number(usage?.joules ?? NaN);
  if (Number.isFinite(joules)) facts.push(`${energy(joules)}${usage.energy_kind === "modelled" ? " (modelled)" : ""}`);
  const ending = endingOf(node);
  if (ending) facts.push(ending);
  return facts;
}

function promptFact(usage) {
  const hit = usage.prompt_cache_hit_tokens;
  return `prompt ${usage.prompt_tokens}${hit ? `, ${hit} from cache` : ""}`;
}

function endingOf(node) {
  if (node.state === "stopped") return "stopped";
  if (node.finish_reason === "length") return "cut off at the longest length allowed";
  if (node.finish_reason === "insufficient_system_resource") return "ended by the server";
  return "";
}

export function duration(value_s) {
  if (value_s < 1) return `${Math.round(value_s * 1000)} ms`;
  if (value_s < 60) return `${value_s.toFixed(1)} s`;
  const minutes = Math.floor(value_s / 60);
  return minutes < 60 ? `${minutes} min ${Math.floor(value_s % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function rounded(value) {
  const size = Math.abs(value);
  if (size >= 1e5) return `${Number((value / 1e3).toPrecision(3))}k`;
  return size >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
}

// 1234567 as 1.23 M.
export function counted(value) {
  const power = Math.abs(value) < 1000 ? 0 : Math.min(6, Math.floor(Math.log10(Math.abs(value)) / 3));
  return `${Number((value / 1000 ** power).toPrecision(3))} ${["", "k", "M", "G", "T", "P", "E"][power]}`.trimEnd();
}

export function energy(value_j) {
  return value_j >= 1000 ? `${rounded(value_j / 1000)} kJ` : `${rounded(value_j)} J`;
}

function dollars(value) {
  if (value === 0) return "$0";
  return value >= 0.01 ? `$${value.toFixed(2)}` : `$${value.toFixed(Math.min(12, 1 - Math.floor(Math.log10(value))))}`;
}
