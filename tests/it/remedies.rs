//! Every remedy that names a command or a flag of ours is run: what a message advises must work.
//!
//! The test walks the texts in the sources. A text that advises a command or a flag and stands in no list here fails it, and so does
//! a line of a list that no text has any more.

mod adapters;
mod models;
mod paths;
mod source_texts;

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::cli::run;
use crate::fixtures::own;

/// How a remedy is known to work.
enum Proof {
    /// A scenario: it meets the message, and then does what it says.
    Run(fn()),
    /// A test elsewhere does the same: its file and name.
    By(&'static str, &'static str),
    /// It cannot be run here, for this reason.
    Not(&'static str),
}
use Proof::{By, Not, Run};

/// A part of a text in the sources that names only this one, and its proof.
type Remedy = (&'static str, Proof);

/// Remedies around training, serving and data, most of which have a test of their own.
const OTHERS: [Remedy; 69] = [
    (
        "the base that the adapter names cannot be opened; give the base with -m",
        By("tests/it/remedies/paths.rs", "one_file_is_replaced"),
    ),
    (
        "ask with --prompt",
        By(
            "tests/it/journey.rs",
            "flags_of_a_question_are_refused_for_rows",
        ),
    ),
    (
        "which run? Give -c run.toml (`monteclora init` writes one), or -m MODEL and --data FILE",
        By(
            "tests/it/journey.rs",
            "a_run_needs_a_model_and_data_and_its_adapter_names_the_base",
        ),
    ),
    (
        "merge it into its base: monteclora merge -m BASE -a ADAPTER -o DIR",
        By(
            "tests/it/methods.rs",
            "every_method_merges_and_collapses_as_it_says",
        ),
    ),
    (
        "merge it into its base (`monteclora merge`) and train on the result",
        By(
            "tests/it/methods.rs",
            "what_a_method_cannot_do_is_refused_by_name",
        ),
    ),
    (
        "trials are compared on validation rows, and there are none; set [data] valid, or give --data",
        By(
            "tests/it/tune.rs",
            "a_run_without_validation_rows_is_searched_with_data",
        ),
    ),
    (
        "is a model, not an adapter; give it with -m",
        By(
            "tests/it/journey.rs",
            "a_base_that_nobody_names_is_asked_for",
        ),
    ),
    (
        "`monteclora init -m MODEL --data FILE` writes a file with every section",
        By(
            "tests/it/journey.rs",
            "a_yaml_file_is_answered_with_the_way_to_a_toml_file",
        ),
    ),
    (
        "Measured on {rows} rows with `monteclora eval`",
        By(
            "tests/it/hub/push.rs",
            "an_adapter_is_published_with_its_card",
        ),
    ),
    (
        "$ monteclora chat -m {base} -a {name}",
        By(
            "tests/it/journey.rs",
            "a_conversation_goes_on_and_changes_its_adapter",
        ),
    ),
    (
        "--all lists every module",
        By(
            "src/commands/inspect.rs",
            "many_modules_of_one_kind_are_one_line",
        ),
    ),
    (
        "`monteclora push DIR REPO` publishes an adapter afterwards",
        By(
            "tests/it/hub/push.rs",
            "an_adapter_is_published_with_its_card",
        ),
    ),
    (
        "which base model? Give it with -m",
        By(
            "tests/it/journey.rs",
            "a_base_that_nobody_names_is_asked_for",
        ),
    ),
    (
        "names no base model; give it with -m",
        By(
            "tests/it/journey.rs",
            "a_base_that_nobody_names_is_asked_for",
        ),
    ),
    (
        "ask with that system message (--system",
        By(
            "tests/it/scoring.rs",
            "an_answer_that_is_cut_is_not_calibrated_and_not_given",
        ),
    ),
    (
        "--revision main takes the Hub's",
        By(
            "tests/it/hub.rs",
            "the_copy_of_quickstart_is_found_by_its_name",
        ),
    ),
    (
        "--resume auto starts it again",
        By(
            "tests/it/cli.rs",
            "a_run_records_its_configuration_and_is_not_written_over",
        ),
    ),
    (
        "Give another --output-dir, or --force to replace what is there",
        Not("quickstart's own model comes over the network"),
    ),
    (
        "All of it is in {}; --force begins anew",
        Not("quickstart's own model comes over the network"),
    ),
    (
        "`monteclora parity --chat -m BASE` shows where",
        By(
            "tests/it/runtime.rs",
            "conversations_are_compared_with_those_of_mistralrs_alone",
        ),
    ),
    (
        "and is not empty; choose another directory or pass --force",
        By(
            "tests/it/cli.rs",
            "an_adapter_that_changes_nothing_is_not_exported",
        ),
    ),
    (
        "choose another with -o or pass --force",
        By("tests/it/planning.rs", "init_writes_what_train_accepts"),
    ),
    (
        "next: monteclora train -c",
        By("tests/it/planning.rs", "init_writes_what_train_accepts"),
    ),
    (
        "# A MonteCLoRA run. Check it:",
        By("tests/it/planning.rs", "init_writes_what_train_accepts"),
    ),
    (
        "Pass --force to go on",
        By(
            "tests/it/formats.rs",
            "adapters_that_change_nothing_need_force",
        ),
    ),
    (
        "has nothing that scores answers; `monteclora serve` has",
        By("tests/it/scoring.rs", "scores_are_those_of_predict"),
    ),
    (
        "has no posterior; `monteclora fit` makes one around any LoRA",
        By(
            "tests/it/scoring/draws.rs",
            "draws_need_a_posterior_and_the_copy_of_the_base",
        ),
    ),
    (
        "make another with `monteclora calibrate`",
        By(
            "tests/it/scoring.rs",
            "calibrations_are_applied_and_swapped_with_their_adapter",
        ),
    ),
    (
        "`monteclora calibrate --target-error {asked}` looks for one",
        By(
            "tests/it/scoring.rs",
            "calibrations_are_applied_and_swapped_with_their_adapter",
        ),
    ),
    (
        "start the server with --force",
        Run(models::an_adapter_without_effect_is_served),
    ),
    (
        "say with --base which one is meant",
        By(
            "tests/it/scoring/deployment.rs",
            "the_base_is_to_be_named_where_only_some_are_scored",
        ),
    ),
    (
        "give another generation with --to",
        By(
            "tests/it/scoring/deployment.rs",
            "rollbacks_are_to_another_release_whatever_is_scored",
        ),
    ),
    (
        "`monteclora rollback` brings it back",
        By(
            "tests/it/operations/deployment.rs",
            "deploy_status_and_rollback_through_the_command",
        ),
    ),
    (
        "`monteclora status --adapter-root` lists them",
        By(
            "tests/it/operations/deployment.rs",
            "deploy_status_and_rollback_through_the_command",
        ),
    ),
    (
        "--adapter-root is the server's adapter root",
        By(
            "tests/it/operations/deployment.rs",
            "deploy_status_and_rollback_through_the_command",
        ),
    ),
    (
        "give the key with --key-file",
        By(
            "src/deploy/tests.rs",
            "wrong_keys_addresses_and_silent_ports_are_told_apart",
        ),
    ),
    (
        "give the administrator's with --key-file",
        By(
            "src/deploy/tests.rs",
            "wrong_keys_addresses_and_silent_ports_are_told_apart",
        ),
    ),
    (
        "look with `monteclora status`, and try again",
        By(
            "tests/it/operations/deployment.rs",
            "deploy_status_and_rollback_through_the_command",
        ),
    ),
    (
        "give the adapter another --alias",
        By(
            "src/deploy/tests.rs",
            "the_name_of_a_base_is_refused_before_anything_is_written",
        ),
    ),
    (
        "stop the other program, or choose another port with --port",
        By(
            "tests/it/operations.rs",
            "what_cannot_be_served_ends_with_a_reason_and_a_code",
        ),
    ),
    (
        "use it as it is; for posterior draws train",
        By("tests/it/cli.rs", "inspect_shows_the_posterior_of_a_run"),
    ),
    (
        "is intact; --resume auto continues from it",
        By(
            "tests/it/resume.rs",
            "a_full_disk_leaves_the_last_checkpoint",
        ),
    ),
    (
        "--set train.load_best_model_at_end=false",
        By(
            "tests/it/resume/output_dir.rs",
            "a_best_adapter_that_is_gone_is_made_again_or_missed",
        ),
    ),
    (
        "--force discards it",
        By(
            "tests/it/resume.rs",
            "what_changed_since_the_checkpoint_is_named",
        ),
    ),
    (
        "monteclora train -c {}",
        By(
            "tests/it/resume/output_dir.rs",
            "the_hint_after_an_interruption_repeats_the_overrides",
        ),
    ),
    (
        "is used (--revision {} takes the other)",
        By("tests/it/hub.rs", "a_branch_that_moves_is_noticed"),
    ),
    (
        "connect to the network, or give a local directory",
        By(
            "tests/it/hub.rs",
            "what_the_hub_refuses_is_said_with_the_remedy",
        ),
    ),
    (
        "give a local model with -m",
        Not("quickstart's own model comes over the network"),
    ),
    (
        "# What `monteclora quickstart` ran",
        Not("quickstart's own model comes over the network"),
    ),
    (
        "merge the adapter with `monteclora merge` and serve",
        Not("needs several graphics cards; merging is tested by itself"),
    ),
    ("start vLLM with --max-lora-rank", Not("vLLM's own flag")),
    ("build with `--features parquet`", Not("cargo's own flag")),
    (
        "--dry-run tells what to change",
        By(
            "tests/it/planning.rs",
            "a_dry_run_tells_what_training_then_does",
        ),
    ),
    (
        "give one with `--chat-template`",
        By(
            "adapters/mistralrs/src/fixture_tests/conversations.rs",
            "a_model_without_a_template_continues_texts_and_refuses_conversations",
        ),
    ),
    (
        "bench train needs --seq and --steps",
        By(
            "tests/it/planning.rs",
            "the_memory_estimate_is_near_the_peak",
        ),
    ),
    (
        "tokens are those of a model: give one with -m",
        Run(models::data_that_needs_a_model),
    ),
    (
        "checked without a model: give one with -m",
        Run(models::data_that_needs_a_model),
    ),
    (
        "`monteclora data check` lists all",
        By("tests/it/data.rs", "check_lists_every_bad_row"),
    ),
    (
        "`monteclora data check {}` says what to do",
        By(
            "tests/it/data.rs",
            "names_that_no_row_has_and_files_that_nothing_reads_are_said",
        ),
    ),
    (
        "start from its adapter with --set lora.init_from",
        Run(models::a_checkpoint_of_another_trainer),
    ),
    (
        "use `monteclora eval --posterior-samples` afterwards",
        Run(models::draws_are_evaluated_afterwards),
    ),
    (
        "parity compares in f32; use --dtype auto or f32",
        Run(models::parity_in_single_precision),
    ),
    (
        "make it again with `monteclora calibrate`, or remove it",
        By(
            "tests/it/certainty/calibrate.rs",
            "a_calibration_is_used_where_it_holds",
        ),
    ),
    (
        "it is not used there; `monteclora calibrate` makes another",
        By(
            "tests/it/certainty/calibrate.rs",
            "a_calibration_is_used_where_it_holds",
        ),
    ),
    (
        "give a directory; `monteclora convert --to lora` makes one",
        By(
            "tests/it/certainty/calibrate.rs",
            "what_cannot_be_calibrated_is_refused",
        ),
    ),
    (
        "find one with `monteclora calibrate -m {} -a {} --data ROWS{} --target-error {target}`",
        By(
            "tests/it/certainty/calibrate.rs",
            "answers_below_the_threshold_are_not_given",
        ),
    ),
    (
        "monteclora collapse ADAPTER -o DIR multiplies the singular values into A",
        By(
            "tests/it/methods.rs",
            "every_method_merges_and_collapses_as_it_says",
        ),
    ),
    (
        "`monteclora merge -m {base} -a {name} -o MERGED` writes a model for other programs",
        By(
            "tests/it/methods.rs",
            "every_method_merges_and_collapses_as_it_says",
        ),
    ),
    (
        "start from its mean, which `monteclora collapse` writes",
        By(
            "tests/it/certainty/evidence.rs",
            "an_evidence_bound_moves_the_posterior",
        ),
    ),
];

/// Every remedy that is known.
fn remedies() -> impl Iterator<Item = &'static Remedy> {
    OTHERS
        .iter()
        .chain(&adapters::REMEDIES)
        .chain(&paths::REMEDIES)
        .chain(&models::REMEDIES)
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_remedy_that_names_a_command_is_run() {
    let advice = source_texts::advice(&root());
    assert!(advice.len() > 20, "the walk finds no texts: {advice:?}");
    let mut unknown = Vec::new();
    for (file, text) in &advice {
        if !remedies().any(|(part, _)| text.contains(part)) {
            unknown.push(format!("{}: {text}", file.display()));
        }
    }
    assert!(
        unknown.is_empty(),
        "texts advise a command or a flag and no scenario runs it; add one to tests/it/remedies:\n{}",
        unknown.join("\n")
    );
    let mut met = BTreeSet::new();
    let mut failed = Vec::new();
    for (part, proof) in remedies() {
        assert!(
            advice.iter().any(|(_, text)| text.contains(part)),
            "no text advises \"{part}\" any more"
        );
        match proof {
            Run(scenario) => {
                if met.insert(*scenario as usize) && std::panic::catch_unwind(scenario).is_err() {
                    failed.push(*part);
                }
            }
            By(file, test) => {
                let text = std::fs::read_to_string(root().join(file)).unwrap();
                assert!(
                    text.contains(&format!("fn {test}(")),
                    "{file} has no test {test}"
                );
            }
            Not(why) => assert!(!why.is_empty()),
        }
    }
    assert!(
        failed.is_empty(),
        "scenarios of these remedies failed: {failed:#?}"
    );
}

/// Runs the program, which is to fail or to warn with these words.
fn told(arguments: &[&str], words: &str) {
    let told = run(arguments);
    assert!(told.stderr.contains(words), "{}", told.stderr);
}

fn data(name: &str) -> PathBuf {
    own().parent().unwrap().join(name)
}
