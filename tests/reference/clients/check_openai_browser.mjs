// openai-js in Chromium: a page on another origin asks the server, whole and streamed. The server must be started with
// `server.allowed_origins = ["http://localhost:PORT"]` for the PORT of --origin-port; a page on the port after it may not ask.

import { mkdtempSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { build } from "esbuild";
import { chromium } from "playwright-core";
import { cityQuestion, isCity, key, main, model, originPort, question, same, truth, url } from "./common.mjs";

if (!originPort) throw new Error("--origin-port is needed");
const page = `
  import OpenAI from "openai";
  import { zodResponseFormat } from "openai/helpers/zod";
  import { z } from "zod";

  const { url, key, model, question, cityQuestion } = window.settings;
  const client = new OpenAI({ baseURL: url, apiKey: key, dangerouslyAllowBrowser: true, maxRetries: 0 });
  const asked = { model, temperature: 0, max_tokens: 24, messages: [{ role: "user", content: question }] };
  const city = z.object({ name: z.string().max(20), people: z.number().int().min(0).max(9999999) });
  window.ask = {
    models: async () => (await client.models.list()).data.map((model) => model.id),
    whole: async () => (await client.chat.completions.create(asked)).choices[0].message.content,
    streamed: async () => {
      let text = "";
      let parts = 0;
      for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
        text += chunk.choices[0]?.delta?.content ?? "";
        parts += 1;
      }
      return { text, parts };
    },
    parsed: async () => {
      const messages = [{ role: "user", content: cityQuestion }];
      const form = zodResponseFormat(city, "city");
      const { choices } = await client.chat.completions.parse({ ...asked, messages, max_tokens: 100, response_format: form });
      return { city: choices[0].message.parsed, reason: choices[0].finish_reason };
    },
    responses: async () => {
      const input = { model, input: question, temperature: 0, max_output_tokens: 24 };
      const whole = (await client.responses.create(input)).output_text;
      let streamed = "";
      for await (const event of await client.responses.create({ ...input, stream: true })) {
        if (event.type === "response.output_text.delta") streamed += event.delta;
      }
      return { whole, streamed };
    },
    unknown: async () => {
      try {
        await client.chat.completions.create({ ...asked, model: "nobody" });
      } catch (error) {
        return { name: error.constructor.name, status: error.status, requestID: error.requestID };
      }
    },
  };
  window.ready = true;
`;
const bundle = await build({
  stdin: { contents: page, resolveDir: import.meta.dirname },
  bundle: true,
  format: "esm",
  write: false,
  logLevel: "error",
});
const settings = JSON.stringify({ url, key, model, question, cityQuestion });
const html = `<!doctype html><title>page</title><script>window.settings = ${settings}</script><script type="module" src="/page.js"></script>`;

/** A page of the given port's origin, in a browser of its own. */
async function open(port) {
  const server = createServer((request, response) => {
    const script = request.url === "/page.js";
    response.setHeader("content-type", script ? "text/javascript" : "text/html");
    response.end(script ? bundle.outputFiles[0].text : html);
  });
  await new Promise((resolve) => server.listen(port, "localhost", resolve));
  const browser = await chromium.launchPersistentContext(mkdtempSync(join(tmpdir(), "clients-browser-")), {
    executablePath: "/usr/bin/chromium",
    headless: true,
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  });
  const tab = await browser.newPage();
  const log = [];
  tab.on("console", (message) => log.push(message.text()));
  await tab.goto(`http://localhost:${port}/`);
  await tab.waitForFunction(() => window.ready);
  const ask = async (name) => {
    log.length = 0;
    try {
      return await tab.evaluate((name) => window.ask[name](), name);
    } catch (error) {
      throw new Error(`${error.message.split("\n")[0]} ${log.join(" ")}`);
    }
  };
  const close = async () => {
    await browser.close();
    server.close();
  };
  return { ask, close };
}

const { ask, close } = await open(originPort);
await main(["openai", "playwright-core"], {
  models: async () => {
    const names = await ask("models");
    truth("models", names.includes(model), names, model);
  },
  "whole and streamed": async () => {
    const whole = await ask("whole");
    truth("text", whole !== "", whole, "some text");
    const { text, parts } = await ask("streamed");
    same("streamed", text, whole);
    truth("chunks", parts > 3, parts, "several");
  },
  parsed: async () => {
    const { city, reason } = await ask("parsed");
    isCity("parsed", city);
    same("finish_reason", reason, "stop");
  },
  responses: async () => {
    const { whole, streamed } = await ask("responses");
    truth("text", whole !== "", whole, "some text");
    same("streamed", streamed, whole);
  },
  errors: async () => {
    const { name, status, requestID } = await ask("unknown");
    same("an unknown model", { name, status }, { name: "NotFoundError", status: 404 });
    truth("x-request-id", Boolean(requestID), requestID, "an id that the page may read");
  },
  "an origin that is not allowed": async () => {
    await close();
    const other = await open(originPort + 1);
    let got;
    try {
      got = await other.ask("whole");
    } catch (error) {
      truth("the error", /connection error|failed to fetch/i.test(error.message), error.message, "one of the browser's");
      return;
    } finally {
      await other.close();
    }
    truth("an origin that is not allowed", false, got, "no answer");
  },
});
