//! A client of the adapter endpoints that vLLM introduced and both `monteclora serve` and mistral.rs 0.9 offer.

use std::time::{Duration, Instant};

use monteclora_converters::Problem;
use reqwest::blocking::{Client, RequestBuilder, Response};
use reqwest::{StatusCode, Url};
use serde::Serialize;
use serde_json::{Value, json};

use super::error::{Error, protocol};

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";
const LIST: &str = "/v1/lora_adapters";
const ENABLE: &str = "enable [admin] in serve.toml, or set MISTRALRS_ALLOW_RUNTIME_LORA_UPDATING=1 for mistral.rs 0.9";

/// An adapter in the server's list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServedAdapter {
    /// Alias that requests use.
    pub name: String,
    /// Hash of the adapter's content.
    pub generation: String,
    /// Hash of everything in the adapter's directory, independent of the base model. Only servers that score answers
    /// give it.
    pub content: Option<String>,
    /// Base model, if the server names it.
    pub parent: Option<String>,
    /// Directory, relative to the server's adapter root or absolute, if the server names it.
    pub source: Option<String>,
}

/// An adapter that the server has loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Hash of the adapter's content.
    pub generation: String,
    /// Possible faults of the adapter that did not stop the server from loading it.
    pub warnings: Vec<String>,
}

/// An entry of the server's model list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServedModel {
    /// Name that requests use.
    pub id: String,
    /// Base model, for an adapter.
    pub parent: Option<String>,
    /// Hash of the adapter's content, if the server gives it.
    pub generation: Option<String>,
    /// Whether the server scores its answers.
    pub is_scored: bool,
    /// Whether the scores are calibrated.
    pub is_calibrated: bool,
    /// How to ask this model; [`Form::Chat`] if the server does not say.
    #[serde(skip)]
    pub form: Form,
}

/// How a question is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As a conversation of one turn.
    Chat,
    /// As a text to be continued, for a model without a chat template.
    Completion,
}

/// A connection to a server whose adapters can be changed.
pub struct AdapterServer {
    base: Url,
    key: Option<String>,
    client: Client,
    timeout: Duration,
}

impl AdapterServer {
    /// Creates a client of the server at `url`. `timeout` bounds each request; loading a model takes longest.
    ///
    /// # Errors
    /// Returns an error if `url` is not an http or https address, or contains a user name or password.
    pub fn new(url: &str, key: Option<String>, timeout: Duration) -> Result<Self, Error> {
        // The part before `@` may be a secret.
        let shown = url.rsplit('@').next().unwrap_or_default();
        let wrong = |problem: &str| Problem::usage(format!("--server {shown}: {problem}"));
        let base =
            Url::parse(url).map_err(|_| wrong("not an address such as http://127.0.0.1:1234"))?;
        if !["http", "https"].contains(&base.scheme()) {
            return Err(wrong("only http and https are spoken").into());
        }
        if base.password().is_some() || !base.username().is_empty() {
            return Err(
                wrong("holds a password; give the key with --key-file or MONTECLORA_KEY").into(),
            );
        }
        let host = base.host_str().unwrap_or_default();
        let is_local = host == "localhost" || host == "[::1]" || host.starts_with("127.");
        if base.scheme() == "http" && !is_local && key.is_some() {
            tracing::warn!("the key goes to {host} unencrypted; use https beyond this machine");
        }
        let mut builder = Client::builder().timeout(timeout);
        if is_local {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| wrong(&error.to_string()))?;
        Ok(Self {
            base,
            key,
            client,
            timeout,
        })
    }

