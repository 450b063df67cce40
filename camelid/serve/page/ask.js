// Talking to the server: models, and one answer as it comes.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const key = sessionStorage.getItem("camelid.key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  return new Refused(response.status, body.error?.message ?? `HTTP ${response.status}`);
}

export async function models() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

function sampling(settings) {
  const wanted = {};
  for (const name of ["temperature", "top_p", "min_p", "max_tokens", "seed"]) {
    if (settings[name] !== "" && settings[name] !== undefined) wanted[name] = Number(settings[name]);
  }
  return wanted;
}

// The body of a request: a conversation for models that chat, the text so far for those that go on.
function body(model, messages, settings, begun) {
  const shared = { model: model.id, stream: true, stream_options: { include_usage: true }, ...sampling(settings) };
  if (!model.chat) return { ...shared, max_tokens: shared.max_tokens ?? 256, prompt: messages.map((m) => m.content).join("") };
  const begin = begun.length ? { begin_with_ids: begun } : {};
  return { ...shared, messages, logprobs: true, top_logprobs: 5, ...begin };
}

// Yields { text, tokens } as they come and { usage } at the end. `begun` are ids that the answer begins with. Throws
// when the answer breaks off: a stream that ends without [DONE] is not an answer.
export async function* answer(model, messages, settings, begun, signal) {
  const path = model.chat ? "/v1/chat/completions" : "/v1/completions";
  const text = JSON.stringify(body(model, messages, settings, begun));
  const response = await fetch(path, { method: "POST", headers: headers(), body: text, signal });
  if (!response.ok) throw await refusal(response);
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const event = JSON.parse(data);
    if (event.error) throw new Refused(0, event.error.message);
    if (event.usage) yield { usage: event.usage };
    const choice = event.choices[0];
    if (!choice) continue;
    const tokens = model.chat ? (choice.logprobs?.content ?? []) : [];
    yield { text: (model.chat ? choice.delta.content : choice.text) ?? "", tokens };
  }
  if (!ended) throw new Refused(0, "");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      for (const line of part.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
    }
  }
}
