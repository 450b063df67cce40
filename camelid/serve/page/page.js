// The page: conversations, what is shown of them, and what a person does to them.

import { Refused, answer, models } from "/page/ask.js";
import { begunText, hide, isEnd, kept, legend, textOf, tokensOf } from "/page/glass.js";
import { blocks, element } from "/page/marks.js";
import { other, translate, word } from "/page/words.js";

const at = (id) => document.getElementById(id);
const read = (name, otherwise) => JSON.parse(localStorage.getItem(`camelid.${name}`) ?? "null") ?? otherwise;
const write = (name, value) => localStorage.setItem(`camelid.${name}`, JSON.stringify(value));
const DEFAULTS = { temperature: 0.7, top_p: 0.95, min_p: 0.05, max_tokens: 512, seed: "" };
const RANGES = { temperature: [0, 2, 0.1], top_p: [0.05, 1, 0.05], min_p: [0, 1, 0.01], max_tokens: [1, 1048576, 1], seed: [0, 2 ** 53 - 1, 1] };

let known = []; // models
let conversations = read("conversations", []);
let current = conversations[0] ?? fresh();
const settings = read("settings", { system: "", sides: [{ ...DEFAULTS }, { ...DEFAULTS, temperature: 0 }] });
const view = read("view", { glass: false, compare: false });
let running = null; // an AbortController while an answer comes
let editing = null; // { id of its conversation, number, text } of a message that is being changed

function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), messages: [] };
}

function save(one = current) {
  const others = read("conversations", []).filter((c) => c.id !== one.id); // another tab may have written since
  conversations = one.messages.length ? [one, ...others].slice(0, 50) : others;
  for (;;) {
    try {
      return write("conversations", conversations);
    } catch (error) {
      // The browser's storage is full: first the alternatives of the oldest go, then they themselves.
      const bulky = conversations.slice(1).findLast((c) => c.messages.some((m) => m.sides?.some((s) => s.tokens?.length)));
      if (bulky) bulky.messages = bulky.messages.map((m) => (m.sides ? { ...m, sides: m.sides.map((s) => ({ ...s, tokens: [] })) } : m));
      else if (conversations.length < 2) return;
      else conversations.pop();
    }
  }
}

// A message of the model has one or two `sides`: { text, tokens, fault }.
const chosenModel = (side) => known.find((m) => m.id === (side ? settings.sides[1].model : at("model").value)) ?? known[0];

function history(until, side) {
  const told = settings.system && known[0]?.chat ? [{ role: "system", content: settings.system }] : [];
  for (const message of current.messages.slice(0, until)) {
    const content = message.role === "user" ? message.content : (message.sides[side] ?? message.sides[0]).text;
    told.push({ role: message.role, content });
  }
  return told;
}

async function say(text) {
  current.messages.push({ role: "user", content: text }, { role: "assistant", sides: [] });
  await complete(current.messages.length - 1, view.compare && known[0].chat ? [0, 1] : [0], []);
}

// Let the model write message `number` on these sides, one of them perhaps from `begun` tokens on.
async function complete(number, sides, begun) {
  const message = current.messages[number];
  const where = current;
  running = new AbortController();
  const stopping = running.signal;
  for (const side of sides) message.sides[side] = { text: begunText(begun), tokens: [...begun] };
  save(where);
  show();
  busy(true);
  await Promise.all(sides.map(async (side) => {
    const part = message.sides[side];
    const model = chosenModel(side);
    try {
      const start = { tokens: 0, time: 0 };
      for await (const news of answer(model, history(number, side), settings.sides[side], begun.map((t) => t.id), stopping)) {
        if (news.usage) {
          const seconds = (performance.now() - start.time) / 1000;
          const speed = start.tokens > 1 ? ((start.tokens - 1) / seconds).toFixed(1) : "–";
          at("state").textContent = word("status")(news.usage.completion_tokens, speed, news.usage.total_tokens, model.max_model_len);
          continue;
        }
        if (news.text || news.tokens.length) {
          start.time ||= performance.now();
          start.tokens += news.tokens.length || 1;
        }
        part.text += news.text;
        part.tokens.push(...news.tokens.map(kept));
        if (current === where) later(side, () => redraw(number, side));
      }
    } catch (error) {
      if (error.name !== "AbortError") part.fault = error.message || word("broken");
      if (error instanceof Refused && error.status === 401) openSettings(true, "key");
    }
  }));
  running = null;
  busy(false);
  if (current === where || conversations.some((c) => c.id === where.id)) save(where);
  if (current !== where) return listed();
  show();
  // The log is drawn anew, all of it: a screen reader is told the answer alone, when it is whole.
  at("heard").textContent = sides.map((side) => message.sides[side].text).join("\n\n");
}