    /// The address of the server, without a final slash.
    pub fn url(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// Whether the server is ready for requests; `None` if it has neither `/readyz` nor `/health`.
    ///
    /// # Errors
    /// Returns an error if the server does not answer.
    pub fn is_ready(&self) -> Result<Option<bool>, Error> {
        for path in ["/readyz", "/health"] {
            let response = self.send(path, self.client.get(self.address(path)))?;
            match response.status() {
                StatusCode::NOT_FOUND => {}
                status => return Ok(Some(status.is_success())),
            }
        }
        Ok(None)
    }

    /// Every model and adapter that a request may name.
    ///
    /// # Errors
    /// Returns an error if the server does not answer, or not as the protocol expects.
    pub fn models(&self) -> Result<Vec<ServedModel>, Error> {
        let list = self.get("/v1/models")?;
        let model = |entry: &Value| {
            Some(ServedModel {
                id: text(entry, "id")?,
                parent: text(entry, "parent"),
                generation: text(entry, "generation"),
                is_scored: entry["uncertainty"].is_object(),
                is_calibrated: entry["uncertainty"]["calibrated"] == true,
                form: match entry["has_chat_template"] == false {
                    true => Form::Completion,
                    false => Form::Chat,
                },
            })
        };
        entries("/v1/models", &list, model)
    }

    /// The adapters that the server serves.
    ///
    /// # Errors
    /// As [`Self::models`]. Returns `no-endpoint` if the server has no endpoint to manage adapters.
    pub fn adapters(&self) -> Result<Vec<ServedAdapter>, Error> {
        let list = self.get(LIST)?;
        let adapter = |entry: &Value| {
            Some(ServedAdapter {
                name: text(entry, "id").or_else(|| text(entry, "lora_name"))?,
                generation: text(entry, "generation")?,
                content: text(entry, "content"),
                parent: text(entry, "parent"),
                source: text(entry, "source"),
            })
        };
        entries(LIST, &list, adapter)
    }

    /// The adapter `name`, if it is served.
    ///
    /// # Errors
    /// As [`Self::adapters`].
    pub fn adapter(&self, name: &str) -> Result<Option<ServedAdapter>, Error> {
        let adapters = self.adapters()?;
        Ok(adapters.into_iter().find(|adapter| adapter.name == name))
    }

    /// Loads the directory `path` as `name`, on the base `model` if given.
    ///
    /// With `replacing`, the adapter replaces that generation and no other. Without it, `name` must be free.
    ///
    /// # Errors
    /// As [`Self::adapters`]. Returns `refused` with the server's reasons, or `conflict` if the alias is not in the
    /// expected state.
    pub fn load(
        &self,
        name: &str,
        path: &str,
        model: Option<&str>,
        replacing: Option<&str>,
    ) -> Result<Loaded, Error> {
        let mut body = json!({"lora_name": name, "lora_path": path});
        if let Some(model) = model {
            body["model"] = json!(model);
        }
        if let Some(generation) = replacing {
            body["load_inplace"] = json!(true);
            body["expected_generation"] = json!(generation);
        }
        self.post_load(&body)
    }

    /// Loads the directory `path` as `name`, and replaces whatever has that name.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_over(&self, name: &str, path: &str, model: Option<&str>) -> Result<Loaded, Error> {
        let mut body = json!({"lora_name": name, "lora_path": path, "load_inplace": true});
        if let Some(model) = model {
            body["model"] = json!(model);
        }
        self.post_load(&body)
    }

    fn post_load(&self, body: &Value) -> Result<Loaded, Error> {
        let answer = self.post(LOAD, body)?;
        let generation = text(&answer, "generation");
        let warnings = answer["warnings"].as_array().into_iter().flatten();
        Ok(Loaded {
            generation: generation
                .ok_or_else(|| protocol(LOAD, "the answer names no generation"))?,
            warnings: warnings.filter_map(warning).collect(),
        })
    }

