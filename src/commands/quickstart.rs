//! `quickstart`: trains, evaluates, calibrates, exports and serves a real model.

mod certainty;
mod job;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result};
use monteclora_converters::{
    Adapter, DType, LoraOptions, ModelFiles, ReadOptions, Site, files, format_named, jinja,
    read_as, shell_word,
};
use serde::Serialize;
use serde_json::Value;

use self::certainty::{Certainty, Score};
use self::job::{Form, Job, Paths};
#[cfg(feature = "mistralrs")]
use super::train::say_stopping;
use super::train::{AFTER_STEP, end_at_once, stop_on_signals};
use super::{interrupted, numerical, program, show};
use crate::cli::QuickstartArgs;
use crate::config::RunConfig;
use crate::data::Dataset;
use crate::distributed::Alone;
use crate::eval::Recital;
use crate::fit::Stopped;
use crate::hub::{self, HubOptions, Located, OfGguf};
use crate::model::{ActiveAdapter, Decoder, Generation};
use crate::output::require_empty;
use crate::progress::{self, TrainProgress};
use crate::provenance::read_effective;
use crate::sample_models::{Recipe, SMOLLM2, SampleModel};
use crate::train::{Begin, Event, Prepared, begin};

/// The file with the results, in the output directory.
const REPORT: &str = "quickstart.json";

/// Largest number of tokens of an answer. The JSON objects have about twenty tokens.
const MAX_NEW_TOKENS: usize = 40;

/// Number of test rows that are decoded together.
const DECODE_BATCH: usize = 20;

#[derive(Debug, Clone, Serialize)]
struct Served {
    question: String,
    answer: String,
    model: String,
    /// Our decoder's greedy answer to the same question.
    ours: String,
    /// Whether mistral.rs gave the same tokens.
    equal: bool,
}

#[derive(Debug, Clone, Serialize)]
struct ParityScore {
    positions: usize,
    max_abs_diff: f64,
    top1_agreement: f64,
}

#[derive(Debug, Clone, Serialize)]
struct Report {
    model: String,
    train_rows: usize,
    test_rows: usize,
    steps: u64,
    /// Seconds of training in this process, without earlier interrupted ones.
    train_s: f64,
    total_s: f64,
    resumed: bool,
    base: Score,
    mean: Score,
    posterior: Certainty,
    /// Number of sites in the GGUF LoRA, which were read back and are equal to the bit.
    gguf_sites: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    parity: Option<ParityScore>,
    #[serde(skip_serializing_if = "Option::is_none")]
    served: Option<Served>,
}

