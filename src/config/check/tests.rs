//! Defaults, presets, overrides, and every refusal word for word.

use monteclora_adapters::methods::monteclora::{Form, Objective};

use super::*;
use crate::{
    config::run::{DataFormat, DtypeChoice, LrSchedulerType, Report},
    data::{Overlong, TrainOn},
};

const LEAST: &str =
    "[model]\nmodel_id = \"m\"\n[data]\ntrain = \"t.jsonl\"\n[train]\noutput_dir = \"o\"\n";

/// The example of the documentation.
const WHOLE: &str = r#"
seed = 7
[model]
model_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
revision = "main"
dtype = "f32"
[data]
train = "train.jsonl"
valid = "valid.jsonl"
format = "auto"
apply_chat_template = true
train_on = "last_assistant"
max_seq_length = 512
overlong = "truncate"
packing = false
[lora]
method = "monteclora"
r = 8
lora_alpha = 16
lora_dropout = 0.0
target_modules = ["q_proj", "v_proj"]
exclude_modules = "model\\.layers\\.0\\..*"
layers_to_transform = [1, 2]
layers_pattern = "layers"
rank_pattern = { v_proj = 4, "layers.1.q_proj" = 2 }
alpha_pattern = { v_proj = 8.0 }
use_rslora = true
[lora.monteclora]
preset = "peft"
num_samples = 2
objective = "peft"
[train]
output_dir = "out"
max_steps = 10
per_device_train_batch_size = 2
gradient_accumulation_steps = 4
learning_rate = 1e-3
variational_learning_rate = 1e-2
lr_scheduler_type = "cosine"
warmup_ratio = 0.1
weight_decay = 0.01
max_grad_norm = 0
logging_steps = 1
eval_steps = 5
save_steps = 5
save_total_limit = 0
load_best_model_at_end = true
early_stopping_patience = 2
report_to = "jsonl"
[eval]
posterior_samples = 0
ece_bins = 10
"#;

fn read(text: &str, overrides: &[&str]) -> Result<RunConfig, Problems> {
    let overrides: Vec<String> = overrides.iter().map(|entry| (*entry).to_owned()).collect();
    RunConfig::from_toml(text, "run.toml", &overrides)
}

fn good(text: &str, overrides: &[&str]) -> RunConfig {
    read(text, overrides).unwrap_or_else(|error| panic!("{error}"))
}

fn problems(text: &str, overrides: &[&str]) -> Vec<String> {
    match read(text, overrides) {
        Err(problems) => problems.list.iter().map(Problem::to_string).collect(),
        other => panic!("expected problems, found {other:?}"),
    }
}

#[test]
fn three_keys_are_enough() {
    let config = good(LEAST, &[]);
    assert_eq!(config.seed, 42);
    assert_eq!(config.model.dtype, DtypeChoice("auto"));
    assert_eq!(
        config.data,
        DataConfig {
            train: "t.jsonl".into(),
            ..DataConfig::default()
        }
    );
    // Sections of other methods are left out.
    let own = LoraConfig {
        adalora: None,
        ssf: None,
        sara: None,
        second_order: None,
        ..LoraConfig::default()
    };
    assert_eq!(config.lora, own);
    // Without validation rows there is no best model.
    assert_eq!(
        config.train,
        TrainConfig {
            output_dir: "o".into(),
            load_best_model_at_end: false,
            ..TrainConfig::default()
        }
    );
    assert_eq!(config.eval, EvalConfig::default());
    assert!(
        good(LEAST, &["data.valid=v.jsonl"])
            .train
            .load_best_model_at_end
    );
}

#[test]
fn every_key_arrives() {
    let config = good(WHOLE, &[]);
    assert_eq!(config.seed, 7);
    assert_eq!(config.model.revision.as_deref(), Some("main"));
    assert_eq!(config.data.max_seq_length, Some(512));
    assert_eq!(
        (
            config.data.train_on,
            config.data.overlong,
            config.data.packing,
            config.data.format
        ),
        (
            TrainOn::LastAssistant,
            Overlong::Truncate,
            false,
            DataFormat::Auto
        )
    );
    let lora = &config.lora;
    assert_eq!((lora.r, lora.lora_alpha, lora.use_rslora), (8, 16.0, true));
    assert_eq!(
        lora.target_modules,
        ModuleSelection::Names(vec!["q_proj".into(), "v_proj".into()])
    );
    assert_eq!(
        lora.exclude_modules,
        Some(ModuleSelection::Regex(r"model\.layers\.0\..*".into()))
    );
    assert_eq!(lora.layers_to_transform, Some(vec![1, 2]));
    assert_eq!(lora.layers_pattern, ["layers"]);
    // The order of the file decides which pattern matches first.
    assert_eq!(
        lora.rank_pattern.keys().collect::<Vec<_>>(),
        ["v_proj", "layers.1.q_proj"]
    );
    assert_eq!(lora.alpha_pattern["v_proj"], 8.0);
    let train = &config.train;
    assert_eq!((train.num_train_epochs, train.max_steps), (None, Some(10)));
    assert_eq!(train.lr_scheduler_type, LrSchedulerType::Cosine);
    assert_eq!(
        (train.learning_rate, train.variational_learning_rate),
        (1e-3, 1e-2)
    );
    assert_eq!(
        (
            train.max_grad_norm,
            train.save_total_limit,
            train.early_stopping_patience
        ),
        (0.0, 0, 2)
    );
    assert_eq!(train.report_to, [Report::Jsonl]);
    assert_eq!(config.eval.ece_bins, 10);
}

