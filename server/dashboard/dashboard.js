"use strict";
// Everything shown comes from /metrics, which is right for all API server processes, /pifa/info and /ready.

const SECONDS = 2;      // between two readings
const POINTS = 150;     // on a chart
const WINDOW = 30;      // readings that percentiles are taken over
const RATE_WINDOW = 3;  // readings that rates are taken over

const element = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const show = (id, text) => { element(id).textContent = text; };
const readings = [];
const charts = {};

function bytes(value) {
  const unit = value >= 1e9 ? [1e9, "GB"] : value >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(value / unit[0]).toFixed(value / unit[0] < 10 ? 2 : 1)} ${unit[1]}`;
}

function seconds(value) {
  if (value === null || Number.isNaN(value)) return "–";
  return value < 1 ? `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}

const number = (value) => Number.isNaN(value) ? "–" : value.toFixed(value < 10 && value % 1 ? 1 : 0);

// A chart over time whose series are [label, value => text].
function timeChart(id, labels, format) {
  const holder = element(id);
  const axis = {stroke: () => color("soft"), grid: {stroke: () => color("grid"), width: 1}, ticks: {show: false}, font: "11px system-ui"};
  const plot = new uPlot({
    width: holder.clientWidth, height: holder.clientHeight - 26,
    cursor: {points: {size: 6}},
    scales: {y: {range: (_, low, high) => [0, Math.max(high * 1.1, 1e-3)]}},
    axes: [axis, {...axis, size: 58, values: (_, ticks) => ticks.map(format)}],
    series: [{value: (_, time) => time === null ? "" : new Date(time * 1000).toLocaleTimeString()},
      ...labels.map((label, i) => ({
        label, stroke: () => color(`s${i + 1}`), width: 1.6, points: {show: false},
        value: (_, value) => value === null || value === undefined ? "–" : format(value)}))],
  }, [[], ...labels.map(() => [])], holder);
  charts[id] = {plot, data: plot.data.map(() => [])};
}

function push(id, time, values) {
  const {plot, data} = charts[id];
  [time, ...values].forEach((value, i) => {
    data[i].push(Number.isNaN(value) ? null : value);
    if (data[i].length > POINTS) data[i].shift();
  });
  plot.setData(data);
}

function rankChart(modules) {
  const kinds = [...new Set(modules.map((module) => module.kind))];
  const layers = [...new Set(modules.map((module) => module.layer))].sort((a, b) => a - b);
  const of = (kind, layer) => modules.find((module) => module.kind === kind && module.layer === layer);
  const data = [layers, ...kinds.map((kind) => layers.map((layer) => of(kind, layer)?.density ?? null))];
  const holder = element("chart-ranks");
  const axis = {stroke: () => color("soft"), grid: {stroke: () => color("grid"), width: 1}, ticks: {show: false}, font: "11px system-ui"};
  charts["chart-ranks"] = {data, plot: new uPlot({
    width: holder.clientWidth, height: holder.clientHeight - 46,
    scales: {x: {time: false}, y: {range: [0, 1]}},
    axes: [{...axis, incrs: [1, 2, 4, 5, 10, 20]}, {...axis, size: 44}],
    series: [{label: "layer"}, ...kinds.map((kind, i) => ({
      label: kind.replace("_proj", ""), stroke: () => color(`s${i % 7 + 1}`), width: 1.6, points: {size: 4},
      value: (_, value, series, index) => {
        const module = index === null ? null : of(kind, layers[index]);
        return module ? (module.rank === null ? "dense" : `rank ${module.rank}`) : "–";
      }}))],
  }, data, holder)};
  const ranks = modules.filter((module) => module.rank !== null).map((module) => module.rank);
  show("ranks-note", ranks.length
    ? `${ranks.length} of ${modules.length} modules compressed, ranks ${Math.min(...ranks)} to ${Math.max(...ranks)}`
    : "no module is compressed");
}

function showWeights(info) {
  if (!info.dense_bytes) return;
  element("weights-dense").style.width = "100%";
  element("weights-served").style.width = `${100 * info.compressed_bytes / info.dense_bytes}%`;
  show("bytes-dense", bytes(info.dense_bytes));
  show("bytes-served", bytes(info.compressed_bytes));
  show("gained", `${bytes(info.kv_cache.gained_bytes)} saved: room for ${info.kv_cache.gained_tokens.toLocaleString("en")} ` +
    "more tokens in the KV cache");
}

