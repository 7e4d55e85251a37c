// LangChain for JavaScript: ChatOpenAI whole, streamed, in a batch, structured, with log-probabilities, and OpenAI.

import { ChatOpenAI, OpenAI } from "@langchain/openai";
import { z } from "zod";
import { cityQuestion, isCity, key, main, model, question, same, truth, url } from "./common.mjs";

const settings = { model, apiKey: key, temperature: 0, maxTokens: 24, maxRetries: 0, configuration: { baseURL: url } };
const city = z.object({ name: z.string().max(20), people: z.number().int().min(0).max(9999999) });

await main(["@langchain/openai", "openai"], {
  "invoke, stream and batch": async () => {
    const llm = new ChatOpenAI(settings);
    const whole = await llm.invoke(question);
    truth("content", whole.content !== "", whole.content, "some text");
    let text = "";
    for await (const chunk of await llm.stream(question)) text += chunk.content;
    same("stream", text, whole.content);
    same("batch", (await llm.batch([question, question])).map((answer) => answer.content), [whole.content, whole.content]);
  },
  structured: async () => {
    const llm = new ChatOpenAI({ ...settings, maxTokens: 100 }).withStructuredOutput(city, { method: "jsonSchema", includeRaw: true });
    const { parsed, raw } = await llm.invoke(cityQuestion);
    isCity("parsed", parsed);
    same("finish_reason", raw.response_metadata.finish_reason, "stop");
  },
  logprobs: async () => {
    const answer = await new ChatOpenAI({ ...settings, maxTokens: 6, logprobs: true, topLogprobs: 2 }).invoke(question);
    same("entries", answer.response_metadata.logprobs?.content.length, 6);
  },
  completions: async () => {
    const llm = new OpenAI({ ...settings, maxTokens: 8 });
    const text = await llm.invoke("The capital of France is");
    truth("text", text !== "", text, "some text");
    let streamed = "";
    for await (const part of await llm.stream("The capital of France is")) streamed += part;
    same("stream", streamed, text);
  },
  responses: async () => {
    const answer = await new ChatOpenAI({ ...settings, useResponsesApi: true }).invoke(question);
    same("text", answer.text, (await new ChatOpenAI(settings).invoke(question)).text);
  },
});