    /// Stops serving `name`. With `generation`, only if that generation is served.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn unload(&self, name: &str, generation: Option<&str>) -> Result<(), Error> {
        let mut body = json!({"lora_name": name});
        if let Some(generation) = generation {
            body["expected_generation"] = json!(generation);
        }
        self.post(UNLOAD, &body).map(|_| ())
    }

    /// The greedy answer of `model` to one question, at most 64 tokens; it may be empty.
    ///
    /// # Errors
    /// Returns an error if the request fails, or if the answer's finish reason is neither `stop` nor `length`.
    pub fn ask(
        &self,
        model: &str,
        system: Option<&str>,
        prompt: &str,
        form: Form,
    ) -> Result<String, Error> {
        let mut body = json!({"model": model, "temperature": 0, "max_tokens": 64});
        let (path, text) = match form {
            Form::Chat => {
                let system = system.map(|text| json!({"role": "system", "content": text}));
                let asked = json!({"role": "user", "content": prompt});
                body["messages"] = system.into_iter().chain([asked]).collect();
                ("/v1/chat/completions", "/message/content")
            }
            Form::Completion => {
                body["prompt"] = json!(prompt);
                ("/v1/completions", "/text")
            }
        };
        let answer = self.post(path, &body)?;
        let choice = &answer["choices"][0];
        match choice["finish_reason"].as_str() {
            Some("stop" | "length") => {
                let text = choice.pointer(text).and_then(Value::as_str);
                Ok(text.unwrap_or_default().to_owned())
            }
            other => Err(protocol(
                path,
                &format!("the answer ended with {other:?} instead of stop or length"),
            )),
        }
    }

    fn address(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        let prefix = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{prefix}{path}"));
        url
    }

    fn get(&self, path: &str) -> Result<Value, Error> {
        let response = self.send(path, self.client.get(self.address(path)))?;
        self.read(path, response)
    }

    /// Sends a POST request, and repeats it while the server is busy with another load, until the timeout.
    fn post(&self, path: &str, body: &Value) -> Result<Value, Error> {
        let start = Instant::now();
        loop {
            let request = self.client.post(self.address(path)).json(body);
            let response = self.send(path, request)?;
            let busy = response.status() == StatusCode::TOO_MANY_REQUESTS;
            if !busy || start.elapsed() > self.timeout {
                return self.read(path, response);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn send(&self, path: &str, mut request: RequestBuilder) -> Result<Response, Error> {
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        request.send().map_err(|error| self.silent(path, &error))
    }

    fn silent(&self, path: &str, error: &reqwest::Error) -> Error {
        let message = format!(
            "{}{path} does not answer: {}",
            self.url(),
            root_cause(error)
        );
        Problem::sentence("unreachable", message).exit(1).into()
    }

    fn read(&self, path: &str, response: Response) -> Result<Value, Error> {
        let status = response.status();
        let body = (response.text()).map_err(|error| self.silent(path, &error))?;
        let value: Option<Value> = serde_json::from_str(&body).ok();
        if status.is_success() {
            return value.ok_or_else(|| protocol(path, "the answer is not JSON"));
        }
        let message = value.as_ref().map_or_else(String::new, error_text);
        let is_endpoint = value
            .as_ref()
            .and_then(|value| value["error"]["code"].as_str());
        let missing = matches!(is_endpoint, None | Some("not_found"));
        Err(match status {
            StatusCode::UNAUTHORIZED => Problem::new(
                "unauthorized",
                path,
                format!("the server wants another key ({message})"),
                "give the administrator's with --key-file or MONTECLORA_KEY",
            )
            .exit(2)
            .into(),
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED if missing => {
                Problem::new("no-endpoint", path, "there is no such endpoint", ENABLE)
                    .exit(2)
                    .into()
            }
            StatusCode::CONFLICT => Problem::sentence(
                "conflict",
                format!(
                    "the alias changed while this ran: {message}; look with `monteclora status`, and try again"
                ),
            )
            .exit(1)
            .into(),
            status if status.is_client_error() && [LOAD, UNLOAD].contains(&path) => {
                let status = status.as_u16();
                let message = format!("the server refuses the adapter (status {status}): {message}");
                Problem::sentence("refused", message).into()
            }
            status => protocol(path, &format!("status {}: {message}", status.as_u16())),
        })
    }
}

/// Formats a warning of the server as a sentence.
fn warning(found: &Value) -> Option<String> {
    let part = |key: &str| found[key].as_str().filter(|text| !text.is_empty());
    let message = part("message").or(found.as_str())?;
    let at = part("where").map_or_else(String::new, |at| format!("{at}: "));
    let fix = part("fix").map_or_else(String::new, |fix| format!("; {fix}"));
    Some(format!("{at}{message}{fix}"))
}

fn text(value: &Value, key: &str) -> Option<String> {
    value[key].as_str().map(str::to_owned)
}

fn entries<T>(
    path: &str,
    list: &Value,
    entry: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<T>, Error> {
    let data = list["data"].as_array();
    data.and_then(|data| data.iter().map(entry).collect())
        .ok_or_else(|| protocol(path, "the answer is not a list of names"))
}

/// The message of an error response, with its list of problems.
fn error_text(answer: &Value) -> String {
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    let problems = answer["error"]["problems"].as_array();
    let problems = problems.into_iter().flatten().filter_map(|problem| {
        let place = problem["where"].as_str()?;
        let line = format!("\n  {place}: {}", problem["message"].as_str()?);
        (!message.contains(place)).then_some(line)
    });
    message.to_owned() + &problems.collect::<String>()
}

fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
