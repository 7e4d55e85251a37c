//! What `/metrics` shows, in the OpenMetrics text form that Prometheus reads.

use std::sync::Mutex;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry as MetricRegistry;

use super::registry::Resident;

/// Media type of the text.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bounds of the buckets of both histograms, seconds: from a cached short prompt to a long answer on a CPU.
const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    /// Public name of a model that is served, so that clients cannot make up labels.
    model: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GenerationLabels {
    name: String,
    parent: String,
    generation: String,
}

type Seconds = Family<ModelLabels, Histogram, fn() -> Histogram>;

/// Counters and gauges of one server.
pub(crate) struct Metrics {
    exposition: Mutex<MetricRegistry>,
    requests: Family<RequestLabels, Counter>,
    prompt_tokens: Family<ModelLabels, Counter>,
    completion_tokens: Family<ModelLabels, Counter>,
    answers: Family<OutcomeLabels, Counter>,
    duration: Seconds,
    time_to_first_token: Seconds,
    in_flight: Gauge,
    waiting: Gauge,
    connections: Gauge,
    loads: Family<OutcomeLabels, Counter>,
    reloads: Family<OutcomeLabels, Counter>,
    models: Gauge,
    adapters: Gauge,
    generations: Gauge,
    weight_bytes: Gauge,
    served: Family<GenerationLabels, Gauge>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(SECONDS);
        let mut metrics = Self {
            exposition: Mutex::new(MetricRegistry::with_prefix("monteclora")),
            requests: Family::default(),
            prompt_tokens: Family::default(),
            completion_tokens: Family::default(),
            answers: Family::default(),
            duration: Family::new_with_constructor(histogram),
            time_to_first_token: Family::new_with_constructor(histogram),
            in_flight: Gauge::default(),
            waiting: Gauge::default(),
            connections: Gauge::default(),
            loads: Family::default(),
            reloads: Family::default(),
            models: Gauge::default(),
            adapters: Gauge::default(),
            generations: Gauge::default(),
            weight_bytes: Gauge::default(),
            served: Family::default(),
        };
        let to = metrics
            .exposition
            .get_mut()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        to.register(
            "requests",
            "Requests by route, model and status",
            metrics.requests.clone(),
        );
        to.register(
            "prompt_tokens",
            "Tokens of prompts",
            metrics.prompt_tokens.clone(),
        );
        to.register(
            "completion_tokens",
            "Tokens generated",
            metrics.completion_tokens.clone(),
        );
        to.register(
            "answers",
            "Answers by how they ended: finished, canceled (the client left), timeout, failed",
            metrics.answers.clone(),
        );
        to.register(
            "request_duration_seconds",
            "From the request to the last token",
            metrics.duration.clone(),
        );
        to.register(
            "time_to_first_token_seconds",
            "From the request to the first token",
            metrics.time_to_first_token.clone(),
        );
        to.register(
            "requests_in_flight",
            "Inference requests being worked on or queued",
            metrics.in_flight.clone(),
        );
        to.register(
            "requests_waiting",
            "Those of them without a first token yet",
            metrics.waiting.clone(),
        );
        to.register(
            "connections",
            "Open connections",
            metrics.connections.clone(),
        );
        to.register(
            "adapter_loads",
            "Adapters loaded at run time, by outcome",
            metrics.loads.clone(),
        );
        to.register(
            "reloads",
            "Configurations re-read, by outcome",
            metrics.reloads.clone(),
        );
        to.register("models", "Base models served", metrics.models.clone());
        to.register("adapters", "Adapters served", metrics.adapters.clone());
        to.register(
            "resident_generations",
            "Models in memory, those that only finish their last requests included",
            metrics.generations.clone(),
        );
        to.register(
            "resident_weight_bytes",
            "Their weights, estimated",
            metrics.weight_bytes.clone(),
        );
        to.register(
            "generation",
            "What each name serves; always 1",
            metrics.served.clone(),
        );
        metrics
    }

    /// Counts a request that has its status. `model` is the name of one that is served, or empty.
    pub(crate) fn request(&self, route: &str, model: &str, status: u16) {
        let labels = RequestLabels {
            route: route.to_owned(),
            model: model.to_owned(),
            status,
        };
        self.requests.get_or_create(&labels).inc();
    }

    /// Counts an answer that has ended.
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
        self.duration
            .get_or_create(&labels)
            .observe(answer.duration.as_secs_f64());
        if let Some(time) = answer.time_to_first_token {
            self.time_to_first_token
                .get_or_create(&labels)
                .observe(time.as_secs_f64());
        }
        let outcome = OutcomeLabels {
            outcome: answer.outcome,
        };
        self.answers.get_or_create(&outcome).inc();
    }

    /// Counts an attempt to load an adapter.
    pub(crate) fn load(&self, outcome: &'static str) {
        self.loads.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// Counts a configuration that was read again.
    pub(crate) fn reload(&self, outcome: &'static str) {
        self.reloads.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// Counts a connection while the result is held.
    pub(crate) fn connection(&self) -> Counted {
        Counted::new(&self.connections)
    }

    /// Counts an inference request while the result is held.
    pub(crate) fn in_flight(&self) -> Counted {
        Counted::new(&self.in_flight)
    }

    /// Counts an inference request without a token while the result is held.
    pub(crate) fn waiting(&self) -> Counted {
        Counted::new(&self.waiting)
    }

    /// The whole text, with what `resident` says about models.
    ///
    /// # Errors
    /// None in practice: writing to a text cannot fail.
    pub(crate) fn render(&self, resident: &Resident) -> Result<String, std::fmt::Error> {
        // Held throughout, so that two scrapes do not mix.
        let exposition = self
            .exposition
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let adapters = resident
            .served
            .iter()
            .filter(|lease| lease.parent.is_some())
            .count();
        self.adapters.set(number(adapters));
        self.models.set(number(resident.served.len() - adapters));
        self.generations.set(number(resident.n_generations));
        self.weight_bytes
            .set(i64::try_from(resident.weight_bytes).unwrap_or(i64::MAX));
        self.served.clear();
        for lease in &resident.served {
            let labels = GenerationLabels {
                name: lease.name.clone(),
                parent: lease.parent.clone().unwrap_or_default(),
                generation: lease.hash.clone(),
            };
            self.served.get_or_create(&labels).set(1);
        }
        let mut text = String::new();
        encode(&mut text, &exposition)?;
        Ok(text)
    }
}

/// One answer, when it has ended.
#[derive(Debug)]
pub(crate) struct AnswerRecord {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) duration: Duration,
    pub(crate) time_to_first_token: Option<Duration>,
    pub(crate) outcome: &'static str,
}

/// Adds one to a gauge for as long as it lives.
pub(crate) struct Counted(Gauge);

impl Counted {
    fn new(gauge: &Gauge) -> Self {
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
        metrics.load("refused");
        let counted = metrics.in_flight();
        let resident = Resident {
            served: Vec::new(),
            n_generations: 2,
            weight_bytes: 1 << 30,
        };
        let text = metrics.render(&resident).expect("text");
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
            "monteclora_resident_generations 2",
            "monteclora_resident_weight_bytes 1073741824",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        drop(counted);
        let text = metrics.render(&resident).expect("text");
        assert!(text.contains("monteclora_requests_in_flight 0\n"));
    }
}
