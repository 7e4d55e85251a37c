//! The values that the template of a run's page gets.

use minijinja::{Value as Text, context};
use monteclora_adapters::methods::{self, METHODS, Metric};
use serde::Serialize;
use serde_json::Value;

use super::RunFiles;
use super::chart::{Chart, Series, number};
use super::history::History;
use super::sites::{self, Shown};

/// Largest number of rows in the evaluation table, besides that of the best evaluation.
const MAX_EVALUATIONS: usize = 40;

#[derive(Serialize)]
struct Figure {
    title: &'static str,
    note: String,
    legend: Vec<Legend>,
    svg: Text,
}

#[derive(Serialize)]
struct Legend {
    name: &'static str,
    colour: u8,
    last: String,
}

#[derive(Serialize)]
struct Card {
    label: &'static str,
    value: String,
    note: String,
}

#[derive(Serialize)]
struct Section {
    name: String,
    entries: Vec<(String, String)>,
}

/// The values for the template of a run's page.
pub(super) fn values(run: &RunFiles) -> Text {
    let history = &run.history;
    let config = &run.record["config"];
    let (evaluations, n_left_out) = evaluations(history);
    let adapter = run.adapter.as_ref().map(|(place, summary)| {
        let shown = Shown::of(&summary.sites);
        context! {
            place => place.display().to_string(),
            noise => shown == Shown::NoiseToSignal,
            grid => Text::from_safe_string(sites::grid(&summary.sites, shown)),
            range => range(summary.sites.iter().map(|site| shown.value(site))),
            sites => summary.sites.iter().map(|site| context! {
                name => site.name,
                r => site.r,
                norm_a => number(site.norm_a),
                norm_b => number(site.norm_b),
                norm_delta => number(site.norm_delta),
                noise => site.noise_to_signal.map(number),
                components => site.effective_components.map(number),
            }).collect::<Vec<_>>(),
            problems => summary.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }
    });
    let events: Vec<_> = history
        .events
        .iter()
        .filter(|event| event.event != "checkpoint" && event.event != "best")
        .map(|event| context! { name => event.event.replace('_', " "), step => event.step, at => event.wall_s.map(duration) })
        .collect();
    let n_checkpoints = history
        .events
        .iter()
        .filter(|event| event.event == "checkpoint")
        .count();
    context! {
        title => title(run),
        name => run.name,
        date => run.date,
        scores => scores(&run.scores),
        answers => answers(&run.answers),
        method => plain(&config["lora"]["method"]),
        status => history.status(),
        cards => cards(run),
        figures => figures(history),
        n_unreadable => history.n_unreadable,
        evaluations,
        n_left_out,
        adapter,
        adapter_problem => run.adapter_problem,
        events,
        n_checkpoints,
        config => sections(config),
        provenance => provenance(&run.record),
    }
}

fn title(run: &RunFiles) -> String {
    let id = run.record["base"]["model_id"]
        .as_str()
        .unwrap_or("Training run");
    // The last part of a path says most.
    id.rsplit('/')
        .find(|part| !part.is_empty())
        .unwrap_or(id)
        .to_owned()
}