function stop() {
  running?.abort();
}

// What follows a message that is written anew is not lost: it stays in the conversation that was, and a copy of its
// beginning goes on.
function cut(length, replaced) {
  const messages = current.messages.slice(0, length);
  if (current.messages.length > length + replaced) current = { ...fresh(), messages: structuredClone(messages) };
  else current.messages = messages;
}

// From another token on: what came before stays, what came after is written anew.
function branch(number, side, position, option) {
  stop();
  cut(number + 1, 0);
  const message = current.messages[number];
  const tokens = message.sides[side].tokens.slice(0, position);
  if (isEnd(option)) {
    message.sides[side] = { text: textOf(tokens), tokens };
    save();
    show();
    return;
  }
  whenFree(() => complete(number, [side], [...tokens, { ...option, top: message.sides[side].tokens[position].top }]));
}

function whenFree(act) {
  if (running) setTimeout(() => whenFree(act), 30);
  else act();
}

const planned = new Map(); // by side, so that one answer does not hide the other's news
function later(side, draw) {
  if (!planned.size) {
    requestAnimationFrame(() => {
      const draws = [...planned.values()];
      planned.clear();
      for (const one of draws) one();
    });
  }
  planned.set(side, draw);
}

function drawn(part, number, side) {
  const box = element("div", { className: "text" });
  fill(box, part, number, side);
  return box;
}

function fill(box, part, number, side) {
  const glass = view.glass && part.tokens.length;
  box.replaceChildren(...(glass ? [tokensOf(part.tokens, (position, option) => branch(number, side, position, option))] : blocks(part.text, word("copy"))));
  if (part.fault) box.append(element("p", { className: "fault", role: "alert" }, part.fault));
}

function redraw(number, side) {
  const box = at("log").children[number]?.querySelector(".answers")?.children[side];
  const part = current.messages[number]?.sides?.[side];
  if (!box || !part) return show();
  const log = at("log");
  const low = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  fill(box, part, number, side);
  if (low) log.scrollTop = log.scrollHeight;
}

function messageOf(message, number) {
  const acts = [];
  const act = (name, does) => acts.push(element("button", { type: "button", className: "plain", onclick: does }, word(name)));
  if (message.role === "user") {
    act("edit", () => edit(number));
    const who = element("div", { className: "who" }, element("span", {}, word("you")), ...acts);
    const changed = editing?.id === current.id && editing.number === number;
    const text = element("div", { className: "text" }, ...(changed ? editor() : [message.content]));
    return element("article", { className: "message user" }, who, text);
  }
  act("again", () => {
    stop();
    cut(number + 1, 0);
    whenFree(() => complete(number, Object.keys(message.sides).map(Number), []));
  });
  act("copy", () => navigator.clipboard?.writeText(message.sides.map((s) => s.text).join("\n\n")));
  const parts = message.sides.map((part, side) => drawn(part, number, side));
  const who = element("div", { className: "who" }, element("span", {}, word("answer")), ...acts);
  return element("article", { className: "message" }, who, element("div", { className: "answers" }, ...parts));
}

function edit(number) {
  editing = { id: current.id, number, text: current.messages[number].content };
  show();
  at("log").children[number].querySelector("textarea").focus();
}

function editor() {
  const { number, text } = editing;
  const area = element("textarea", { value: text, rows: 4 });
  area.setAttribute("aria-label", word("edit"));
  area.style.width = "100%";
  area.oninput = () => (editing.text = area.value);
  const send = element("button", { type: "button" }, word("save"));
  const leave = element("button", { type: "button", className: "plain" }, word("cancel"));
  leave.onclick = () => {
    editing = null;
    show();
  };
  send.onclick = () => {
    stop();
    editing = null;
    cut(number, 2);
    whenFree(() => say(area.value));
  };
  return [area, send, leave];
}

function show() {
  hide(true);
  at("log").replaceChildren(...current.messages.map(messageOf));
  if (!current.messages.length) at("log").append(element("p", { className: "small" }, word(known[0] && !known[0].chat ? "nochat" : "empty")));
  at("log").scrollTop = at("log").scrollHeight;
  at("legend").hidden = !view.glass;
  at("legend").replaceChildren(...legend());
  listed();
}

