// The glass box: an answer as its tokens, each with how sure the model was and what else could have come.

import { element } from "/page/marks.js";
import { word } from "/page/words.js";

const decoder = new TextDecoder();
const CONTROL = /^(<\|.*\|>|<\/?s>|<eos>)$/;

// What is kept of a token, small enough for the browser's storage.
export const kept = (one) => ({
  id: one.token_id, bytes: one.bytes, p: Math.exp(one.logprob),
  top: one.top_logprobs.map((t) => ({ id: t.token_id, bytes: t.bytes, p: Math.exp(t.logprob) })),
});

// Without the character that the tokens only begin.
export const begunText = (tokens) => new TextDecoder().decode(new Uint8Array(tokens.flatMap((t) => t.bytes)), { stream: true });
export const textOf = (tokens) => decoder.decode(new Uint8Array(tokens.flatMap((t) => t.bytes)));

const surety = (p) => (p >= 0.9 ? 4 : p >= 0.6 ? 3 : p >= 0.3 ? 2 : p >= 0.1 ? 1 : 0);
const percent = (p) => (p >= 0.0995 ? `${Math.round(p * 100)} %` : `${(p * 100).toPrecision(2)} %`);
// Blanks and line ends, made visible; bytes that are half a character, as bytes.
function visible(bytes) {
  const text = decoder.decode(new Uint8Array(bytes));
  if (text.includes("\ufffd")) return bytes.map((b) => `<${b.toString(16).padStart(2, "0")}>`).join("");
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

// Tokens that share a character are one button: `take` is told the first one's number.
export function tokensOf(tokens, take) {
  const line = element("div", { className: "tokens", role: "group" });
  for (let i = 0; i < tokens.length; ) {
    let end = i + 1;
    while (end < tokens.length && end - i < 6 && textOf(tokens.slice(i, end)).includes("\ufffd")) end++;
    const least = tokens.slice(i, end).reduce((a, b) => (a.p < b.p ? a : b));
    const number = tokens.slice(i, end).indexOf(least) + i;
    const text = textOf(tokens.slice(i, end));
    // A span: a real button is a box that no line end inside it can break.
    const button = element("span", { role: "button", className: `token sure-${surety(least.p)}`, tabIndex: i ? -1 : 0 }, text);
    button.setAttribute("aria-label", `${visible(tokens.slice(i, end).flatMap((t) => t.bytes))}, ${percent(least.p)}`);
    button.onclick = () => choices(button, tokens[number], (id) => take(number, id), true);
    button.onpointerenter = (event) => event.pointerType === "mouse" && choices(button, tokens[number], (id) => take(number, id), false);
    line.append(button);
    i = end;
  }
  line.onkeydown = (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      event.target.click();
    }
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step === 1 ? event.target.nextSibling : step === -1 ? event.target.previousSibling : null;
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  };
  return line;
}

let pinned = false;
let opener = null;

// Show what else could have come at a token. It stays when it was asked for by a click or a key.
function choices(button, token, take, pin) {
  if (pinned && !pin) return;
  pinned = pin;
  opener = button;
  const panel = document.getElementById("choices");
  const options = token.top.some((t) => t.id === token.id) ? token.top : [...token.top, token];
  const rows = options.map((option) => {
    const bar = element("span", { className: "bar" });
    bar.style.width = `${option.p * 100}%`;
    const text = visible(option.bytes);
    const note = option.id === token.id ? ` (${word("chosen")})` : CONTROL.test(textOf([option])) ? ` (${word("ends")})` : "";
    const row = element("button", { type: "button" }, element("span", { className: "piece" }, text + note), percent(option.p), bar);
    row.disabled = option.id === token.id;
    row.onclick = () => {
      hide(true);
      take(option);
    };
    return element("li", {}, row);
  });
  panel.replaceChildren(element("strong", {}, word("alternatives")), element("ul", {}, ...rows), element("p", { className: "small" }, word("go")));
  panel.hidden = false;
  const at = button.getBoundingClientRect();
  const wide = panel.offsetWidth;
  panel.style.left = `${Math.max(8, Math.min(at.left, innerWidth - wide - 8))}px`;
  const below = at.bottom + panel.offsetHeight + 8 < innerHeight;
  panel.style.top = `${below ? at.bottom + 4 : Math.max(8, at.top - panel.offsetHeight - 4)}px`;
  if (pin) panel.querySelector("button:not([disabled])")?.focus();
}

export function hide(force) {
  if (pinned && !force) return;
  const panel = document.getElementById("choices");
  const inside = panel.contains(document.activeElement);
  panel.hidden = true;
  if (inside) opener?.focus();
  pinned = false;
}

export const isEnd = (option) => CONTROL.test(textOf([option]));

export function legend() {
  const steps = [[4, "≥ 90 %"], [3, "≥ 60 %"], [2, "≥ 30 %"], [1, "≥ 10 %"], [0, "< 10 %"]];
  return [...steps.map(([n, text]) => element("span", { className: `token sure-${n}` }, text)), " ", word("legend")];
}
