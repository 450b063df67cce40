// Markdown as elements. Text becomes text nodes only, so nothing that a model writes is ever parsed as HTML.

export function element(name, fields = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(fields)) {
    if (key in made && key !== "role") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const INLINE = /(`+)([^`]+?)\1|\*\*([^*]+?)\*\*|\*([^*\s][^*]*?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;

function inline(text) {
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    parts.push(text.slice(at, found.index));
    at = found.index + found[0].length;
    if (found[2] !== undefined) parts.push(element("code", {}, found[2]));
    else if (found[3] !== undefined) parts.push(element("strong", {}, ...inline(found[3])));
    else if (found[4] !== undefined) parts.push(element("em", {}, ...inline(found[4])));
    else parts.push(element("a", { href: found[6], rel: "noopener noreferrer", target: "_blank" }, found[5]));
  }
  parts.push(text.slice(at));
  return parts.filter((part) => part !== "");
}

function codeBlock(lines, language, copyWord) {
  const text = lines.join("\n");
  const copy = element("button", { type: "button", className: "plain copy" }, copyWord);
  copy.onclick = () => navigator.clipboard?.writeText(text);
  const code = element("pre", { tabIndex: 0 }, element("code", {}, text));
  return element("div", { className: "code" }, element("div", { className: "code-head" }, language, copy), code);
}

const ITEM = /^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;

function list(lines) {
  const ordered = ITEM.exec(lines[0])[2] !== undefined;
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found) items.push([found[3]]);
    else items[items.length - 1].push(line.trim());
  }
  const made = element(ordered ? "ol" : "ul", {}, ...items.map((item) => element("li", {}, ...inline(item.join(" ")))));
  if (ordered) made.start = Number(ITEM.exec(lines[0])[2]);
  return made;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, kind) => element("tr", {}, ...cells(line).map((cell) => element(kind, {}, ...inline(cell))));
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return element("table", {}, element("thead", {}, row(lines[0], "th")), body);
}

// Blocks of a text, as elements. An open code fence at the end is a block already: the text may still be on its way.
export function blocks(text, copyWord, depth = 0) {
  const lines = text.split("\n");
  const made = [];
  const while_ = (start, test) => {
    let end = start;
    while (end < lines.length && test(lines[end])) end++;
    return end;
  };
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const fence = /^\s*(```+|~~~+)\s*(\S*)/.exec(line);
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (fence) {
      const end = while_(i + 1, (l) => !l.trim().startsWith(fence[1]));
      made.push(codeBlock(lines.slice(i + 1, end), fence[2], copyWord));
      i = end + 1;
    } else if (heading) {
      made.push(element(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])));
      i++;
    } else if (/^\s*([-*_]\s*){3,}$/.test(line)) {
      made.push(element("hr"));
      i++;
    } else if (ITEM.test(line)) {
      const end = while_(i, (l) => ITEM.test(l) || (/^\s{2,}\S/.test(l) && !/^\s*(```|~~~)/.test(l)));
      made.push(list(lines.slice(i, end)));
      i = end;
    } else if (/^\s*>/.test(line) && depth < 8) {
      const end = while_(i, (l) => /^\s*>/.test(l));
      made.push(element("blockquote", {}, ...blocks(lines.slice(i, end).map((l) => l.replace(/^\s*> ?/, "")).join("\n"), copyWord, depth + 1)));
      i = end;
    } else if (line.includes("|") && /^(?=.*\|)(?=.*-)[\s:|-]+$/.test(lines[i + 1] ?? "")) {
      const end = while_(i, (l) => l.includes("|"));
      made.push(table(lines.slice(i, end)));
      i = end;
    } else if (line.trim() === "") {
      i++;
    } else {
      const end = while_(i + 1, (l) => l.trim() !== "" && !(depth < 8 ? /^\s*(```|~~~|#{1,6}\s|>)/ : /^\s*(```|~~~|#{1,6}\s)/).test(l) && !ITEM.test(l));
      const words = lines.slice(i, end).flatMap((l, n) => (n ? [element("br"), ...inline(l)] : inline(l)));
      made.push(element("p", {}, ...words));
      i = end;
    }
  }
  return made;
}