pub(super) fn run(args: &QuickstartArgs) -> Result<()> {
    let began = Instant::now();
    let out = &args.output_dir;
    let goes_on = !args.force && out.join(job::RUN).is_file();
    if !goes_on {
        require_empty(out, args.force)?;
    }
    let (base, name, recipe) = chosen(args)?;
    tracing::info!("base model: {}", base.name);
    let form = match jinja::find(&base.dir, None)?.is_some() {
        true => Form::Conversations,
        false => Form::Prompts,
    };
    let job = Job {
        base: &base.dir,
        name,
        form,
        recipe,
    };
    if goes_on {
        job.require_same(out)?;
        if finished(out, args.json)? {
            return page_at_terminal(args.json, || page(&Paths::below(out)));
        }
        tracing::info!("going on in `{}`", out.display());
    }
    let paths = job.lay_out(out)?;
    let text = std::fs::read_to_string(&paths.run)
        .with_context(|| format!("cannot read `{}`", paths.run.display()))?;
    let overrides: Vec<String> = args
        .max_steps
        .map(|n| format!("train.max_steps={n}"))
        .into_iter()
        .collect();
    let config = RunConfig::from_toml(&text, &paths.run.display().to_string(), &overrides)?;
    let base_of_run = Some(base.clone());
    let prepared = match goes_on {
        true => Prepared::resumed(config, base_of_run, "auto")?,
        false => Prepared::new(config, base_of_run)?,
    };
    prepared.warn();

    let device = candle_core::Device::Cpu;
    let resume = goes_on.then_some("auto");
    let begun = begin(&prepared, resume, args.force, &device, &Alone)?;
    let mut progress = TrainProgress::default();
    let event = |event: &Event| progress.show(event);
    let interrupt = stop_on_signals(AFTER_STEP)?;
    let (steps, train_s, decoder) = match begun {
        Begin::Finished(step) => (step, 0.0, prepared.decoder(&device)?),
        Begin::Run(start) => {
            let (outcome, decoder) =
                prepared.train(*start, &device, interrupt.clone(), &Alone, event)?;
            if outcome.interrupted {
                let step = outcome.steps;
                return Err(stopped(&format!("interrupted at step {step}"), args));
            }
            (outcome.steps, outcome.seconds, decoder)
        }
    };
    let adapter = read_effective(&paths.adapter, false)?;
    // With --force, or after an interruption, files of an earlier quickstart are replaced.
    let options = LoraOptions {
        overwrite: true,
        ..LoraOptions::default()
    };
    adapter.write_lora(&paths.collapsed, &options)?;
    let gguf_sites = write_gguf(&adapter, &paths.gguf, &prepared.files, &options)?;

    let test = Dataset::open(
        &paths.data.join("test.jsonl"),
        None,
        prepared.train.encoder().clone(),
    )?;
    let tickets = Recital::new(&test, MAX_NEW_TOKENS, DECODE_BATCH)?;
    if interrupt.load(Ordering::SeqCst) {
        return Err(stopped("interrupted after training", args));
    }
    // Nothing of what follows is kept by itself, so that there is no reason to wait for its end.
    let what = stopped("interrupted; what comes after training begins anew", args);
    end_at_once(format!("{what:#}"));
    let base_answers = answer(&tickets, "base model", &decoder, &ActiveAdapter::default())?;
    let mean = ActiveAdapter::from_adapter(&adapter, decoder.config(), decoder.device())?;
    let mean_answers = answer(&tickets, "posterior mean", &decoder, &mean)?;
    let posterior = certainty::assess(
        (&prepared, form),
        (&decoder, &adapter),
        &paths.data.join("valid.jsonl"),
        &paths.posterior,
        (&tickets, &mean_answers),
        &interrupt,
    )
    .map_err(|error| match error.is::<Stopped>() {
        true => stopped("interrupted while the posterior was fitted", args),
        false => error,
    })?;
    job.serve_posterior(&paths)?;
    drop(decoder);
    let answers = out.join("answers.jsonl");
    std::fs::write(&answers, tickets.lines(&base_answers, &mean_answers)?)
        .with_context(|| format!("cannot write `{}`", answers.display()))?;

    let mut report = Report {
        model: base.name.clone(),
        train_rows: prepared.train.len(),
        test_rows: test.len(),
        steps,
        train_s,
        resumed: goes_on,
        total_s: 0.0,
        base: certainty::score(&tickets.own_predictions(&base_answers)?),
        mean: certainty::score(&tickets.own_predictions(&mean_answers)?),
        posterior,
        gguf_sites,
        parity: None,
        served: None,
    };
    served(
        &mut report,
        &prepared,
        &paths,
        &adapter,
        &tickets,
        &mean_answers,
    )?;
    report.total_s = began.elapsed().as_secs_f64();
    files::write_json(&out.join(REPORT), &report)?;
    show(args.json, &report, || {
        describe(&report, &paths, form, &base.dir)
    })?;
    match &report.served {
        Some(served) if !served.equal => Err(numerical(
            "mistral.rs and our decoder gave different tokens for the same question",
        )),
        Some(_) if !interrupt.load(Ordering::SeqCst) => {
            page_at_terminal(args.json, || page(&paths))
        }
        _ => Ok(()),
    }
}

/// The error for an interrupted quickstart. It names the command that continues.
fn stopped(when: &str, args: &QuickstartArgs) -> anyhow::Error {
    let mut command = format!("{} quickstart", program());
    let out = args.output_dir.display().to_string();
    for (flag, value) in [
        ("--model-id", args.model_id.as_deref()),
        (
            "--model",
            Some(args.model.as_str()).filter(|_| args.model_id.is_none()),
        ),
        ("--output-dir", Some(out.as_str())),
    ] {
        if let Some(value) = value {
            command.push_str(&format!(" {flag} {}", shell_word(value)));
        }
    }
    if args.json {
        command.push_str(" --json");
    }
    interrupted(format!("{when}; go on with: {command}"))
}

/// Shows the results of a finished quickstart. Returns false if there are none.
fn finished(out: &Path, as_json: bool) -> Result<bool> {
    let path = out.join(REPORT);
    if !path.is_file() {
        return Ok(false);
    }
    let report = Value::Object(monteclora_converters::json::read_object(&path)?);
    show(as_json, &report, || {
        let exact = |of: &str| 100.0 * report[of]["exact_match"].as_f64().unwrap_or_default();
        format!(
            "`{}` holds a quickstart that has ended: exact match {:.0} % -> {:.0} %. All of it is in {}; --force begins anew",
            out.display(),
            exact("base"),
            exact("mean"),
            path.display()
        )
    })?;
    Ok(true)
}

