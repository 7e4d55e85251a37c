//! Pushes files to the Hub as one commit. Small files are part of the commit; others go by Git LFS if the Hub lacks
//! them.
//!
//! The endpoints are those of `huggingface_hub`: `/api/repos/create`, `preupload`, Git LFS's batch API, `commit`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use monteclora_converters::Problem;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::client::{problem, token};

/// Number of bytes of a file from which the Hub decides how the file is sent.
const SAMPLE: u64 = 512;

/// Where files are pushed to.
#[derive(Debug)]
pub struct Destination<'a> {
    /// `ORG/NAME`, or `NAME` for a repository of the token's owner.
    pub repo: &'a str,
    /// Branch.
    pub revision: &'a str,
    /// Whether a new repository is private.
    pub private: bool,
    /// Message of the commit.
    pub message: &'a str,
    /// Source of the access token, as in mistral.rs's `--token-source`.
    pub token_source: &'a str,
}

/// The result of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The repository's full name.
    pub repo: String,
    /// The commit.
    pub commit: String,
    /// Address of the commit.
    pub url: String,
    /// Number of files that were sent; the Hub already had the others.
    pub sent: usize,
}

struct Api {
    agent: ureq::Agent,
    endpoint: String,
    token: String,
}

/// A file of a commit.
struct Pushing {
    name: String,
    path: PathBuf,
    size: u64,
    is_large: bool,
}

