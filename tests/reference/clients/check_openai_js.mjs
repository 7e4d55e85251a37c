// openai-js in Node: chat, streams and their helpers, structured output, log-probabilities, completions, responses, errors.

import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { cityQuestion, isCity, key, main, model, question, same, toolsModel, truth, url } from "./common.mjs";

const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const asked = { model, temperature: 0, max_tokens: 24, messages: [{ role: "user", content: question }] };
const forCity = { ...asked, max_tokens: 100, messages: [{ role: "user", content: cityQuestion }] };
const city = z.object({ name: z.string().max(20), people: z.number().int().min(0).max(9999999) });

await main(["openai"], {
  "chat, whole and streamed": async () => {
    const whole = await client.chat.completions.create(asked);
    truth("content", whole.choices[0].message.content !== "", whole, "some text");
    const final = await client.chat.completions.stream(asked).finalChatCompletion();
    same("streamed", final.choices[0].message.content, whole.choices[0].message.content);
    same("finish_reason", final.choices[0].finish_reason, whole.choices[0].finish_reason);
  },
  "chat.completions.parse": async () => {
    const { choices } = await client.chat.completions.parse({ ...forCity, response_format: zodResponseFormat(city, "city") });
    isCity("parsed", choices[0].message.parsed);
    same("finish_reason", choices[0].finish_reason, "stop");
  },
  logprobs: async () => {
    const { choices } = await client.chat.completions.create({ ...asked, max_tokens: 6, logprobs: true, top_logprobs: 2 });
    same("entries", choices[0].logprobs?.content.length, 6);
  },
  completions: async () => {
    const prompt = { model, prompt: "The capital of France is", temperature: 0, max_tokens: 8 };
    const text = (await client.completions.create(prompt)).choices[0].text;
    truth("text", text !== "", text, "some text");
    let streamed = "";
    for await (const part of await client.completions.create({ ...prompt, stream: true })) streamed += part.choices[0]?.text ?? "";
    same("streamed", streamed, text);
  },
  runTools: async () => {
    if (!toolsModel) return "no --tools-model";
    const names = [];
    const people = {
      type: "function",
      function: {
        name: "people",
        description: "The number of people of a city",
        parameters: { type: "object", properties: { name: { type: "string", maxLength: 20 } }, required: ["name"] },
        parse: JSON.parse,
        function: ({ name }) => {
          names.push(name);
          return "2100000";
        },
      },
    };
    const choice = { type: "function", function: { name: "people" } };
    const runner = client.chat.completions.runTools({ ...forCity, model: toolsModel, tools: [people], tool_choice: choice });
    await runner.done();
    same("calls", names.length, 1);
  },
  responses: async () => {
    const input = { model, input: question, temperature: 0, max_output_tokens: 24 };
    const whole = await client.responses.create(input);
    truth("output_text", whole.output_text !== "", whole, "some text");
    const final = await client.responses.stream(input).finalResponse();
    same("streamed", final.output_text, whole.output_text);
    const format = { format: zodTextFormat(city, "city") };
    const parsed = await client.responses.parse({ ...input, input: cityQuestion, max_output_tokens: 100, text: format });
    isCity("output_parsed", parsed.output_parsed);
    same("status", parsed.status, "completed");
  },
  errors: async () => {
    const error = await client.chat.completions.create({ ...asked, model: "nobody" }).catch((error) => error);
    same("an unknown model", error.constructor, OpenAI.NotFoundError);
  },
});
