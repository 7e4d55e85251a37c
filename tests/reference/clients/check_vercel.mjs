// Vercel's AI SDK with its OpenAI provider (/v1/responses by default, and chat) and its provider for compatible servers.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, isStepCount, Output, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { cityQuestion, isCity, key, main, model, question, raises, same, toolsModel, truth, url } from "./common.mjs";

const openai = createOpenAI({ baseURL: url, apiKey: key });
const compatible = createOpenAICompatible({ name: "ours", baseURL: url, apiKey: key, supportsStructuredOutputs: true, includeUsage: true });
const city = z.object({ name: z.string().max(20), people: z.number().int().min(0).max(9999999) });
const providers = { responses: (name) => openai(name), chat: (name) => openai.chat(name), compatible: (name) => compatible(name) };
const settings = { temperature: 0, maxRetries: 0 };

const checks = {};
for (const [name, made] of Object.entries(providers)) {
  const asked = { ...settings, model: made(model), maxOutputTokens: 100 };
  checks[`${name} generateText`] = async () => {
    const { text, finishReason, usage } = await generateText({ ...asked, system: "Answer briefly.", prompt: question });
    truth("text", text !== "", text, "some text");
    same("finishReason", finishReason, "stop");
    same("totalTokens", usage.totalTokens, usage.inputTokens + usage.outputTokens);
  };
  checks[`${name} streamText`] = async () => {
    const whole = await generateText({ ...asked, prompt: question });
    const stream = streamText({ ...asked, prompt: question, onError: () => {} });
    let text = "";
    for await (const part of stream.textStream) text += part;
    same("text", text, whole.text);
    same("finishReason", await stream.finishReason, whole.finishReason);
    same("usage", (await stream.usage).totalTokens, whole.usage.totalTokens);
  };
  checks[`${name} length`] = async () => {
    same("finishReason", (await generateText({ ...asked, prompt: question, maxOutputTokens: 16 })).finishReason, "length");
  };
  checks[`${name} generateObject`] = async () => {
    const { object, finishReason } = await generateObject({ ...asked, schema: city, prompt: cityQuestion });
    isCity("object", object);
    same("finishReason", finishReason, "stop");
  };
  checks[`${name} streamObject`] = async () => {
    const stream = streamObject({ ...asked, schema: city, prompt: cityQuestion, onError: () => {} });
    for await (const _ of stream.partialObjectStream);
    isCity("object", await stream.object);
    same("finishReason", await stream.finishReason, "stop");
  };
  checks[`${name} Output.object`] = async () => {
    const { output, finishReason } = await generateText({ ...asked, prompt: cityQuestion, output: Output.object({ schema: city }) });
    isCity("output", output);
    same("finishReason", finishReason, "stop");
  };
  checks[`${name} tools`] = async () => {
    const calls = [];
    const tools = {
      people: tool({
        description: "The number of people of a city",
        inputSchema: z.object({ name: z.string().max(20) }),
        execute: async ({ name }) => {
          calls.push(name);
          return { people: 2100000 };
        },
      }),
    };
    await raises("tools", () => generateText({ ...asked, tools, prompt: cityQuestion }), "tools");
    if (!toolsModel) return;
    const result = await generateText({
      ...asked,
      model: made(toolsModel),
      tools,
      prompt: cityQuestion,
      // The first step must call, the second answers from the result.
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
      stopWhen: isStepCount(2),
    });
    same("number of calls", calls.length, 1);
    truth("text", result.text !== "", result.text, "some text");
  };
}

await main(["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible"], checks);
