"use strict";
// One image in, labels, probabilities and the alarm out, over Triton's own HTTP protocol (KServe v2 with binary tensors).

const MODEL = document.documentElement.dataset.model;
const MAX_IMAGE_BYTES = Number(document.documentElement.dataset.maxImageBytes);
const TIMEOUT_MS = 60000;
const TOP = 5;
const MOST_CLASSES = 100000; // all are asked for: the suspected target need not be among the first
const RAISED = Number(document.documentElement.dataset.alarmThreshold); // as the counter cbpt_alarm_total
const $ = (id) => document.getElementById(id);
let latest = 0;

function request(image) {
  // The body is JSON, then the BYTES tensor: a little-endian length and the file itself.
  const header = new TextEncoder().encode(JSON.stringify({
    inputs: [{ name: "image", shape: [1, 1], datatype: "BYTES", parameters: { binary_data_size: 4 + image.size } }],
    outputs: [
      { name: "probabilities", parameters: { classification: MOST_CLASSES } },
      { name: "alarm" },
      { name: "alarm_target" },
    ],
  }));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, image.size, true);
  return {
    method: "POST",
    headers: {
      "Content-Type": "application/octet-stream",
      "Inference-Header-Content-Length": String(header.length),
    },
    body: new Blob([header, length, image]),
    signal: AbortSignal.timeout(TIMEOUT_MS),
  };
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    const isLate = error.name === "TimeoutError";
    throw new Error(isLate ? `No answer within ${TIMEOUT_MS / 1000} s.` : "The server cannot be reached.");
  }
  const text = await response.text();
  if (response.ok) return text;
  let reason = text;
  try {
    reason = JSON.parse(text).error;
  } catch {
    // not Triton's form of an error: shown as it came
  }
  throw new Error(`${reason || "The server gave no reason"} (HTTP ${response.status})`);
}

function read(text) {
  // {"outputs": [{"name": "probabilities", "data": ["0.96:3:bicycle", ...]}, {"name": "alarm", "data": [0.01]}]}
  try {
    const outputs = Object.fromEntries(JSON.parse(text).outputs.map((output) => [output.name, output.data]));
    const classes = outputs.probabilities.map((entry) => {
      const [probability, index, ...label] = entry.split(":");
      return { probability: Number(probability), index: Number(index), label: label.join(":") || `class ${index}` };
    });
    const target = outputs.alarm_target[0];
    return {
      classes: classes.slice(0, TOP),
      alarm: outputs.alarm[0],
      target: classes.find(({ index }) => index === target)?.label ?? `class ${target}`,
    };
  } catch {
    throw new Error("The server's answer could not be read.");
  }
}

function meter(value) {
  const bar = document.createElement("meter");
  Object.assign(bar, { min: 0, max: 1, value });
  return bar;
}

function show({ classes, alarm, target }, took_ms) {
  const isRaised = alarm > RAISED;
  $("alarm").className = isRaised ? "raised" : "quiet";
  $("verdict").textContent = isRaised
    ? `Alarm: only the original head says “${target}”. This image may carry the trigger.`
    : "No alarm: the original head says nothing suspicious that the purified one does not.";
  $("alarm-meter").value = alarm;
  $("alarm-value").textContent = alarm.toFixed(3);
  $("classes").replaceChildren(...classes.map(({ label, probability }) => {
    const row = document.createElement("tr");
    row.insertCell().textContent = label;
    row.insertCell().append(meter(probability), ` ${(100 * probability).toFixed(1)} %`);
    return row;
  }));
  $("took").textContent = `${Math.round(took_ms)} ms there and back`;
  $("answer").hidden = false;
}

function fail(message) {
  $("answer").hidden = true;
  $("error").textContent = message;
  $("error").hidden = false;
}

function preview(image) {
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(image);
  $("caption").textContent = image.name;
  $("picture").hidden = false;
}

async function classify(image) {
  const turn = ++latest; // an older question's answer must not replace a newer one's
  $("error").hidden = true;
  preview(image);
  if (image.size > MAX_IMAGE_BYTES) {
    fail(`Expected an image file of at most ${MAX_IMAGE_BYTES} bytes; got ${image.size}. Choose a smaller one.`);
    return;
  }
  $("answer").setAttribute("aria-busy", "true");
  const started = performance.now();
  try {
    const answer = read(await ask(`v2/models/${MODEL}/infer`, request(image)));
    if (turn === latest) show(answer, performance.now() - started);
  } catch (error) {
    if (turn === latest) fail(error.message);
  }
  if (turn === latest) $("answer").removeAttribute("aria-busy");
}

async function watch() {
  try {
    await ask("v2/health/ready", { signal: AbortSignal.timeout(5000) });
    $("ready").textContent = "ready";
  } catch {
    $("ready").textContent = "not ready";
  }
  setTimeout(watch, 5000);
}

function take(files) {
  if (files.length > 0) classify(files[0]);
}

for (const event of ["load", "error"]) {
  // A browser cannot draw everything the server reads, nor everything people drop.
  $("preview").addEventListener(event, () => { $("preview").hidden = event === "error"; });
}
$("file").addEventListener("change", () => {
  take($("file").files);
  $("file").value = ""; // the same file can be chosen again
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));
watch();
