//! Tests which configurations are accepted, and which errors the others get.

use std::fs;
use std::path::PathBuf;

use mistralrs_core::IsqType;

use super::*;

const COMPLETE: &str = r#"
        default_model_id = "smollm2"
        [server]
        host = "127.0.0.1"
        port = 0
        allowed_origins = ["https://app.example", "http://[::1]:3000"]
        [runtime]
        max_seqs = 4
        prefix_cache_n = 0
        max_memory_mb = 2048
        [limits]
        max_body_bytes = 1000
        max_header_bytes = 10000
        max_prompt_tokens = 100
        max_completion_tokens = 50
        max_concurrent_requests = 3
        max_connections = 4
        header_timeout_s = 5
        keep_alive_timeout_s = 75
        body_timeout_s = 6
        write_timeout_s = 7
        request_timeout_s = 8
        drain_timeout_s = 9
        [[models]]
        model_id = "base"
        name = "smollm2"
        dtype = "f32"
        [models.quantization]
        in_situ_quant = "8"
        [models.device]
        cpu = true
        [[models.adapters]]
        type = "monteclora"
        alias = "triage"
        source = "out"
    "#;

fn anywhere(wanted: &Wanted<'_>) -> Result<PathBuf> {
    Ok(PathBuf::from("/found").join(wanted.id))
}

fn parse(text: &str) -> Result<ServeFile, String> {
    super::parse::parse(text, [])
}

fn wrong(text: &str) -> String {
    match parse(text) {
        Err(message) => message,
        Ok(file) => file
            .resolve(&anywhere)
            .expect_err("must be refused")
            .to_string(),
    }
}

#[test]
fn a_complete_file_resolves() {
    let file = parse(COMPLETE).expect("valid");
    let config = file.resolve(&anywhere).expect("consistent");
    assert_eq!(config.max_seqs.get(), 4);
    assert_eq!(config.max_memory, Some(2 << 30));
    assert_eq!(config.limits.max_completion_tokens, Some(50));
    assert_eq!(config.limits.drain_timeout_s, 9);
    assert_eq!(config.default_model, "smollm2");
    let model = &config.models[0];
    assert_eq!(model.isq, Some(IsqType::Q8_0));
    assert_eq!(
        model.adapters,
        [("triage".to_owned(), PathBuf::from("/found/out"))]
    );
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let config = parse("[[models]]\nmodel_id = 'a/b'\ndevice.cpu = true")
        .and_then(|file| file.resolve(&anywhere).map_err(|error| error.to_string()))
        .expect("the shortest file");
    assert_eq!(config.address.to_string(), "127.0.0.1:1234");
    assert_eq!(config.max_seqs.get(), 32);
    assert_eq!(
        (
            config.models[0].name.as_str(),
            config.default_model.as_str()
        ),
        ("b", "b")
    );
    assert!(config.adapter_root.is_none() && config.api_keys.is_empty());
}

#[test]
fn every_unknown_key_is_named_with_the_nearest() {
    let message =
        wrong("[server]\nprot = 1\n[[models]]\nmodel_id = 'a'\n[[models.adapters]]\nalais = 'x'");
    assert!(
        message.contains("server.prot: unknown key; did you mean `port`?"),
        "{message}"
    );
    assert!(
        message.contains("models[0].adapters[0].alais: unknown key; did you mean `alias`?"),
        "{message}"
    );
}