#[test]
fn the_posterior_has_a_rate_of_its_own() {
    let rate = |overrides: &[&str]| good(LEAST, overrides).train.variational_learning_rate;
    assert_eq!(rate(&["train.learning_rate=1e-3"]), 1e-3 * 10.0);
    // PEFT has one rate for everything.
    let peft = ["train.learning_rate=1e-3", "lora.monteclora.preset=peft"];
    assert_eq!(rate(&peft), 1e-3);
    assert_eq!(rate(&["train.variational_learning_rate=3e-3"]), 3e-3);
}

#[test]
fn warm_up_is_a_share_or_a_number_of_steps() {
    let steps = good(LEAST, &["train.warmup_steps=7"]).train;
    assert_eq!((steps.warmup_steps, steps.warmup_ratio), (Some(7), 0.03));
    // The file says warmup_ratio; the command line wins.
    assert_eq!(
        good(WHOLE, &["train.warmup_steps=7"]).train.warmup_steps,
        Some(7)
    );
    assert_eq!(
        problems(LEAST, &["train.warmup_steps=7", "train.warmup_ratio=0.1"]),
        [
            "--set train.warmup_steps: [train] warmup_steps: cannot be given together with warmup_ratio; keep one of them"
        ]
    );
    assert_eq!(
        problems(LEAST, &["lora.monteclora.kl_warmup_ratio=2"]),
        [
            "--set lora.monteclora.kl_warmup_ratio: [lora.monteclora] kl_warmup_ratio: found 2, expected a number from 0 to 1"
        ]
    );
}

#[test]
fn what_rests_on_validation_rows_is_said_without_them() {
    let asked = [
        "train.early_stopping_patience=2",
        "train.load_best_model_at_end=true",
    ];
    let config = good(LEAST, &asked);
    assert_eq!(config.train.early_stopping_patience, 0);
    assert_eq!(
        config.notes,
        [
            "[train] load_best_model_at_end has no effect without validation rows; give data.valid",
            "[train] early_stopping_patience has no effect without validation rows; give data.valid"
        ]
    );
    assert!(good(WHOLE, &[]).notes.is_empty() && good(LEAST, &[]).notes.is_empty());
}

#[test]
fn presets_give_way_to_explicit_keys() {
    let config = good(WHOLE, &[])
        .lora
        .monteclora
        .expect("the method's section");
    assert_eq!(
        config,
        MonteCloraConfig {
            preset: Preset::Peft,
            objective: Objective::Peft,
            prior_std: 0.2,
            temperature: 1.0,
            num_samples: 2,
            sample_scaler: 1e-4,
            kl_loss_weight: 1e-5,
            dirichlet_prior: 0.1,
            use_entropy: false,
            kl_warmup_ratio: 0.0,
            form: Form::Collapsed,
        }
    );
    let paper = MonteCloraConfig::preset(Preset::Paper);
    assert_eq!(
        (
            paper.num_samples,
            paper.sample_scaler,
            paper.dirichlet_prior,
            paper.use_entropy
        ),
        (4, 5e-3, 1.0, true)
    );
    assert_eq!(
        MonteCloraConfig {
            preset: Preset::Paper,
            ..MonteCloraConfig::default()
        },
        paper
    );
    assert_eq!(good(WHOLE, &["lora.method=lora"]).lora.monteclora, None);
}

#[test]
fn overrides_beat_the_file() {
    let config = good(
        WHOLE,
        &[
            "seed=1",
            "lora.r=4",
            "lora.target_modules=all-linear",
            "train.output_dir=runs/a b",
            "train.learning_rate = 2e-4",
            "lora.monteclora.use_entropy=true",
            "lora.rank_pattern={}",
            "train.num_train_epochs=2",
        ],
    );
    assert_eq!((config.seed, config.lora.r), (1, 4));
    assert_eq!(config.lora.target_modules, ModuleSelection::AllLinear);
    assert_eq!(config.train.output_dir, Path::new("runs/a b"));
    assert_eq!(config.train.learning_rate, 2e-4);
    assert!(config.lora.monteclora.expect("section").use_entropy);
    assert!(config.lora.rank_pattern.is_empty());
    // The file says max_steps; the command line wins.
    let train = &config.train;
    assert_eq!((train.num_train_epochs, train.max_steps), (Some(2.0), None));
    assert_eq!(
        good(
            "",
            &["model.model_id=m", "data.train=t", "train.output_dir=o"]
        )
        .model
        .model_id,
        "m"
    );
}