/// Serves the page only if stdout is a terminal and the output is not JSON.
fn page_at_terminal(as_json: bool, page: impl FnOnce() -> Result<()>) -> Result<()> {
    match as_json || !std::io::stdout().is_terminal() {
        true => Ok(()),
        false => page(),
    }
}

/// Serves the trained model with the page until Ctrl-C.
#[cfg(feature = "mistralrs")]
fn page(paths: &Paths) -> Result<()> {
    use std::net::{Ipv4Addr, TcpListener};

    use mistralrs_monteclora::{ServeFile, serve};

    let mut file = ServeFile::read(&paths.serve)?;
    // Another server may use the default port.
    if TcpListener::bind((Ipv4Addr::LOCALHOST, file.server.port)).is_err() {
        file.server.port = 0;
    }
    let config = super::serve::resolved(&file, "")?;
    say_stopping("");
    tracing::info!("loading it into the server");
    serve(&config, None, |address| {
        let text = format!(
            "\nopen http://{address}/ to ask it, and to see which answers to trust; Ctrl-C ends this"
        );
        // Errors are ignored: the terminal may be closed.
        let _ = super::print(&text);
    })?;
    Ok(())
}

#[cfg(not(feature = "mistralrs"))]
fn page(_: &Paths) -> Result<()> {
    Ok(())
}

/// The base model, its name in serve.toml, and its training recipe.
fn chosen(args: &QuickstartArgs) -> Result<(Located, &'static str, Recipe)> {
    if let Some(id) = &args.model_id {
        // mistral.rs serves the model later, and needs weights that are not quantised.
        let whole = OfGguf::Import(DType::F32);
        let located = hub::locate_as(id, &HubOptions::default(), whole)?;
        return Ok((located, "base", SMOLLM2.recipe));
    }
    let model = SampleModel::find(&args.model).context("a model that the command line lists")?;
    Ok((model.locate()?, model.name, model.recipe))
}

/// Writes the posterior mean for llama.cpp, and checks it by reading it back. Returns the number of its sites.
fn write_gguf(
    adapter: &Adapter,
    path: &Path,
    base: &ModelFiles,
    options: &LoraOptions,
) -> Result<usize> {
    let gguf = format_named("gguf").context("a format that is registered")?;
    gguf.write(adapter, path, options, Some(base.config()))?;
    let read = ReadOptions {
        base_config: Some(base.config()),
        base: Some(base),
        unwrap: false,
    };
    let read = read_as(gguf, path, &read)?;
    let by_name = |sites: Vec<Site>| -> BTreeMap<String, Site> {
        let named = sites.into_iter().map(|site| (site.name.clone(), site));
        named.collect()
    };
    let (written, read) = (adapter.to_lora(None)?.0.sites, read.sites);
    let n_sites = written.len();
    if by_name(written) != by_name(read) {
        return Err(numerical(format!(
            "`{}` does not hold what was written to it",
            path.display()
        )));
    }
    Ok(n_sites)
}