#[test]
fn the_key_list_is_the_structures() {
    // deny_unknown_fields refuses a key that no structure has, so all keys together must pass both checks.
    let all = format!(
        "{COMPLETE}\nrevision = 'main'\n[auth]\napi_keys_file = 'k'\nadmin_keys_file = 'a'\n[admin]\nenabled = true\nadapter_root = 'r'\nstate_file = 's'"
    );
    let all = all.replace(
        "dtype = \"f32\"",
        "dtype = \"f32\"\nrevision = 'x'\nchat_template = 't.jinja'",
    );
    let all = all.replace(
        "port = 0",
        "port = 0\nui = true\ntls_cert = 'c'\ntls_key = 'k'",
    );
    let all = all.replace(
        "[[models.adapters]]",
        "[models.uncertainty]\nenabled = true\ndtype = \"bf16\"\ndraws = 8\nmax_concurrent = 1\n[[models.adapters]]\ndraws = 2",
    );
    let all = format!(
        "{all}\n[[server.examples]]\ntitle = 't'\nquestion = 'q'\nsystem = 's'\nchoices = ['a', 'b']\nmax_tokens = 1\n"
    );
    parse(&all).expect("all keys are known");
    let listed: usize = keys().iter().map(|(_, keys)| keys.len()).sum();
    let written = all
        .lines()
        .filter(|line| line.contains('=') || line.contains('['))
        .count();
    // Tables are listed as keys of their parents, so each line is one key.
    assert_eq!(listed, written);
}

#[test]
fn a_wrong_type_names_the_line() {
    assert!(
        wrong("[server]\nport = 'x'").starts_with("line 2: "),
        "{}",
        wrong("[server]\nport = 'x'")
    );
}

#[test]
fn all_wrong_settings_are_listed() {
    let message = wrong(
        "[server]\nhost = '0.0.0.0'\ntls_cert = 'c'\nallowed_origins = ['app.example']\n[limits]\nmax_header_bytes = 1\nbody_timeout_s = 0\n[runtime]\nmax_seqs = 0\nprefix_cache_n = 16\n[[models]]\nmodel_id = 'm'\nname = '/etc/x'\ndtype = 'f8'\ndevice.cpu = true\n[[models.adapters]]\nalias = 'a'\nsource = 's'\ntype = 'ia3'\n[[models.adapters]]\nalias = 'a'\nsource = 's'",
    );
    for part in [
        "server.host",
        "api_keys_file",
        "server.tls_key",
        "server.allowed_origins: `app.example`",
        "limits.max_header_bytes: must be at least 8192",
        "limits.body_timeout_s: must be at least 1",
        "runtime.max_seqs",
        "runtime.prefix_cache_n",
        "models[0].name",
        "models[0].dtype",
        "models[0].adapters[0].type",
        "already the name at models[0].adapters[0].alias",
    ] {
        assert!(message.contains(part), "{part} is missing in {message}");
    }
}

#[test]
fn relative_paths_start_at_the_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir(dir.path().join("base")).expect("created");
    fs::create_dir(dir.path().join("out")).expect("created");
    let path = dir.path().join("serve.toml");
    fs::write(&path, COMPLETE).expect("written");
    let config = ServeFile::read(&path)
        .and_then(|file| file.resolve(&local_only))
        .expect("both are next to the file");
    assert_eq!(config.models[0].base, dir.path().join("base"));
    assert_eq!(config.models[0].adapters[0].1, dir.path().join("out"));
    fs::remove_dir(dir.path().join("out")).expect("removed");
    let error = ServeFile::read(&path)
        .and_then(|file| file.resolve(&local_only))
        .expect_err("the adapter is gone");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn every_wrong_type_is_named_with_its_line() {
    let message = wrong(
        "[server]\nport = 'x'\nhost = 3\n[[models]]\nmodel_id = 1\n[[models.adapters]]\nalias = []\n",
    );
    for part in [
        "line 2: server.port",
        "line 3: server.host",
        "line 5: models[0].model_id",
        "line 7: models[0].adapters[0].alias",
    ] {
        assert!(message.contains(part), "{part} is missing in {message}");
    }
}

