// The page's words, in English and Chinese.

const WORDS = {
  en: {
    skip: "Skip to the message", model: "Model", view: "View", glass: "Glass box", compare: "Side by side",
    settings: "Settings", theme: "Light or dark", conversations: "Conversations", conversation: "Conversation",
    fresh: "New conversation", kept: "Conversations stay in this browser.", system: "System prompt",
    key: "API key (for this tab)", say: "Message", send: "Send", stop: "Stop", you: "You", answer: "Model",
    edit: "Edit", again: "Again", copy: "Copy", remove: "Delete", first: "Answer", second: "Second answer",
    temperature: "Temperature", top_p: "Top-p", min_p: "Min-p", max_tokens: "Most tokens", seed: "Seed",
    alternatives: "What else could have come here", chosen: "chosen", ends: "ends the answer",
    go: "Choose one to go on from there.", close: "Close",
    legend: "How sure the model was of each token. Choose a token to see what else could have come.",
    broken: "The answer broke off.", nokey: "This server wants an API key: Settings.",
    nochat: "This model completes text: what you write goes on.", empty: "Write something below.",
    status: (tokens, speed, used, of) => `${tokens} tokens, ${speed} a second; ${used} of ${of} tokens of context`,
    untitled: "Untitled", save: "Send again", cancel: "Cancel", language: "中文",
  },
  zh: {
    skip: "跳到输入框", model: "模型", view: "显示", glass: "透明盒", compare: "并排比较",
    settings: "设置", theme: "明暗", conversations: "对话列表", conversation: "对话",
    fresh: "新对话", kept: "对话只保存在此浏览器中。", system: "系统提示词",
    key: "API 密钥(仅限此标签页)", say: "消息", send: "发送", stop: "停止", you: "你", answer: "模型",
    edit: "修改", again: "重新生成", copy: "复制", remove: "删除", first: "回答", second: "第二个回答",
    temperature: "温度", top_p: "Top-p", min_p: "Min-p", max_tokens: "最多词元数", seed: "随机种子",
    alternatives: "这里还可能出现什么", chosen: "已选", ends: "结束回答",
    go: "选择一个,从那里继续。", close: "关闭",
    legend: "颜色表示模型对每个词元的把握。点选一个词元,看看还可能出现什么。",
    broken: "回答中断了。", nokey: "此服务器需要 API 密钥:请在设置中填写。",
    nochat: "此模型只做续写:它会接着你写的文字。", empty: "请在下方输入。",
    status: (tokens, speed, used, of) => `${tokens} 个词元,每秒 ${speed} 个;上下文已用 ${used} / ${of}`,
    untitled: "未命名", save: "重新发送", cancel: "取消", language: "English",
  },
};

let chosen = localStorage.getItem("camelid.language") || (navigator.language.startsWith("zh") ? "zh" : "en");

export const word = (name) => WORDS[chosen][name];

export function other() {
  chosen = chosen === "zh" ? "en" : "zh";
  localStorage.setItem("camelid.language", chosen);
}

// Fill in every element that asks for a word.
export function translate(root = document) {
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  for (const e of root.querySelectorAll("[data-word]")) e.textContent = word(e.dataset.word);
  for (const e of root.querySelectorAll("[data-label]")) {
    e.setAttribute("aria-label", word(e.dataset.label));
    if (e.matches("button")) e.title = word(e.dataset.label);
  }
  for (const e of root.querySelectorAll("[data-placeholder]")) e.placeholder = word(e.dataset.placeholder);
  const language = document.getElementById("language");
  language.textContent = word("language");
  language.lang = chosen === "zh" ? "en" : "zh";
}
