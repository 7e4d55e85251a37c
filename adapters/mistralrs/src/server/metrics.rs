//! The metrics of `/metrics`, in the OpenMetrics text format that Prometheus reads.

use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry as MetricRegistry;

use super::registry::Lease;

/// Media type of the text.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bucket bounds of the histograms, in seconds: from a cached short prompt to a long answer on a CPU.
const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    route: String,
    /// Public name of a served model only, so that clients cannot invent labels.
    model: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ModelLabels {
    model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct GenerationLabels {
    name: String,
    parent: String,
    generation: String,
}

type Seconds = Family<ModelLabels, Histogram, fn() -> Histogram>;

fn seconds() -> Seconds {
    Family::new_with_constructor(|| Histogram::new(SECONDS))
}

/// Declares [`Metrics`]: the name, type, first value and help of each metric, in the order shown.
macro_rules! metrics {
    ($($name:ident: $kind:ty = $new:expr, $help:literal;)*) => {
        /// Counters and gauges of one server.
        pub(crate) struct Metrics {
            exposition: Mutex<MetricRegistry>,
            $(pub(super) $name: $kind,)*
        }

        impl Metrics {
            pub(crate) fn new() -> Self {
                let mut exposition = MetricRegistry::with_prefix("monteclora");
                $(
                    let $name: $kind = $new;
                    exposition.register(stringify!($name), $help, $name.clone());
                )*
                Self {
                    exposition: Mutex::new(exposition),
                    $($name,)*
                }
            }
        }
    };
}

metrics! {
    requests: Family<RequestLabels, Counter> = Family::default(), "Requests by route, model and status";
    prompt_tokens: Family<ModelLabels, Counter> = Family::default(), "Tokens of prompts";
    completion_tokens: Family<ModelLabels, Counter> = Family::default(), "Tokens generated";
    answers: Family<OutcomeLabels, Counter> = Family::default(),
        "Answers by how they ended: finished, canceled (the client left), timeout, failed";
    scores: Family<OutcomeLabels, Counter> = Family::default(),
        "Scores by how they ended: finished, canceled (the client left), refused, timeout, failed";
    score_duration_seconds: Seconds = seconds(), "From the request to the score";
    request_duration_seconds: Seconds = seconds(), "From the request to the last token";
    time_to_first_token_seconds: Seconds = seconds(), "From the request to the first token";
    requests_in_flight: Gauge = Gauge::default(), "Inference requests being worked on or queued";
    requests_waiting: Gauge = Gauge::default(), "Those of them without a first token yet";
    connections: Gauge = Gauge::default(), "Open connections";
    adapter_loads: Family<OutcomeLabels, Counter> = Family::default(), "Adapters loaded at run time, by outcome";
    reloads: Family<OutcomeLabels, Counter> = Family::default(), "Configurations re-read, by outcome";
    models: Gauge = Gauge::default(), "Base models served";
    adapters: Gauge = Gauge::default(), "Adapters served";
    ended_engines: Gauge = Gauge::default(), "Models served whose engine has ended";
    resident_generations: Gauge = Gauge::default(),
        "Models in memory, those that only finish their last requests included";
    resident_weight_bytes: Gauge = Gauge::default(), "Their weights, estimated";
    generation: Family<GenerationLabels, Gauge> = Family::default(), "What each name serves; always 1";
}

impl Metrics {
    /// Counts a request whose status is known. `model` is the name of a served model, or empty.
    pub(crate) fn request(&self, route: &str, model: &str, status: u16) {
        let labels = RequestLabels {
            route: route.to_owned(),
            model: model.to_owned(),
            status,
        };
        self.requests.get_or_create(&labels).inc();
    }

    /// Counts a finished answer.
    pub(crate) fn answer(&self, model: &str, answer: &AnswerRecord) {
        let labels = ModelLabels {
            model: model.to_owned(),
        };
        let count = |tokens: usize| u64::try_from(tokens).unwrap_or(u64::MAX);
        self.prompt_tokens
            .get_or_create(&labels)
            .inc_by(count(answer.prompt_tokens));
        self.completion_tokens
            .get_or_create(&labels)
            .inc_by(count(answer.completion_tokens));
        self.request_duration_seconds
            .get_or_create(&labels)
            .observe(answer.duration.as_secs_f64());
        if let Some(time) = answer.time_to_first_token {
            self.time_to_first_token_seconds
                .get_or_create(&labels)
                .observe(time.as_secs_f64());
        }
        count_outcome(&self.answers, answer.outcome);
    }

    /// Counts a finished score.
    pub(crate) fn score(&self, model: &str, duration: Duration) {
        let labels = ModelLabels {
            model: model.to_owned(),
        };
        let seconds = self.score_duration_seconds.get_or_create(&labels);
        seconds.observe(duration.as_secs_f64());
    }

    /// Renders all metrics, including the numbers of served models, of generations in memory and of the bytes of their
    /// weights.
    ///
    /// # Errors
    /// Never returns an error in practice: writing to a string cannot fail.
    pub(crate) fn render(
        &self,
        served: &[Lease],
        (n_generations, weight_bytes): (usize, u64),
    ) -> Result<String, std::fmt::Error> {
        // Held throughout, so that two scrapes do not interleave.
        let exposition = self.exposition.lock();
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let adapters = served.iter().filter(|lease| lease.parent.is_some()).count();
        self.adapters.set(number(adapters));
        self.models.set(number(served.len() - adapters));
        let ended = served.iter().filter(|lease| lease.has_ended()).count();
        self.ended_engines.set(number(ended));
        self.resident_generations.set(number(n_generations));
        self.resident_weight_bytes
            .set(i64::try_from(weight_bytes).unwrap_or(i64::MAX));
        self.generation.clear();
        for lease in served {
            let labels = GenerationLabels {
                name: lease.name.clone(),
                parent: lease.parent.clone().unwrap_or_default(),
                generation: lease.hash.clone(),
            };
            self.generation.get_or_create(&labels).set(1);
        }
        let mut text = String::new();
        encode(&mut text, &exposition)?;
        Ok(text)
    }
}

/// Counts an event that ended with `outcome`.
pub(crate) fn count_outcome(ends: &Family<OutcomeLabels, Counter>, outcome: &'static str) {
    ends.get_or_create(&OutcomeLabels { outcome }).inc();
}

/// The record of a finished answer.
#[derive(Debug)]
pub(crate) struct AnswerRecord {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) duration: Duration,
    pub(crate) time_to_first_token: Option<Duration>,
    pub(crate) outcome: &'static str,
}

