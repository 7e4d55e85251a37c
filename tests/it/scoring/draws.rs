//! `NAME@draw-K`: posterior draws as models of their own.

use reqwest::blocking::Response;
use serde_json::{Value, json};

use super::{PLAIN, POSTERIOR, QUESTION, Site, chat, with};
use crate::cli::{ok, run, text, tiny};
use crate::runtime::serve;

/// A posterior draw is a model: its answers are those of the adapter that `sample` writes, whole and streamed, by every endpoint.
#[test]
fn draws_answer_as_the_adapters_that_sample_writes() {
    let site = Site::new();
    let server = site.serve_draws("", "enabled = true\ndtype = 'f32'\ndraws = 2", 3);
    let adapter = site.adapter(POSTERIOR);
    ok(&[
        "sample",
        text(&adapter),
        "-k",
        "3",
        "--seed",
        "42",
        "-o",
        &site.at("adapters/drawn"),
    ]);
    let list: Value = site
        .client
        .get(format!("{}/v1/models", server.url))
        .send()
        .unwrap()
        .json()
        .unwrap();
    let names: Vec<&str> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "base",
            POSTERIOR,
            "monteclora@draw-0",
            "monteclora@draw-1",
            "monteclora@draw-2",
            PLAIN
        ]
    );
    assert_eq!(list["data"][2]["parent"], POSTERIOR);
    let asked = ["--prompt", QUESTION, "--max-tokens", "6"];
    let mut sums = Vec::new();
    for draw in 0..3 {
        let name = format!("monteclora@draw-{draw}");
        let drawn = format!("drawn/draw-000{draw}");
        let expected = site.predict(&drawn, &[&asked[..], &["--no-chat-template"]].concat());
        let body = json!({"model": name, "prompt": QUESTION, "max_tokens": 6, "temperature": 0, "logprobs": 1});
        let whole: Value = site.post(&server, "/v1/completions", &body).json().unwrap();
        let choice = &whole["choices"][0];
        assert_eq!(
            (&choice["text"], &whole["model"]),
            (&expected["text"], &json!(name)),
            "{whole}"
        );
        let sum: f64 = choice["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap())
            .sum();
        let p = expected["p_correct"].as_f64().unwrap();
        assert!((sum - p.ln()).abs() < 1e-3, "{sum} {}", p.ln());
        let streamed = streamed(site.post(
            &server,
            "/v1/completions",
            &with(body.clone(), json!({"stream": true})),
        ));
        assert_eq!(
            streamed,
            (
                expected["text"].as_str().unwrap().to_owned(),
                "length".to_owned()
            )
        );

        let expected = site.predict(&drawn, &asked);
        let chat = with(chat(&name), json!({"max_tokens": 6, "temperature": 0}));
        let whole: Value = site
            .post(&server, "/v1/chat/completions", &chat)
            .json()
            .unwrap();
        let text = whole["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned();
        // A character that its limit has cut is left out of a chat's answer.
        let clear = |text: &str| text.trim_end_matches('\u{fffd}').trim_start().to_owned();
        assert_eq!(clear(&text), clear(expected["text"].as_str().unwrap()));
        assert_eq!(whole["usage"]["completion_tokens"], 6);
        let input =
            json!({"model": name, "input": QUESTION, "max_output_tokens": 6, "temperature": 0});
        let response: Value = site.post(&server, "/v1/responses", &input).json().unwrap();
        assert_eq!(
            response["output"][0]["content"][0]["text"],
            json!(text),
            "{response}"
        );
        assert_eq!(response["model"], json!(name));
        sums.push(sum);
    }
    sums.dedup();
    assert_eq!(sums.len(), 3, "the draws are one: {sums:?}");

    // A prompt is scored as the drawn adapter's engine scores it.
    let load = json!({"lora_name": "engine", "lora_path": "drawn/draw-0001", "model": "base"});
    assert_eq!(
        site.post(&server, "/v1/load_lora_adapter", &load).status(),
        200
    );
    let scores = |model: &str| -> Vec<f64> {
        let body = json!({"model": model, "prompt": QUESTION, "max_tokens": 0, "echo": true, "logprobs": 1});
        let answer: Value = site.post(&server, "/v1/completions", &body).json().unwrap();
        let scores = answer["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()
            .clone();
        scores
            .iter()
            .skip(1)
            .map(|score| score.as_f64().unwrap())
            .collect()
    };
    let (ours, theirs) = (scores("monteclora@draw-1"), scores("engine"));
    assert!(ours.len() > 2 && ours.len() == theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!((ours - theirs).abs() < 1e-3, "{ours} {theirs}");
    }

    // Seeds, several choices and stop texts do what they do elsewhere.
    let sampled = json!({"model": "monteclora@draw-2", "prompt": QUESTION, "max_tokens": 8, "temperature": 1.5, "seed": 3, "n": 2});
    let texts = |body: &Value| -> Vec<Value> {
        let answer: Value = site.post(&server, "/v1/completions", body).json().unwrap();
        answer["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|choice| choice["text"].clone())
            .collect()
    };
    let first = texts(&sampled);
    assert_eq!(first, texts(&sampled));
    assert_ne!(first[0], first[1]);
    let stop: String = first[0].as_str().unwrap().chars().skip(2).take(1).collect();
    let stopped = texts(&with(sampled, json!({"stop": [stop], "n": 1})));
    assert!(!stopped[0].as_str().unwrap().contains(&stop));

    for (status, path, body) in [
        (
            404,
            "/v1/completions",
            json!({"model": "monteclora@draw-3", "prompt": "a"}),
        ),
        (
            404,
            "/v1/completions",
            json!({"model": "monteclora@draw-01", "prompt": "a"}),
        ),
        (
            404,
            "/v1/completions",
            json!({"model": "plain@draw-0", "prompt": "a"}),
        ),
        (400, "/v1/monteclora/score", chat("monteclora@draw-0")),
        (
            400,
            "/v1/chat/completions",
            with(
                chat("monteclora@draw-0"),
                json!({"tools": [{"type": "function", "function": {"name": "f"}}]}),
            ),
        ),
    ] {
        let answer = site.post(&server, path, &body);
        assert_eq!(answer.status(), status, "{body}");
    }
}

/// The text of a stream, and why it ended.
fn streamed(response: Response) -> (String, String) {
    let (mut text, mut reason) = (String::new(), String::new());
    for line in response.text().unwrap().lines() {
        let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else {
            continue;
        };
        let chunk: Value = serde_json::from_str(data).unwrap();
        let choice = &chunk["choices"][0];
        text.push_str(choice["text"].as_str().unwrap());
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    (text, reason)
}

/// Draws are served of what has a posterior, and where scores are enabled; the remedy is named otherwise.
#[test]
fn draws_need_a_posterior_and_the_copy_of_the_base() {
    let site = Site::new();
    let refused = |toml: String| {
        std::fs::write(site.at("serve.toml"), toml).unwrap();
        let done = run(&["serve", "-c", &site.at("serve.toml")]);
        assert_eq!(done.code, 2, "{}", done.stderr);
        done.stderr
    };
    let toml = |enabled: bool, adapter: &str| {
        format!(
            "[[models]]\nmodel_id = '{}'\nname = 'base'\ndevice.cpu = true\nuncertainty.enabled = {enabled}\n[[models.adapters]]\nalias = 'a'\nsource = 'adapters/{adapter}'\ndraws = 2\n",
            tiny()
        )
    };
    let without = refused(toml(false, POSTERIOR));
    assert!(
        without.contains("models[0].adapters[0].draws") && without.contains("[models.uncertainty]"),
        "{without}"
    );
    let plain = refused(toml(true, PLAIN));
    assert!(
        plain.contains("`a`") && plain.contains("monteclora fit"),
        "{plain}"
    );
    // The remedy that was named.
    std::fs::write(
        site.at("rows.jsonl"),
        "{\"prompt\": \"is it\", \"choices\": [\"yes\", \"no\"], \"answer\": 0}\n",
    )
    .unwrap();
    let (base, plain) = (tiny(), site.adapter(PLAIN));
    ok(&[
        "fit",
        "-m",
        &base,
        "-a",
        text(&plain),
        "--data",
        &site.at("rows.jsonl"),
        "-o",
        &site.at("adapters/fitted"),
        "--draws",
        "1",
        "--geometry",
        "rows",
    ]);
    std::fs::write(
        site.at("serve.toml"),
        format!("[server]\nport = 0\n{}", toml(true, "fitted")),
    )
    .unwrap();
    let server = serve(&["-c", &site.at("serve.toml")]);
    let body = json!({"model": "a@draw-1", "prompt": "a", "max_tokens": 1});
    assert_eq!(site.post(&server, "/v1/completions", &body).status(), 200);
    let blocks = refused(format!(
        "[[models]]\nmodel_id = '{}'\ndevice.cpu = true\nuncertainty.enabled = true\nuncertainty.dtype = 'blocks'\n",
        tiny()
    ));
    assert!(
        blocks.contains(".gguf") && blocks.contains("bf16"),
        "{blocks}"
    );
}