#[test]
fn bad_overrides_are_refused() {
    assert_eq!(
        problems(
            LEAST,
            &[
                "lora.r",
                "lora.lora_alfa=3",
                "lora.r=0",
                "lora.use_rslora=maybe"
            ]
        ),
        [
            "--set lora.r: has no value; write --set key.path=value",
            "--set lora.lora_alfa: [lora] unknown key `lora_alfa`; did you mean `lora_alpha`?",
            "--set lora.use_rslora: [lora] use_rslora: invalid type: string \"maybe\", expected a boolean",
            "--set lora.r: [lora] r: found 0, expected at least 1",
        ]
    );
    assert_eq!(
        problems(
            LEAST,
            &["lora.r=9223372036854775807", "train.num_train_epochs=1e300"]
        )
        .iter()
        .filter(|problem| problem.contains("expected at most"))
        .count(),
        2
    );
    assert_eq!(
        problems(&format!("seed = 3\n{LEAST}"), &["seed.x=1"]),
        ["--set seed.x: `seed` is not a table"]
    );
}

#[test]
fn unknown_keys_are_named_with_line_and_suggestion() {
    let text = "sed = 1\n[model]\nmodel_id = \"m\"\nlearning_rate = 1.0\n[data]\ntrain = \"t\"\n[lora]\nlora_alfa = 3\nzzz = 1\n\
                [lora.monteclora]\nn_samples = 3\n[trian]\noutput_dir = \"o\"\n";
    assert_eq!(
        problems(text, &[]),
        [
            "run.toml:1: unknown key `sed`; did you mean `seed`?",
            "run.toml:4: [model] unknown key `learning_rate`; it belongs in [train]",
            "run.toml:8: [lora] unknown key `lora_alfa`; did you mean `lora_alpha`?",
            "run.toml:9: [lora] unknown key `zzz`; known keys: method, init_from, r, lora_alpha, lora_dropout, target_modules, \
             exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, use_rslora, monteclora, adalora, ssf, sara, second_order",
            "run.toml:11: [lora.monteclora] unknown key `n_samples`; did you mean `num_samples`?",
            "run.toml:12: unknown key `trian`; did you mean [train]?",
            "run.toml: [train] output_dir: is missing; give the directory to write the adapter to",
        ]
    );
}

#[test]
fn wrong_types_are_all_reported() {
    let text = "seed = -1\nmodel = 3\n[data]\ntrain = 5\nformat = \"csv\"\n[lora]\nr = \"16\"\ntarget_modules = 3\n[train]\noutput_dir = \"o\"\n";
    let found = problems(text, &[]);
    for expected in [
        "run.toml:1: seed: invalid value: integer `-1`, expected a whole number, 0 or more",
        "run.toml:2: model: found integer, expected a table",
        "run.toml:4: [data] train: invalid type: integer `5`, expected path string",
        "run.toml:5: [data] format: unknown variant `csv`, expected one of `auto`, `messages`, `prompt_completion`, `alpaca`, `sharegpt`, `text`",
        "run.toml:7: [lora] r: invalid type: string \"16\", expected a whole number, 0 or more",
        "run.toml:8: [lora] target_modules: expected one value or a list of them",
    ] {
        assert!(
            found.iter().any(|problem| problem == expected),
            "{expected}\n{found:#?}"
        );
    }
}

#[test]
fn every_value_out_of_range_is_reported_at_once() {
    let overrides = [
        "data.max_seq_length=1",
        "lora.r=0",
        "lora.lora_alpha=nan",
        "lora.lora_dropout=-0.1",
        "lora.target_modules=[]",
        "lora.exclude_modules=all-linear",
        "lora.rank_pattern={a = 0}",
        "lora.alpha_pattern={a = -1.0}",
        "lora.layers_pattern=h",
        "lora.monteclora.num_samples=0",
        "lora.monteclora.sample_scaler=0.0",
        "lora.monteclora.kl_loss_weight=-1e-5",
        "lora.monteclora.dirichlet_prior=inf",
        "train.num_train_epochs=0.0",
        "train.per_device_train_batch_size=0",
        "train.gradient_accumulation_steps=0",
        "train.learning_rate=nan",
        "train.variational_learning_rate=-1",
        "train.warmup_ratio=1.5",
        "train.weight_decay=nan",
        "train.adam_beta1=1.0",
        "train.adam_beta2=-0.1",
        "train.adam_epsilon=0.0",
        "train.max_grad_norm=-1.0",
        "train.logging_steps=0",
        "train.eval_steps=0",
        "train.save_steps=0",
        "eval.ece_bins=0",
        "data.valid=",
    ];
    let found = problems(LEAST, &overrides);
    for entry in overrides {
        let path = entry.split('=').next().expect("a path");
        let place = format!("--set {path}: ");
        assert_eq!(
            found
                .iter()
                .filter(|problem| problem.starts_with(&place))
                .count(),
            1,
            "{path}\n{found:#?}"
        );
    }
    assert_eq!(found.len(), overrides.len(), "{found:#?}");
    assert!(found.contains(&"--set lora.lora_alpha: [lora] lora_alpha: found NaN, expected a finite number above 0".to_owned()));
    let text = read(LEAST, &overrides).expect_err("refused").to_string();
    assert!(text.ends_with("\nand 9 more"), "{text}");
}

