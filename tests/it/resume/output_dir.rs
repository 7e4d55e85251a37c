//! An output directory of its own, an evaluation broken off, a best adapter that is gone.

use super::*;

/// Two runs in one directory would mix their files; a lock that a killed run held is free.
#[cfg(unix)]
#[test]
fn a_second_run_in_the_same_directory_is_refused() {
    let case = Case::new("max_steps = 400\nsave_steps = 2");
    let first = case
        .command(&[])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while case.checkpoints().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
    for arguments in [&["--resume", "auto"][..], &["--force"], &[]] {
        let said = case.fail(2, arguments);
        let out = case.at("out").display().to_string();
        assert!(
            said.contains(&out) && said.contains(&format!("process {}", first.id())),
            "{said}"
        );
    }
    assert!(!case.checkpoints().is_empty());
    kill(first);
    let step = *case.checkpoints().last().unwrap();
    let few = format!("train.max_steps={}", step + 2);
    case.succeed(&["--resume", "auto", "--set", &few]);
    assert!(!case.at("out/.lock").exists());
}

/// A signal within an evaluation ends it at once, and the run that continues makes it from its beginning: before the next
/// step, and at the end of the run.
#[cfg(unix)]
#[test]
fn an_evaluation_is_broken_off_and_made_again() {
    for steps in [5, 8] {
        let case = Case::new(&format!("max_steps = {steps}\nsave_steps = 100"));
        // Enough rows that a signal falls into the evaluation.
        let rows = std::fs::read_to_string(case.at("rows.jsonl")).unwrap();
        std::fs::write(case.at("valid.jsonl"), rows.repeat(400)).unwrap();
        let whole = case.at("whole");
        case.succeed(&["--set", &format!("train.output_dir={whole:?}")]);
        let mut child = case
            .command(&["--resume", "auto"])
            .env("RUST_LOG", "monteclora=debug")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(
            lines
                .by_ref()
                .any(|line| line.unwrap().contains("evaluating"))
        );
        let pid = child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-INT", &pid])
                .status()
                .unwrap()
                .success()
        );
        let said: Vec<String> = lines.map_while(Result::ok).collect();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
        assert!(said.last().unwrap().contains("at step 5 of"), "{said:?}");
        assert_eq!(case.checkpoints(), [5]);
        assert!(
            curve(&case.at("out"))
                .iter()
                .all(|line| line["type"] != "eval")
        );
        case.succeed(&["--resume", "auto"]);
        same_result(&case.at("out"), &whole);
    }
}

/// What ctrl-c prints can be pasted: with every override, quoted.
#[cfg(unix)]
#[test]
fn the_hint_after_an_interruption_repeats_the_overrides() {
    let case = Case::new("max_steps = 4000\nsave_steps = 1000");
    let sets = [
        "--set",
        "train.logging_steps=1",
        "--set",
        "lora.target_modules=[\"q_proj\"]",
        "--cpu",
    ];
    let mut child = case.command(&sets).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.by_ref().any(|line| line.unwrap().contains("tok/s")));
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let said: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    let expected = format!(
        "monteclora train -c {} --set train.logging_steps=1 --set 'lora.target_modules=[\"q_proj\"]' --cpu --resume auto",
        case.at("run.toml").display()
    );
    assert!(said.last().unwrap().ends_with(&expected), "{said:?}");
}

/// `best/` that is gone: made again from the checkpoint of its step, else refused while it is needed, else begun anew.
#[test]
fn a_best_adapter_that_is_gone_is_made_again_or_missed() {
    let case = Case::new("max_steps = 20\nsave_steps = 5\nsave_total_limit = 0");
    let whole = case.at("whole");
    case.succeed(&["--set", &format!("train.output_dir={whole:?}")]);
    // The length is no part of what is compared, so a run of 10 steps with the schedule of 20 is made by stopping it.
    let copy = |name: &str| {
        let to = case.at("out").join(name);
        std::fs::create_dir_all(&to).unwrap();
        for file in names(&whole.join(name)) {
            std::fs::copy(whole.join(name).join(&file), to.join(&file)).unwrap();
        }
    };
    copy("checkpoint-5");
    copy("checkpoint-10");
    std::fs::copy(whole.join("metrics.jsonl"), case.at("out/metrics.jsonl")).unwrap();
    let state = std::fs::read_to_string(case.at("out/checkpoint-10/trainer_state.json")).unwrap();
    let state: Value = serde_json::from_str(&state).unwrap();
    let best = state["best"][1].as_u64().unwrap();
    let output = case.succeed(&["--resume", "auto"]);
    let said = stderr(&output);
    assert!(
        said.contains(&format!("made again from the checkpoint of step {best}")),
        "{said}"
    );
    same_result(&case.at("out"), &whole);

    std::fs::remove_dir_all(case.at("out")).unwrap();
    copy("checkpoint-10");
    if best == 10 {
        // Its own step is there; take away what could be rebuilt.
        let path = case.at("out/checkpoint-10/trainer_state.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut state: Value = serde_json::from_str(&text).unwrap();
        state["best"][1] = 5.into();
        std::fs::write(&path, state.to_string()).unwrap();
    }
    let said = case.fail(2, &["--resume", "auto"]);
    assert!(
        said.contains("best`") && said.contains("load_best_model_at_end=false"),
        "{said}"
    );
    let anew = [
        "--resume",
        "auto",
        "--set",
        "train.load_best_model_at_end=false",
    ];
    let said = stderr(&case.succeed(&anew));
    assert!(said.contains("starts the comparison again"), "{said}");
    assert!(case.at("out/best/adapter_model.safetensors").exists());
}