fn cards(run: &RunFiles) -> Vec<Card> {
    let (record, history) = (&run.record, &run.history);
    let last = history.train.last();
    let latest = |key| last.and_then(|p| p.get(key));
    let all = |key| history.train.iter().filter_map(move |p| p.get(key));
    let count = |n: f64| grouped(n as u64);
    let best = history.best();
    let sites = record["sites"].as_array();
    let mut speeds: Vec<f64> = all("tokens_per_second").collect();
    speeds.sort_by(f64::total_cmp);
    let speed = speeds.get(speeds.len() / 2).copied().map(number);
    let peak = all("peak_memory_bytes").reduce(f64::max);
    let said = |note: &str| Some(note.to_owned());
    let cards = [
        (
            "steps",
            last.map(|p| p.step.to_string()),
            record["total_steps"].as_u64().map(|n| format!("of {n}")),
        ),
        (
            "training loss",
            latest("task_loss").map(number),
            said("task only, last report"),
        ),
        (
            "best validation loss",
            best.and_then(|p| p.get("loss")).map(number),
            best.map(|p| format!("at step {}", p.step)),
        ),
        (
            "trainable parameters",
            record["trainable_parameters"].as_u64().map(grouped),
            sites.map(|sites| format!("at {} sites", sites.len())),
        ),
        (
            "tokens",
            latest("tokens").map(count),
            latest("trained_tokens").map(|n| format!("{} with a loss", count(n))),
        ),
        ("tokens per second", speed, said("median")),
        (
            "peak memory",
            peak.map(|bytes| format!("{:.2} GB", bytes / 1e9)),
            said("resident"),
        ),
        ("time", latest("wall_s").map(duration), None),
    ];
    let shown = cards.into_iter().filter_map(|(label, value, note)| {
        Some(Card {
            label,
            value: value?,
            note: note.unwrap_or_default(),
        })
    });
    shown.collect()
}

/// The metrics that the methods report in a chart, each once, in the order of their colours.
fn metrics(chart: methods::Chart) -> Vec<&'static Metric> {
    let all = METHODS.iter().flat_map(|kind| kind.metrics);
    let mut found: Vec<_> = all.filter(|metric| metric.chart == chart).collect();
    found.sort_by_key(|metric| (metric.colour, metric.key));
    found.dedup_by_key(|metric| metric.key);
    found
}

fn figures(history: &History) -> Vec<Figure> {
    let line = |name, colour, key: &str| Series {
        name,
        colour,
        // A line of one point would be invisible.
        marked: history.train.len() <= 2,
        points: history.train.iter().map(|p| (p.step, p.get(key))).collect(),
    };
    let reported = |chart| {
        let metrics = metrics(chart).into_iter();
        metrics.map(|m| line(m.label, m.colour, m.key)).collect()
    };
    let valid = Series {
        name: "validation",
        colour: 2,
        marked: history.eval.len() <= 60,
        points: history
            .eval
            .iter()
            .map(|p| (p.step, p.get("loss")))
            .collect(),
    };
    let loss = vec![line("training", 1, "task_loss"), valid];
    let is_wide = spans_decades(&loss);
    let charts: [(&str, &str, bool, Vec<Series>); 8] = [
        (
            "Loss",
            "Negative log-likelihood per trained token, in nats. If the validation loss rises while the training loss falls, the run overfits.",
            is_wide,
            loss,
        ),
        (
            "Divergences",
            "How far the posterior is from its prior, in nats: the mean over the sites, before the weight. Values of hundreds or thousands are usual, since the weight is small. A flat line means that the posterior has settled.",
            true,
            reported(methods::Chart::Divergences),
        ),
        (
            "Regulariser",
            "What the divergences add to the loss after the weight, in nats. If this is larger than the loss of the task, the prior decides more than the rows.",
            true,
            reported(methods::Chart::Regulariser),
        ),
        (
            "Posterior",
            "The noise on A: the mean over the sites. A line that rises shows a posterior that grows wider.",
            true,
            reported(methods::Chart::Posterior),
        ),
        (
            "Rank",
            "Rank per module: the mean number of singular values that are not pruned.",
            true,
            reported(methods::Chart::Rank),
        ),
        (
            "Learning rate",
            "Of A and B. It rises during the warm-up and falls afterwards.",
            false,
            vec![line("learning rate", 5, "learning_rate")],
        ),
        (
            "Gradient norm",
            "Of all parameters, before clipping. Single peaks are usual; a line that keeps rising asks for a lower learning rate.",
            true,
            vec![line("gradient norm", 3, "grad_norm")],
        ),
        (
            "Throughput",
            "Tokens per second. Dips are evaluations, checkpoints, or other work on the machine.",
            false,
            vec![line("tokens per second", 4, "tokens_per_second")],
        ),
    ];
    charts
        .into_iter()
        .filter_map(|(title, note, logarithmic, series)| {
            // Plain LoRA has no divergences, and some runs no validation.
            let series: Vec<Series> = series
                .into_iter()
                .filter(|s| {
                    s.points
                        .iter()
                        .any(|(_, v)| v.is_some_and(|v| !logarithmic || v > 0.0))
                })
                .collect();
            let legend = series
                .iter()
                .map(|s| Legend {
                    name: s.name,
                    colour: s.colour,
                    last: s
                        .points
                        .iter()
                        .rev()
                        .find_map(|(_, v)| *v)
                        .map_or(String::new(), number),
                })
                .collect();
            let chart = Chart {
                title,
                logarithmic,
                series,
            };
            let axis = if logarithmic {
                " Logarithmic axis."
            } else {
                ""
            };
            (!chart.is_empty()).then(|| Figure {
                title,
                note: format!("{note}{axis}"),
                legend,
                svg: Text::from_safe_string(chart.svg()),
            })
        })
        .collect()
}