/// Increments a gauge while it lives.
pub(crate) struct Counted(Gauge);

impl Counted {
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_every_number_and_gauges_fall_again() {
        let metrics = Metrics::new();
        metrics.request("/v1/chat/completions", "triage", 200);
        metrics.request("/v1/chat/completions", "triage", 200);
        metrics.answer(
            "triage",
            &AnswerRecord {
                prompt_tokens: 7,
                completion_tokens: 3,
                duration: Duration::from_millis(30),
                time_to_first_token: Some(Duration::from_millis(6)),
                outcome: "finished",
            },
        );
        count_outcome(&metrics.adapter_loads, "refused");
        let counted = Counted::new(&metrics.requests_in_flight);
        let in_use = (2, 1 << 30);
        let text = metrics.render(&[], in_use).expect("text");
        for line in [
            "monteclora_requests_total{route=\"/v1/chat/completions\",model=\"triage\",status=\"200\"} 2",
            "monteclora_prompt_tokens_total{model=\"triage\"} 7",
            "monteclora_completion_tokens_total{model=\"triage\"} 3",
            "monteclora_request_duration_seconds_bucket{le=\"0.025\",model=\"triage\"} 0",
            "monteclora_request_duration_seconds_bucket{le=\"0.05\",model=\"triage\"} 1",
            "monteclora_time_to_first_token_seconds_count{model=\"triage\"} 1",
            "monteclora_answers_total{outcome=\"finished\"} 1",
            "monteclora_adapter_loads_total{outcome=\"refused\"} 1",
            "monteclora_requests_in_flight 1",
            "monteclora_ended_engines 0",
            "monteclora_resident_generations 2",
            "monteclora_resident_weight_bytes 1073741824",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        drop(counted);
        let text = metrics.render(&[], in_use).expect("text");
        assert!(text.contains("monteclora_requests_in_flight 0\n"));
    }
}
