//! Ends the thread that an engine leaves behind. The thread's loop ends only by unwinding, and it calls other code in
//! one place: the throughput event, which it emits within five seconds after throughput was reported to it.

use std::sync::atomic::{AtomicBool, Ordering};

use mistralrs_core::MistralRs;
use tracing::Metadata;

/// Whether [`end_throughput_log`] sees every event.
static IS_WATCHED: AtomicBool = AtomicBool::new(false);

/// Records that the process has a tracing subscriber that passes every event to [`end_throughput_log`].
///
/// Call it only if the throughput log is not wanted: the log ends with its first line.
pub fn watch_throughput_logs() {
    IS_WATCHED.store(true, Ordering::SeqCst);
}

/// Whether `metadata` belongs to the throughput event of an engine.
pub fn is_throughput_log(metadata: &Metadata<'_>) -> bool {
    metadata.is_event() && metadata.target() == "mistralrs_core::engine::logger"
}

/// Ends the calling thread if `metadata` shows that it writes the throughput log; otherwise does nothing.
///
/// It unwinds without a message. Call it where a subscriber is asked whether an event is enabled, before it takes any
/// lock.
pub fn end_throughput_log(metadata: &Metadata<'_>) {
    if is_throughput_log(metadata) {
        std::panic::resume_unwind(Box::new("an engine's log has ended"));
    }
}

/// Ends the throughput log thread of the single engine of `host`, if a subscriber watches the events.
pub(crate) fn end_log_of(host: &MistralRs) {
    if !IS_WATCHED.load(Ordering::SeqCst) {
        return;
    }
    if let Ok(log) = host.get_logger(None) {
        log.add_new_sequence();
        log.add_tokens_processed(1);
        log.enable_logging();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use mistralrs_core::IntervalLogger;
    use tracing::span;

    use super::*;

    /// A subscriber that only ends throughput logs.
    struct Watcher;

    impl tracing::Subscriber for Watcher {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            end_throughput_log(metadata);
            false
        }
        fn register_callsite(
            &self,
            _: &'static Metadata<'static>,
        ) -> tracing::subscriber::Interest {
            tracing::subscriber::Interest::sometimes()
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {}
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    /// Other tests of this process need no subscriber, so one subscriber serves all threads.
    #[test]
    fn a_thread_that_logs_throughput_ends_at_its_first_line() {
        tracing::subscriber::set_global_default(Watcher).expect("the only one");
        let counted = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let held = (counted.clone(), counted.clone());
        let log = IntervalLogger::new(Duration::from_millis(5), Some(held));
        // The thread holds one clone of each, the log the others.
        let with_thread = Arc::strong_count(&counted);
        log.add_new_sequence();
        log.add_tokens_processed(1);
        log.enable_logging();
        let begun = Instant::now();
        while Arc::strong_count(&counted) == with_thread {
            assert!(begun.elapsed() < Duration::from_secs(20), "it goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(Arc::strong_count(&counted), with_thread - 2);
    }
}