#[test]
fn what_is_required_and_what_excludes_each_other() {
    assert_eq!(
        problems(
            "[train]\nnum_train_epochs = 1\nmax_steps = 5\n",
            &["lora.target_modules=.*q_proj", "lora.layers_to_transform=1"]
        ),
        [
            "run.toml: [data] train: is missing; give a data file",
            "run.toml: [model] model_id: is missing; give a local directory or a Hub id",
            "--set lora.layers_to_transform: [lora] layers_to_transform: cannot be combined with a regular expression in target_modules; put the layers into the expression",
            "run.toml: [train] output_dir: is missing; give the directory to write the adapter to",
            "run.toml:3: [train] max_steps: cannot be given together with num_train_epochs; keep one of them",
        ]
    );
}

#[test]
fn what_is_not_supported_is_refused() {
    assert_eq!(
        problems(LEAST, &["eval.posterior_samples=4"]),
        [
            "run.toml: [eval] posterior_samples: a run evaluates the posterior mean; set it to 0 and use `monteclora eval --posterior-samples` afterwards"
        ]
    );
}

#[test]
fn files_that_cannot_be_read() {
    let error = RunConfig::load(Path::new("no/run.toml"), &[]).expect_err("missing");
    let text = error.to_string();
    assert!(
        text.starts_with(
            "cannot read `no/run.toml`; give the path of a TOML file with -c: No such"
        ),
        "{text}"
    );
    assert_eq!(error.exit(), 2);
    let error = read("seed = 1\n[model\n", &[]).expect_err("syntax");
    assert!(
        error
            .to_string()
            .starts_with("run.toml:2: not valid TOML: "),
        "{error}"
    );
    let error = read("seed = 1\nseed = 2\n", &[]).expect_err("twice");
    assert!(
        error
            .to_string()
            .starts_with("run.toml:2: not valid TOML: duplicate key"),
        "{error}"
    );
}

#[test]
fn the_resolved_form_is_json() {
    let json = serde_json::to_value(good(WHOLE, &[])).expect("serialises");
    assert_eq!(json["train"]["max_steps"], 10);
    assert_eq!(json["train"].get("num_train_epochs"), None);
    assert_eq!(json["lora"]["method"], "monteclora");
    assert_eq!(json["lora"]["target_modules"][0], "q_proj");
    assert_eq!(json["lora"]["monteclora"]["preset"], "peft");
    assert_eq!(
        serde_json::to_value(good(LEAST, &[])).expect("serialises")["lora"]["target_modules"],
        "all-linear"
    );
}

/// Mixed precision holds the weights in bfloat16, so a configuration that asks for other weights contradicts itself.
#[test]
fn bf16_products_need_bf16_weights() {
    let parse = |dtype: &str| {
        let text = format!(
            "[model]\nmodel_id = \"base\"\ndtype = \"{dtype}\"\n[data]\ntrain = \"rows.jsonl\"\n[train]\noutput_dir = \"out\"\nbf16 = true\n"
        );
        RunConfig::from_toml(&text, "run.toml", &[])
    };
    for dtype in ["auto", "bf16"] {
        assert!(parse(dtype).expect("consistent").train.bf16);
    }
    let refused = parse("f32").expect_err("contradicts itself").to_string();
    assert!(
        refused.contains("run.toml:8") && refused.contains("[train] bf16"),
        "{refused}"
    );
}

#[test]
fn tf32_is_off_unless_asked_for() {
    for (line, expected) in [
        ("", false),
        ("tf32 = false\n", false),
        ("tf32 = true\n", true),
    ] {
        let text = format!(
            "[model]\nmodel_id = \"base\"\n[data]\ntrain = \"rows.jsonl\"\n[train]\noutput_dir = \"out\"\n{line}"
        );
        let run = RunConfig::from_toml(&text, "run.toml", &[]).expect("resolves");
        assert_eq!(run.train.tf32, expected);
    }
}