function showMemory(metrics) {
  const samples = metrics.pifa_device_memory_bytes || [];
  const ranks = samples.filter(({labels}) => labels.part === "total").map(({labels: {engine, rank}}) => {
    const part = (name) => total(metrics, "pifa_device_memory_bytes", {engine, rank, part: name});
    const used = ["weights", "kv_cache", "other"].map((name) => [name, part(name)]);
    const sum = used.reduce((bytes, [, value]) => bytes + value, 0);
    return {engine, rank, used, sum, all: Math.max(part("total"), sum)};
  });
  if (!ranks.length) return;
  const {engine, rank, used, sum, all} = ranks.reduce((fullest, one) =>
    one.sum / one.all > fullest.sum / fullest.all ? one : fullest);
  const where = ranks.length > 1 ? `, engine ${engine} rank ${rank}, the fullest of ${ranks.length}` : "";
  show("memory-where", where);
  const parts = [...used, ["free", all - sum]];
  const colored = (name, value) => {
    const box = document.createElement("i");
    box.className = `part-${name}`;
    box.title = `${name.replace("_", " ")} ${bytes(value)}`;
    return box;
  };
  element("memory").replaceChildren(...parts.map(([name, value]) => {
    const box = colored(name, value);
    box.style.flexGrow = value / all;
    return box;
  }));
  element("memory-legend").replaceChildren(...parts.map(([name, value]) => {
    const item = document.createElement("li");
    item.append(colored(name, value), `${name.replace("_", " ")} ${bytes(value)}`);
    return item;
  }));
}

function update(metrics) {
  const now = {time: Date.now() / 1000, metrics};
  readings.push(now);
  if (readings.length > WINDOW + 1) readings.shift();
  showMemory(metrics);
  const running = total(metrics, "vllm:num_requests_running");
  const waiting = total(metrics, "vllm:num_requests_waiting");
  show("running", number(running));
  show("waiting", number(waiting));
  show("kv-usage", `${(100 * total(metrics, "vllm:kv_cache_usage_perc")).toFixed(1)} %`);
  show("kv-tokens", `of ${total(metrics, "pifa_kv_cache_tokens").toLocaleString("en")} tokens`);
  show("refused", number(total(metrics, "vllm:admission_rejections_total")));
  if (readings.length < 2) return;
  const before = readings[Math.max(0, readings.length - 1 - RATE_WINDOW)];
  const prompt = rate(before, now, "vllm:prompt_tokens_total");
  const generation = rate(before, now, "vllm:generation_tokens_total");
  show("prompt-rate", number(prompt));
  show("generation-rate", number(generation));
  const percentiles = (name) => [0.5, 0.95, 0.99].map((q) => quantile(readings[0], now, name, q));
  const ttft = percentiles("vllm:time_to_first_token_seconds");
  const itl = percentiles("vllm:inter_token_latency_seconds");
  show("ttft", seconds(ttft[0]));
  show("itl", seconds(itl[0]));
  push("chart-tokens", now.time, [generation, prompt]);
  push("chart-ttft", now.time, ttft);
  push("chart-itl", now.time, itl);
  push("chart-requests", now.time, [running, waiting]);
}

function setStatus(text, kind) {
  show("status", text);
  element("status").className = `status ${kind}`;
}

async function poll() {
  try {
    const response = await fetch("metrics");
    if (!response.ok) throw new Error(`/metrics answers ${response.status}`);
    const metrics = parseMetrics(await response.text());
    update(metrics);
    if (total(metrics, "pifa_ready") === 1) setStatus("ready", "ready");
    else setStatus(`not ready: ${(await (await fetch("ready")).json()).reason}`, "failing");
  } catch (error) {
    setStatus(`no answer (${error.message})`, "failing");
  }
  setTimeout(poll, SECONDS * 1000);
}

async function start() {
  timeChart("chart-tokens", ["generated", "prompt"], (value) => value.toFixed(value < 10 ? 1 : 0));
  timeChart("chart-ttft", ["median", "p95", "p99"], seconds);
  timeChart("chart-itl", ["median", "p95", "p99"], seconds);
  timeChart("chart-requests", ["running", "waiting"], (value) => value.toFixed(0));
  const info = await (await fetch("pifa/info")).json();
  document.title = `${info.model} – pifa-vllm`;
  show("model", info.model);
  const density = info.density === undefined ? "" : `density ${info.density.toFixed(3)}, `;
  show("about", `${info.quantization}, ${density}${info.dtype}, kernels ${info.backend}, context ` +
    `${info.max_model_len.toLocaleString("en")}; pifa-vllm ${info.versions.version}, vLLM ${info.versions.vllm}`);
  showWeights(info);
  if (info.modules?.length) rankChart(info.modules);
  startChat(info.model);
  poll();
}

addEventListener("resize", () => {
  for (const [id, {plot}] of Object.entries(charts)) {
    const holder = element(id);
    plot.setSize({width: holder.clientWidth, height: plot.height});
  }
});
// Canvases do not follow the color scheme by themselves.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const {plot} of Object.values(charts)) plot.redraw(false, true);
});
start().catch((error) => setStatus(error.message, "failing"));
