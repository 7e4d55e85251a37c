//! Logs to standard error: lines for people, or one JSON object per line for programs.

use std::fmt;
use std::io::IsTerminal;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
#[cfg(feature = "mistralrs")]
use {
    tracing::Metadata,
    tracing::level_filters::LevelFilter,
    tracing::subscriber::Interest,
    tracing_subscriber::Layer,
    tracing_subscriber::layer::{Context, SubscriberExt},
};

use crate::cli::LogFormat;
use crate::distributed::world;

/// Starts logging; of several ranks, the first logs more than errors. `verbose` is the number of `-v`; `RUST_LOG` overrides it. On a terminal, lines have the time of day
/// only if `has_clock`.
pub fn init(verbose: u8, format: LogFormat, has_clock: bool) {
    let default = match verbose {
        0 => "warn,monteclora=info,mistralrs_monteclora=info",
        1 => "info,monteclora=debug",
        _ => "debug",
    };
    let filter = match world().is_first() {
        true => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default)),
        // The others would say the same.
        false => EnvFilter::new("error"),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Internal errors are reported by a macro that panics if standard error is closed.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text if std::io::stderr().is_terminal() => {
            watched(builder.event_format(Sentences { has_clock }).finish());
        }
        LogFormat::Text => watched(builder.with_target(false).with_ansi(false).finish()),
        LogFormat::Json => watched(builder.event_format(JsonLines).finish()),
    }
}

#[cfg(not(feature = "mistralrs"))]
fn watched(subscriber: impl SubscriberInitExt) {
    subscriber.init();
}

/// Installs `subscriber` for the process, with a layer that ends the threads that engines left behind.
#[cfg(feature = "mistralrs")]
fn watched<S>(subscriber: S)
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync + 'static,
{
    mistralrs_monteclora::watch_throughput_logs();
    subscriber.with(EndsThreads).init();
}

#[cfg(feature = "mistralrs")]
struct EndsThreads;

#[cfg(feature = "mistralrs")]
impl<S: Subscriber> Layer<S> for EndsThreads {
    /// Makes the throughput event reach `enabled`, whatever the log filter says.
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match mistralrs_monteclora::is_throughput_log(metadata) {
            true => Interest::sometimes(),
            false => Interest::always(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        mistralrs_monteclora::end_throughput_log(metadata);
        true
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::INFO)
    }
}

/// Format for a terminal: the message, after `warning: ` or `error: ` if it is one. Lines break only between words.
struct Sentences {
    has_clock: bool,
}

impl<S, N> FormatEvent<S, N> for Sentences
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut text = String::new();
        if self.has_clock {
            let now = chrono::DateTime::<chrono::Utc>::from(std::time::SystemTime::now());
            text.push_str(&now.format("%H:%M:%S ").to_string());
        }
        text.push_str(match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        });
        context.format_fields(Writer::new(&mut text), event)?;
        let columns = usize::from(console::Term::stderr().size().1).max(40);
        writeln!(writer, "{}", wrapped(&text, columns))
    }
}

/// Wraps a text into lines of at most `columns`, between words. Lines after the first are indented.
pub fn wrapped(text: &str, columns: usize) -> String {
    let options = textwrap::Options::new(columns)
        .subsequent_indent("  ")
        .break_words(false)
        .word_splitter(textwrap::WordSplitter::NoHyphenation)
        .word_separator(textwrap::WordSeparator::AsciiSpace);
    textwrap::fill(text, options)
}

/// Format for programs: `{"timestamp", "level", "target", "message", ...fields}`, one object per line.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let mut fields = Fields(Map::new());
        fields.put("timestamp", timestamp);
        fields.put("level", event.metadata().level().as_str());
        fields.put("target", event.metadata().target());
        event.record(&mut fields);
        writeln!(writer, "{}", Value::Object(fields.0))
    }
}

struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field.name(), value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        match u64::try_from(value) {
            Ok(value) => self.put(field.name(), value),
            Err(_) => self.put(field.name(), value.to_string()),
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field.name(), value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field.name(), format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn no_word_is_broken() {
        let text = "the adapter in /a/very/long/path/that/does/not/fit.safetensors has changed";
        let lines = wrapped(text, 30);
        assert_eq!(lines.split_whitespace().collect::<Vec<_>>().join(" "), text);
        for line in lines.lines() {
            assert!(
                line.len() <= 30 || line.trim().split(' ').count() == 1,
                "{line}"
            );
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_json_object_with_its_fields() {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(JsonLines)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let model: Option<&str> = None;
            tracing::info!(
                status = 200,
                took = 3u128,
                route = "/v1\n\"x\"",
                model,
                ok = true,
                "a line"
            );
            tracing::warn!("another");
        });
        let bytes = sink.0.lock().expect("no panic").clone();
        let text = String::from_utf8(bytes).expect("UTF-8");
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["message"], "a line");
        assert_eq!(
            (&lines[0]["status"], &lines[0]["took"]),
            (&Value::from(200), &Value::from(3))
        );
        assert_eq!(lines[0]["route"], "/v1\n\"x\"");
        assert_eq!(lines[0]["ok"], true);
        assert_eq!(lines[0]["level"], "INFO");
        assert!(lines[0].get("model").is_none());
        assert!(
            lines[0]["timestamp"]
                .as_str()
                .is_some_and(|time| time.ends_with('Z'))
        );
        assert_eq!(lines[1]["level"], "WARN");
    }
}