#[test]
fn the_environment_overrides_the_file() {
    let with = |variables: &[(&str, &str)]| {
        let owned = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        super::parse::parse(COMPLETE, owned)
    };
    let file = with(&[
        ("MONTECLORA_SERVER__PORT", "8080"),
        ("MONTECLORA_SERVER__HOST", "::1"),
        ("MONTECLORA_DEFAULT_MODEL_ID", "triage"),
        ("MONTECLORA_MODELS__0__QUANTIZATION__IN_SITU_QUANT", "4"),
        ("MONTECLORA_MODELS__0__ADAPTERS__1__ALIAS", "more"),
        ("MONTECLORA_MODELS__1__MODEL_ID", "other"),
        ("MONTECLORA_RUNTIME__MAX_SEQS", ""),
        ("MONTECLORA_CACHE", "not ours"),
        ("MONTECLORA_PORT_1234_TCP", "nor this"),
    ])
    .expect("all are known");
    assert_eq!((file.server.port, file.server.host.as_str()), (8080, "::1"));
    assert_eq!(file.default_model_id.as_deref(), Some("triage"));
    let first = &file.models[0];
    assert_eq!(first.quantization.in_situ_quant.as_deref(), Some("4"));
    assert_eq!(first.adapters[1].alias, "more");
    assert_eq!(first.adapters[0].source, "out", "the rest stays");
    assert_eq!(
        (file.models[1].model_id.as_str(), file.runtime.max_seqs),
        ("other", 4)
    );

    let message = with(&[
        ("MONTECLORA_SERVER__PROT", "1"),
        ("MONTECLORA_SERVER__PORT", "much"),
        ("MONTECLORA_MODELS__7__NAME", "x"),
        ("MONTECLORA_SERVER__HOST__NAME", "x"),
    ])
    .expect_err("all are wrong");
    for part in [
        "MONTECLORA_SERVER__PROT: server.prot: unknown key; did you mean `port`?",
        "MONTECLORA_SERVER__PORT: server.port: ",
        "MONTECLORA_MODELS__7__NAME: models[7].name: `models` has 1 entries",
        "MONTECLORA_SERVER__HOST__NAME: server.host.name: `host` is not a section",
    ] {
        assert!(message.contains(part), "{part} is missing in {message}");
    }
}

/// Only bases state how weights are held, and GGUF files are requested only at the end.
#[test]
fn what_is_wanted_says_how_weights_are_held() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("model.GGUF");
    fs::write(&file, b"GGUF").expect("written");
    let asked = std::cell::RefCell::new(Vec::new());
    let note = |wanted: &Wanted<'_>| {
        let held = wanted.weights;
        asked.borrow_mut().push((
            wanted.is_gguf(),
            held.map(|held| (held.in_bf16, held.quantised)),
        ));
        Ok(dir.path().to_path_buf())
    };
    let text = |dtype: &str, more: &str| {
        format!(
            "[[models]]\nmodel_id = {file:?}\ndtype = '{dtype}'\ndevice.cpu = true\n{more}\n[[models.adapters]]\nalias = 'a'\nsource = 'org/lora'"
        )
    };
    for (dtype, more, expected) in [
        ("auto", "", (false, false)),
        ("f32", "quantization.in_situ_quant = '8'", (false, true)),
        ("f16", "", (false, false)),
        ("bf16", "", (true, false)),
    ] {
        asked.borrow_mut().clear();
        parse(&text(dtype, more))
            .expect("well-formed")
            .resolve(&note)
            .expect("consistent");
        assert_eq!(
            *asked.borrow(),
            [(true, Some(expected)), (false, None)],
            "{dtype}"
        );
    }
}

#[test]
fn nothing_is_fetched_for_a_file_with_another_error() {
    let file = parse("[[models]]\nmodel_id = 'org/name'\ndtype = 'f8'\n[[models]]\nmodel_id = '/nowhere/at/all'\nname = 'b'")
        .expect("well-formed");
    let fetch = |wanted: &Wanted<'_>| match wanted.id {
        "org/name" => panic!("fetched"),
        _ => local_only(wanted),
    };
    let error = file.resolve(&fetch).expect_err("wrong").to_string();
    assert!(
        error.contains("models[0].dtype")
            && error.contains("models[1].model_id: `/nowhere/at/all`"),
        "{error}"
    );
}
