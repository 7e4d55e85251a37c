// What the client scripts for Node share; as common.py.
//
//     node NAME.mjs BASE_URL MODEL [--key KEY] [--tools-model NAME] [--origin-port PORT] [--all]

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    key: { type: "string" },
    "tools-model": { type: "string" },
    "origin-port": { type: "string" },
    all: { type: "boolean" },
  },
});
export const [url, model] = positionals;
export const key = values.key ?? "none";
export const toolsModel = values["tools-model"];
export const originPort = values["origin-port"] && Number(values["origin-port"]);

export const question = "Where is Paris?";
export const cityQuestion = "Name a city in France and its number of people, as JSON.";

export function truth(what, holds, got, expected) {
  assert.ok(holds, `${what}: got ${JSON.stringify(got)}, expected ${expected}`);
}

export function same(what, got, expected) {
  assert.deepEqual(got, expected, `${what}: got ${JSON.stringify(got)}, expected ${JSON.stringify(expected)}`);
}

export async function raises(what, call, word) {
  let got;
  try {
    got = await call();
  } catch (error) {
    const text = `${error.message} ${error.responseBody ?? ""}`;
    truth(what, text.toLowerCase().includes(word), text, `an error that says ${word}`);
    return;
  }
  assert.fail(`${what}: got ${JSON.stringify(got)?.slice(0, 300)}, expected an error`);
}

export function isCity(what, got) {
  const holds = typeof got?.name === "string" && got.name !== "" && Number.isInteger(got.people);
  truth(what, holds, got, "a city with a name and a number of people");
}

/** Runs the checks in turn; a check that returns a text was skipped. */
export async function main(packages, checks) {
  for (const name of packages) {
    const file = new URL(`node_modules/${name}/package.json`, import.meta.url);
    console.log(`client ${name} ${JSON.parse(readFileSync(file)).version}`);
  }
  let passed = 0;
  let failed = 0;
  for (const [name, run] of Object.entries(checks)) {
    try {
      const skipped = await run();
      passed += skipped ? 0 : 1;
      console.log(skipped ? `skip ${name}: ${skipped}` : `ok   ${name}`);
    } catch (error) {
      failed += 1;
      const text = `${error.code === "ERR_ASSERTION" ? "" : `${error.name}: `}${error.message} ${error.responseBody ?? ""}`;
      console.log(`FAIL ${name}: ${text.replace(/\s+/g, " ").slice(0, 700)}`);
      if (!values.all) break;
    }
  }
  console.log(`${passed} passed, ${failed} failed`);
  process.exit(failed || !passed ? 1 : 0);
}
