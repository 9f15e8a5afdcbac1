"use strict";
// The chat box: one conversation, streamed.

// The text pieces of a streamed completion.
async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (!event.startsWith("data: ") || data === "[DONE]") continue;
      const message = JSON.parse(data);
      if (message.error) throw new Error(message.error.message);
      yield message.choices?.[0]?.delta?.content || "";
    }
  }
}

function startChat(model) {
  const element = (id) => document.getElementById(id);
  const conversation = [];
  let running = null;

  function show(role, text) {
    const box = element("messages").appendChild(document.createElement("div"));
    box.className = `message ${role}`;
    box.textContent = text;
    box.scrollIntoView({block: "nearest"});
    return box;
  }

  async function answer() {
    const box = show("assistant", "");
    const reply = {role: "assistant", content: ""};
    running = new AbortController();
    element("send").textContent = "Stop";
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST",
        signal: running.signal,
        headers: {"Content-Type": "application/json"},
        body: JSON.stringify({
          model,
          messages: conversation,
          stream: true,
          max_tokens: Number(element("max-tokens").value),
          temperature: Number(element("temperature").value),
        }),
      });
      if (!response.ok) throw new Error((await response.json()).error?.message || response.statusText);
      for await (const piece of pieces(response.body)) {
        reply.content += piece;
        box.textContent = reply.content;
        element("messages").scrollTop = element("messages").scrollHeight;
      }
      conversation.push(reply);
    } catch (error) {
      if (error.name === "AbortError") conversation.push(reply);
      else show("assistant error", error.message);
    } finally {
      running = null;
      element("send").textContent = "Send";
    }
  }

  element("chat").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return running.abort();
    const text = element("question").value.trim();
    if (!text) return;
    element("question").value = "";
    conversation.push({role: "user", content: text});
    show("user", text);
    answer();
  });
  element("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) element("chat").requestSubmit();
  });
  element("clear").addEventListener("click", () => {
    conversation.length = 0;
    element("messages").replaceChildren();
  });
}