/// Whether a logarithmic axis suits the values: all are above zero, and some are far larger, as the first steps of a
/// run often are.
fn spans_decades(series: &[Series]) -> bool {
    let values = series.iter().flat_map(|series| &series.points);
    let values = values.filter_map(|(_, value)| value.filter(|value| value.is_finite()));
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    low > 0.0 && high > 8.0 * low
}

/// The scores of `eval --json` as a table with one column per predictor.
fn scores(found: &Value) -> Option<Text> {
    const ROWS: [(&str, &str); 8] = [
        ("loss", "loss"),
        ("perplexity", "perplexity"),
        ("token_accuracy", "token accuracy"),
        ("accuracy", "accuracy"),
        ("nll", "NLL"),
        ("ece", "ECE"),
        ("brier", "Brier score"),
        ("auroc", "AUROC of errors"),
    ];
    const SCORED: [(&str, &str); 4] = [
        ("base", "base"),
        ("mean", "adapter"),
        ("posterior", "average of the draws"),
        ("ensemble", "ensemble"),
    ];
    let scored: Vec<_> = SCORED
        .iter()
        .filter(|(key, _)| found[key].is_object())
        .collect();
    let rows: Vec<Text> = ROWS
        .iter()
        .filter_map(|(key, name)| {
            let told = scored
                .iter()
                .map(|(of, _)| found[of][key].as_f64().map(number));
            let told: Vec<Option<String>> = told.collect();
            told.iter()
                .any(Option::is_some)
                .then(|| context! { name, told })
        })
        .collect();
    (!rows.is_empty()).then(|| {
        context! {
            heads => scored.iter().map(|(_, name)| *name).collect::<Vec<_>>(),
            data => found["data"].as_str(),
            n_rows => found["rows"].as_u64(),
            rows,
        }
    })
}

/// The first answers of `predict --data --json`.
fn answers(found: &Value) -> Vec<Text> {
    const SHOWN: usize = 5;
    let all = found["answers"].as_array().into_iter().flatten();
    all.take(SHOWN)
        .map(|answer| {
            let p = answer["p_correct"].as_f64();
            context! {
                question => answer["question"].as_str(),
                text => answer["text"].as_str().map(str::trim),
                p => p.map(|p| format!("{:.1} %", 100.0 * p)),
                calibrated => answer["calibrated"] == true,
                cut => answer["truncated"] == true,
            }
        })
        .collect()
}