/// Answers the test tickets, with a progress bar.
fn answer(
    tickets: &Recital<'_>,
    name: &'static str,
    decoder: &Decoder,
    adapter: &ActiveAdapter,
) -> Result<Vec<Generation>> {
    let n_tickets = tickets.prompts.len();
    tracing::info!("answering {n_tickets} test tickets with the {name}");
    let bar = progress::items(name, n_tickets as u64);
    let answers = tickets.answers(decoder, adapter, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    Ok(answers)
}

/// Loads the collapsed adapter into mistral.rs, compares logits and asks the first test ticket.
#[cfg(feature = "mistralrs")]
fn served(
    report: &mut Report,
    prepared: &Prepared,
    paths: &Paths,
    adapter: &Adapter,
    tickets: &Recital<'_>,
    answers: &[Generation],
) -> Result<()> {
    use mistralrs_monteclora::{ChatMessage, Engine, MonteCloraLoader};

    use crate::data::Message;
    use crate::eval::{Bases, Engines, Opening, compare};

    tracing::info!("loading the collapsed adapter into mistral.rs");
    let base = prepared.base.dir.as_path();
    let sequences: Vec<Vec<u32>> = tickets.prompts.iter().take(3).cloned().collect();
    let engines = Engines {
        ours: true,
        mistralrs: true,
        device: candle_core::Device::Cpu,
        isq: None,
    };
    let adapter = Some((paths.collapsed.as_path(), adapter));
    let bases = Bases {
        ours: base,
        mistralrs: base,
    };
    let parity = compare(bases, adapter, &sequences, None, &engines)?;
    report.parity = parity
        .compared
        .get("ours_vs_mistralrs")
        .map(|a| ParityScore {
            positions: parity.positions,
            max_abs_diff: a.max_abs_diff,
            top1_agreement: a.top1_agreement,
        });
    let loader = MonteCloraLoader::builder(base, "triage")
        .adapter(&paths.collapsed)
        .device(candle_core::Device::Cpu)
        .build()?;
    let engine = Engine::start(&loader)?;
    let question = &tickets.questions[0];
    let answer = match question {
        Opening::Turns(turns) => {
            let turn = |m: &Message| ChatMessage::new(m.role().name(), m.content());
            let turns: Vec<ChatMessage> = turns.iter().map(turn).collect();
            engine.ask(&turns, MAX_NEW_TOKENS)?
        }
        Opening::Text(text) => engine.complete(text, MAX_NEW_TOKENS)?,
    };
    engine.shut_down()?;
    let ours = &answers[0];
    // mistral.rs includes the stop token in its answer; our decoder does not.
    let theirs: Vec<u32> = answer
        .token_ids
        .iter()
        .copied()
        .take_while(|t| !tickets.settings.stop_tokens.contains(t))
        .collect();
    report.served = Some(Served {
        question: question.text().to_owned(),
        answer: answer.text,
        model: "triage".to_owned(),
        ours: tickets.text(ours)?,
        equal: theirs == ours.tokens,
    });
    Ok(())
}

#[cfg(not(feature = "mistralrs"))]
fn served(
    _: &mut Report,
    _: &Prepared,
    _: &Paths,
    _: &Adapter,
    _: &Recital<'_>,
    _: &[Generation],
) -> Result<()> {
    tracing::warn!("built without the feature `mistralrs`: nothing is served");
    Ok(())
}

fn describe(report: &Report, paths: &Paths, form: Form, base: &Path) -> String {
    let mut text = format!(
        "\n{}: {} training tickets, {} steps in {:.0} s{} ({:.0} s in all)\n\n\
         exact match on {} unseen tickets\n{:<18} {:>7} {:>20}\n",
        report.model,
        report.train_rows,
        report.steps,
        report.train_s,
        if report.resumed {
            " since it went on"
        } else {
            ""
        },
        report.total_s,
        report.test_rows,
        "",
        "all",
        "the surest 80 %"
    );
    let average = format!("{} draws averaged", report.posterior.draws);
    for (name, score) in [
        ("base", &report.base),
        ("posterior mean", &report.mean),
        (&average, &report.posterior.score),
    ] {
        let (all, surest) = (100.0 * score.exact_match, 100.0 * score.surest_80);
        text.push_str(&format!("  {name:<16} {all:>5.1} % {surest:>18.1} %\n"));
    }
    if report.posterior.score.surest_80 <= report.mean.surest_80 {
        text.push_str("on these tickets the draws rank answers no better than the mean does\n");
    }
    text.push_str(&report.posterior.words());
    if let (Some(parity), Some(served)) = (&report.parity, &report.served) {
        text.push_str(&format!(
            "\nmistral.rs with the collapsed adapter against our decoder, {} positions\n  largest logit difference  {:.2e}\n  same top token            {:.2} %\n\
             \nquestion     {}\nmistral.rs   {}\nour decoder  {}\n",
            parity.positions,
            parity.max_abs_diff,
            100.0 * parity.top1_agreement,
            served.question.replace('\n', "\n             "),
            served.answer,
            served.ours
        ));
    }
    let (address, body) = form.request("triage", MAX_NEW_TOKENS);
    let program = program();
    text.push_str(&format!(
        "\nnext\n  {program} predict -m {} -a {} --posterior-samples {} --data {}   # answers, and how sure each is\n  {program} serve -c {}   # then open http://127.0.0.1:1234/\n  curl -s http://127.0.0.1:1234{address} -H 'content-type: application/json' \\\n    \
         -d '{body}'\n  {program} inspect {}\n  {program} train -c {} --set train.output_dir=my-run   # edit it for your own data\n",
        shell_word(&base.display().to_string()),
        paths.posterior.display(),
        report.posterior.draws,
        paths.data.join("test.jsonl").display(),
        paths.serve.display(),
        paths.adapter.display(),
        paths.run.display()
    ));
    text
}
