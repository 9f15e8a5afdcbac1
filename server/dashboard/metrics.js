"use strict";
// Reading Prometheus' text format, and rates and quantiles from two readings of it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

// The text of /metrics as {name: [{labels, value}]}.
function parseMetrics(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, key, value] of (match[2] || "").matchAll(LABEL)) labels[key] = value;
    (found[match[1]] ||= []).push({labels, value: Number(match[3])});
  }
  return found;
}

// The sum of a metric over all series whose labels fit; NaN where there is none.
function total(metrics, name, labels = {}) {
  const fits = (metrics[name] || []).filter(
    (sample) => Object.entries(labels).every(([key, value]) => sample.labels[key] === value));
  return fits.length ? fits.reduce((sum, sample) => sum + sample.value, 0) : NaN;
}

// Increase per second of a counter between two readings.
function rate(before, now, name) {
  return Math.max(0, total(now.metrics, name) - total(before.metrics, name)) / (now.time - before.time);
}

// Cumulative counts of a histogram by upper bound, over all series.
function buckets(metrics, name) {
  const counts = new Map();
  for (const {labels, value} of metrics[`${name}_bucket`] || []) {
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(bound, (counts.get(bound) || 0) + value);
  }
  return counts;
}

// A quantile of what was observed between two readings, linear within its bucket, as PromQL's
// histogram_quantile has it; null where nothing was observed.
function quantile(before, now, name, q) {
  const old = buckets(before.metrics, name);
  const counts = [...buckets(now.metrics, name)].sort(([a], [b]) => a - b)
    .map(([bound, count]) => [bound, count - (old.get(bound) || 0)]);
  const all = counts.length ? counts[counts.length - 1][1] : 0;
  if (!(all > 0)) return null;
  let lower = 0, below = 0;
  for (const [bound, count] of counts) {
    if (count >= q * all) {
      if (bound === Infinity) return lower;
      return lower + (bound - lower) * (q * all - below) / Math.max(count - below, 1e-9);
    }
    lower = bound;
    below = count;
  }
  return lower;
}