/// The evaluations to show, always with the best one, and the number of those left out.
fn evaluations(history: &History) -> (Vec<Text>, usize) {
    let best = history.best().map(|p| p.step);
    let every = history.eval.len().div_ceil(MAX_EVALUATIONS).max(1);
    let last = history.eval.len().saturating_sub(1);
    let rows: Vec<Text> = history
        .eval
        .iter()
        .enumerate()
        .filter(|(idx, p)| (last - idx).is_multiple_of(every) || Some(p.step) == best)
        .map(|(_, p)| {
            context! {
                step => p.step,
                epoch => p.get("epoch").map(|v| format!("{v:.2}")),
                loss => p.get("loss").map(|v| format!("{v:.4}")),
                perplexity => p.get("perplexity").map(number),
                token_accuracy => p.get("token_accuracy").map(|v| format!("{v:.4}")),
                best => Some(p.step) == best,
            }
        })
        .collect();
    let n_left_out = history.eval.len() - rows.len();
    (rows, n_left_out)
}

/// The configuration's tables, with one line per value.
fn sections(config: &Value) -> Vec<Section> {
    let mut found = Vec::new();
    table("", config, &mut found);
    found.retain(|section| !section.entries.is_empty());
    found
}

fn table(name: &str, value: &Value, found: &mut Vec<Section>) {
    let (mut entries, mut nested) = (Vec::new(), Vec::new());
    for (key, value) in value.as_object().into_iter().flatten() {
        match value {
            Value::Null => {}
            Value::Array(inner) if inner.is_empty() => {}
            Value::Object(_) if name.is_empty() => nested.push((key.clone(), value)),
            Value::Object(_) => nested.push((format!("{name}.{key}"), value)),
            value => entries.push((key.clone(), plain(value))),
        }
    }
    found.push(Section {
        name: name.to_owned(),
        entries,
    });
    for (name, value) in nested {
        table(&name, value, found);
    }
}

fn provenance(record: &Value) -> Vec<(String, String)> {
    let mut entries = Vec::new();
    let mut entry = |name: &str, value: &Value| {
        if !value.is_null() {
            entries.push((name.to_owned(), plain(value)));
        }
    };
    entry("monteclora", &record["monteclora"]);
    for (key, name) in [
        ("model_id", "base"),
        ("revision", "base revision"),
        ("fingerprint", "base fingerprint"),
    ] {
        entry(name, &record["base"][key]);
    }
    for (set, name) in [("train", "training data"), ("valid", "validation data")] {
        for (key, of) in [
            ("path", ""),
            ("revision", ": revision"),
            ("sha256", ": SHA-256"),
            ("examples", ": examples"),
            ("tokens", ": tokens"),
            ("trained_tokens", ": trained tokens"),
        ] {
            entry(&format!("{name}{of}"), &record[set][key]);
        }
    }
    entry("chat template SHA-256", &record["chat_template_sha256"]);
    entry("tokenizer SHA-256", &record["tokenizer_sha256"]);
    entries
}

/// Formats a value as in TOML, but without quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Number(n) => match n.as_f64() {
            Some(value) if n.is_f64() => number(value),
            _ => n.to_string(),
        },
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Smallest and largest finite value.
fn range(values: impl Iterator<Item = f64>) -> Option<(String, String)> {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
            (low.min(v), high.max(v))
        });
    (low <= high).then(|| (number(low), number(high)))
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    let whole = seconds as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

/// Formats a number with thin spaces between thousands.
pub(super) fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (idx, digit) in digits.chars().enumerate() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_times_are_readable() {
        assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(grouped(999), "999");
        assert_eq!(duration(59.94), "59.9 s");
        assert_eq!(duration(3_725.0), "1 h 02 min");
    }

    #[test]
    fn nested_tables_become_sections() {
        let config = serde_json::json!({"seed": 1, "lora": {"r": 4, "none": null, "monteclora": {"kl": 1e-5}}});
        let found = sections(&config);
        let names: Vec<_> = found.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["", "lora", "lora.monteclora"]);
        assert_eq!(found[2].entries, [("kl".to_owned(), "1e-5".to_owned())]);
    }
}