function listed() {
  at("list").replaceChildren(...conversations.map((c) => {
    const open = element("button", { type: "button", className: "plain" }, c.messages[0]?.content.slice(0, 60) || word("untitled"));
    if (c.id === current.id) open.setAttribute("aria-current", "true");
    open.onclick = () => {
      stop();
      current = c;
      openSide(false);
      show();
    };
    const remove = element("button", { type: "button", className: "plain" }, "×");
    remove.setAttribute("aria-label", `${word("remove")}: ${open.textContent}`);
    remove.onclick = () => {
      conversations = conversations.filter((one) => one.id !== c.id);
      if (current.id === c.id) {
        stop();
        current = fresh();
      }
      write("conversations", conversations);
      show();
    };
    return element("li", {}, open, remove);
  }));
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  at("log").setAttribute("aria-busy", String(yes));
}

function knobs(side) {
  const values = settings.sides[side];
  const rows = [element("legend", {}, word(side ? "second" : "first"))];
  if (side) {
    const pick = element("select", {}, ...known.map((m) => element("option", { value: m.id }, m.id)));
    pick.value = values.model ?? known[0]?.id ?? "";
    pick.onchange = () => keep(values, "model", pick.value);
    rows.push(element("label", {}, element("span", {}, word("model")), pick));
  }
  for (const [name, [min, max, step]] of Object.entries(RANGES)) {
    const input = element("input", { type: "number", min, max, step, value: values[name] });
    const fine = () => { // between two steps is fine but for whole numbers
      const { badInput, rangeUnderflow, rangeOverflow, valueMissing, stepMismatch } = input.validity;
      return input.value !== "" && !(badInput || rangeUnderflow || rangeOverflow || valueMissing || (step === 1 && stepMismatch));
    };
    input.onchange = () => keep(values, name, fine() ? input.value : (input.value = DEFAULTS[name]));
    rows.push(element("label", {}, element("span", {}, word(name)), input));
  }
  return rows;
}

function keep(values, name, value) {
  values[name] = value;
  write("settings", settings);
}

function openSide(open) {
  at("side").classList.toggle("open", open);
  at("menu").setAttribute("aria-expanded", String(open));
}

function openSettings(open, focus) {
  at("settings").hidden = !open;
  at("options").setAttribute("aria-expanded", String(open));
  if (focus) at(focus).focus();
}

function dress() {
  translate();
  document.documentElement.dataset.theme = view.theme ?? "";
  for (const name of ["glass", "compare"]) at(name).setAttribute("aria-pressed", String(view[name]));
  at("first").replaceChildren(...knobs(0));
  at("second").replaceChildren(...knobs(1));
  at("second").hidden = !view.compare;
  show();
}

async function meet() {
  try {
    known = await models();
    at("model").replaceChildren(...known.map((m) => element("option", { value: m.id }, m.id)));
    at("state").textContent = "";
  } catch (error) {
    at("state").textContent = error.status === 401 ? word("nokey") : String(error.message);
    openSettings(true, "key");
  }
  dress();
}

function wire() {
  at("form").onsubmit = (event) => {
    event.preventDefault();
    const text = at("say").value;
    if (!text.trim() || running || !known.length) return;
    at("say").value = "";
    say(text);
  };
  at("say").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      at("form").requestSubmit();
    }
  };
  at("stop").onclick = stop;
  at("fresh").onclick = () => {
    stop();
    current = fresh();
    openSide(false);
    show();
    at("say").focus();
  };
  for (const name of ["glass", "compare"]) {
    at(name).onclick = () => {
      view[name] = !view[name];
      write("view", view);
      if (name === "compare" && view.compare) openSettings(true);
      dress();
    };
  }
  at("options").onclick = () => openSettings(at("settings").hidden);
  at("theme").onclick = () => {
    const dark = view.theme ? view.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    view.theme = dark ? "light" : "dark";
    write("view", view);
    dress();
  };
  at("language").onclick = () => {
    other();
    dress();
  };
  at("menu").onclick = () => openSide(!at("side").classList.contains("open"));
  at("system").value = settings.system;
  at("system").onchange = () => keep(settings, "system", at("system").value);
  at("key").value = sessionStorage.getItem("camelid.key") ?? "";
  at("key").onchange = () => {
    sessionStorage.setItem("camelid.key", at("key").value);
    meet();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") at("choices").hidden ? stop() : hide(true);
  });
  addEventListener("storage", (event) => {
    if (event.key !== "camelid.conversations") return; // written by another tab
    conversations = read("conversations", []).map((c) => (running && c.id === current.id ? current : c));
    current = conversations.find((c) => c.id === current.id) ?? current;
    if (running) listed();
    else show();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#choices, .token")) hide(true);
  });
  document.addEventListener("pointermove", (event) => {
    if (!event.target.closest("#choices, .token")) hide(false);
  });
}

wire();
meet();