/// Pushes `files`, each with its name in the repository.
///
/// # Errors
/// Returns an error if the token is missing or may not write, if a file cannot be read, or if the Hub refuses.
pub fn push(files: &[(String, PathBuf)], to: &Destination<'_>) -> Result<Pushed> {
    let api = Api::new(to.token_source)?;
    let repo = api.create(to)?;
    let mut pushing = files
        .iter()
        .map(|(name, path)| {
            let size = std::fs::metadata(path)
                .with_context(|| unreadable(path))?
                .len();
            Ok(Pushing {
                name: name.clone(),
                path: path.clone(),
                size,
                is_large: false,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    api.ask_how(&repo, to.revision, &mut pushing)?;
    let mut sent = 0;
    let mut lines =
        vec![json!({"key": "header", "value": {"summary": to.message, "description": ""}})];
    for file in &pushing {
        let value = match file.is_large {
            true => {
                let oid = sha256(&file.path)?;
                sent += usize::from(api.send(&repo, file, &oid)?);
                json!({"key": "lfsFile", "value": {"path": file.name, "algo": "sha256", "oid": oid, "size": file.size}})
            }
            false => {
                sent += 1;
                let bytes = std::fs::read(&file.path).with_context(|| unreadable(&file.path))?;
                json!({"key": "file", "value": {"content": STANDARD.encode(bytes), "path": file.name, "encoding": "base64"}})
            }
        };
        lines.push(value);
    }
    let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let path = format!("/api/models/{repo}/commit/{}", encoded(to.revision));
    let request = api.post(&path).set("content-type", "application/x-ndjson");
    let answer = api.read(request.send_string(&body), "commit")?;
    let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
    let commit = text("commitOid");
    if commit.is_empty() {
        let message = "the Hub's answer names no commit; the files may not be there";
        return Err(
            problem(repo, message, "look at the repository, and try again")
                .exit(1)
                .into(),
        );
    }
    Ok(Pushed {
        commit,
        url: text("commitUrl"),
        repo,
        sent,
    })
}

impl Api {
    fn new(token_source: &str) -> Result<Self> {
        let found = match token(token_source)? {
            Some(found) => found,
            // The token of `hf auth login`.
            None => hf_hub::Cache::from_env().token(),
        };
        let Some(token) = found else {
            let fix = "set HF_TOKEN to a token that may write, or log in with `hf auth login`";
            return Err(problem("the Hub", "there is no token to write with", fix).into());
        };
        let endpoint = std::env::var("HF_ENDPOINT")
            .ok()
            .filter(|url| !url.is_empty());
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Self {
            agent: ureq::AgentBuilder::new()
                .timeout_connect(CONNECT)
                .timeout_read(ANSWER)
                .timeout_write(ANSWER)
                .build(),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
        })
    }

    fn post(&self, path: &str) -> ureq::Request {
        let url = format!("{}{path}", self.endpoint);
        let request = self.agent.post(&url);
        request.set("authorization", &format!("Bearer {}", self.token))
    }

    /// Creates the repository if it does not exist, and returns its full name.
    fn create(&self, to: &Destination<'_>) -> Result<String> {
        let mut body = json!({"name": to.repo, "type": "model", "private": to.private});
        if let Some((organization, name)) = to.repo.split_once('/') {
            body["name"] = json!(name);
            body["organization"] = json!(organization);
        }
        let answer = self.post("/api/repos/create").send_json(body);
        let answer = match answer {
            // The repository exists; the response gives its name.
            Err(ureq::Error::Status(409, response)) => {
                response.into_json().unwrap_or_else(|_| json!({}))
            }
            other => self.read(other, "repository")?,
        };
        let url = answer["url"].as_str().unwrap_or_default();
        let named = url.rsplit('/').take(2).collect::<Vec<_>>();
        Ok(match (to.repo.contains('/'), named.as_slice()) {
            (false, [name, owner]) if !owner.is_empty() => format!("{owner}/{name}"),
            _ => to.repo.to_owned(),
        })
    }

    /// Asks the Hub which files go by Git LFS.
    fn ask_how(&self, repo: &str, revision: &str, files: &mut [Pushing]) -> Result<()> {
        let mut asked = Vec::new();
        for file in files.iter() {
            let mut sample = Vec::new();
            let opened = File::open(&file.path).with_context(|| unreadable(&file.path))?;
            opened.take(SAMPLE).read_to_end(&mut sample)?;
            asked.push(
                json!({"path": file.name, "size": file.size, "sample": STANDARD.encode(sample)}),
            );
        }
        let path = format!("/api/models/{repo}/preupload/{}", encoded(revision));
        let asked = json!({"files": asked});
        let answer = self.read(self.post(&path).send_json(asked), "upload")?;
        let told = answer["files"].as_array().cloned().unwrap_or_default();
        for file in files {
            let told = told.iter().find(|told| told["path"] == file.name.as_str());
            let told = told.ok_or_else(|| Self::incomplete("upload", &file.name))?;
            file.is_large = told["uploadMode"] == "lfs";
        }
        Ok(())
    }

    /// Sends a file by Git LFS. Returns false if the Hub already has it.
    fn send(&self, repo: &str, file: &Pushing, oid: &str) -> Result<bool> {
        const LFS: &str = "application/vnd.git-lfs+json";
        let object = json!({"oid": oid, "size": file.size});
        let asked = json!({
            "operation": "upload", "transfers": ["basic"], "hash_algo": "sha256", "objects": [object],
        });
        let request = self.post(&format!("/{repo}.git/info/lfs/objects/batch"));
        let request = request.set("accept", LFS).set("content-type", LFS);
        let answer = self.read(request.send_string(&asked.to_string()), "upload")?;
        let told = answer["objects"].as_array();
        let told = told.and_then(|all| all.iter().find(|told| told["oid"] == oid));
        let told = told.ok_or_else(|| Self::incomplete("upload", &file.name))?;
        if let Some(message) = told["error"]["message"].as_str() {
            return Err(problem(file.name.clone(), message, "").into());
        }
        let Some(href) = told["actions"]["upload"]["href"].as_str() else {
            return Ok(false);
        };
        tracing::info!("sending {} ({:.1} MB)", file.name, file.size as f64 / 1e6);
        let mut request = self.agent.put(href);
        for (name, value) in told["actions"]["upload"]["header"]
            .as_object()
            .into_iter()
            .flatten()
        {
            request = request.set(name, value.as_str().unwrap_or_default());
        }
        let request = request.set("content-length", &file.size.to_string());
        let opened = File::open(&file.path).with_context(|| unreadable(&file.path))?;
        self.refused(request.send(opened), &file.name)?;
        if let Some(verify) = told["actions"]["verify"]["href"].as_str() {
            // Only the Hub may receive the token.
            let request = match verify.strip_prefix(&self.endpoint) {
                Some(path) if path.starts_with('/') => self.post(path),
                _ => self.agent.post(verify),
            };
            let request = request.set("accept", LFS).set("content-type", LFS);
            self.refused(request.send_string(&object.to_string()), &file.name)?;
        }
        Ok(true)
    }

    /// The JSON of a response.
    fn read(&self, answer: Result<ureq::Response, ureq::Error>, what: &str) -> Result<Value> {
        let response = self.refused(answer, what)?;
        let answer: Value = response
            .into_json()
            .with_context(|| format!("the Hub's answer about the {what} is no JSON"))?;
        Ok(answer)
    }

    /// Turns a refusal of the Hub into an error. The error never contains the token.
    fn refused(
        &self,
        answer: Result<ureq::Response, ureq::Error>,
        what: &str,
    ) -> Result<ureq::Response> {
        let error = match answer {
            Ok(response) if (200..300).contains(&response.status()) => return Ok(response),
            Ok(response) => {
                let status = response.status();
                let to = response.header("location").unwrap_or("another address");
                let message = format!("the Hub answers with status {status} and names {to}");
                let fix = "check the name of the repository: it may have moved";
                return Err(problem(what, self.hidden(&message), fix).exit(1).into());
            }
            Err(error) => error,
        };
        let (message, fix) = match error {
            ureq::Error::Status(status @ (401 | 403), _) => (
                format!("the Hub refuses to write ({status})"),
                "set HF_TOKEN to a token that may write there, and check the name",
            ),
            ureq::Error::Status(status, response) => {
                let said: Value = response.into_json().unwrap_or_default();
                let said = said["error"].as_str().unwrap_or_default();
                (format!("the Hub answers with status {status}: {said}"), "")
            }
            ureq::Error::Transport(error) => (
                format!("the Hub cannot be reached: {error}"),
                "connect to the network, and try again; what was sent is not sent twice",
            ),
        };
        Err(problem(what, self.hidden(&message), fix).exit(1).into())
    }

    /// The text with the token masked.
    fn hidden(&self, text: &str) -> String {
        text.replace(&self.token, "***")
    }

    /// The error of a response in which something is missing.
    fn incomplete(what: &str, missing: &str) -> anyhow::Error {
        let message = format!("the Hub's answer says nothing of {missing}; nothing was committed");
        problem(what, message, "try again later").exit(1).into()
    }
}

fn unreadable(path: &Path) -> String {
    format!("cannot read `{}`", path.display())
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| unreadable(path))?;
    let mut digest = Sha256::new();
    std::io::copy(&mut file, &mut digest).with_context(|| unreadable(path))?;
    Ok(format!("{:x}", digest.finalize()))
}

/// How long a connection may take, and how long the Hub may be silent.
const CONNECT: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(120);

/// Refuses a name that no branch has.
///
/// # Errors
/// Returns an error that says what a name may hold.
pub fn require_revision(revision: &str) -> Result<()> {
    let known = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let parts = |part: &str| !part.is_empty() && part != "." && part != "..";
    if revision.chars().all(known) && revision.split('/').all(parts) {
        return Ok(());
    }
    let message = format!(
        "--revision {revision:?}: expected the name of a branch, of letters, digits, `-`, `_`, `.` and `/`"
    );
    Err(Problem::usage(message).into())
}

/// A branch as a part of an address: what [`require_revision`] allows, with `/` encoded.
fn encoded(revision: &str) -> String {
    revision.replace('/', "%2F")
}

/// Refuses a name that cannot be that of a repository.
///
/// # Errors
/// Returns an error that says what names are valid.
pub fn require_repo(repo: &str) -> Result<(), Problem> {
    let is_name = match repo.contains('/') {
        true => super::is_hub_id(repo),
        false => super::is_hub_id(&format!("a/{repo}")),
    };
    match is_name {
        true => Ok(()),
        false => Err(Problem::usage(format!(
            "`{repo}` cannot be a repository; give ORG/NAME, or the NAME of one of your own"
        ))),
    }
}
