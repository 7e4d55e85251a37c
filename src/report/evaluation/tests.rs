//! Tests of the page with few, many and hostile values.

use super::*;

fn page(shown: Vec<Shown>) -> EvaluationPage {
    EvaluationPage {
        title: "qwen on arc".to_owned(),
        facts: vec![("rows".to_owned(), "3".to_owned())],
        n_bins: 15,
        shown,
        notes: vec![],
    }
}

fn shown(name: &str, colour: u8, outcomes: Vec<(f64, bool)>) -> Shown {
    Shown {
        name: name.to_owned(),
        colour,
        outcomes,
        scores: vec![
            ("accuracy", Some(0.5), Some([0.25, 0.75])),
            ("nll", None, None),
        ],
    }
}

#[test]
fn scores_stand_under_their_predictor() {
    let mut mean = shown("posterior mean", 2, vec![(0.5, true)]);
    mean.scores = vec![
        ("perplexity", Some(f64::INFINITY), Some([1.0, 2.0])),
        ("accuracy", Some(0.625), None),
    ];
    let page = page(vec![shown("base", 1, vec![(0.75, false)]), mean]);
    let html = page.html().expect("a page");
    let row = |label: &str| -> String {
        let cells = html.split(&format!(">{label}</th>")).nth(1);
        let cells = cells.and_then(|rest| rest.split("</tr>").next());
        cells.expect("a row").to_owned()
    };
    let interval = r#"<span class="interval">0.25 to 0.75</span>"#;
    assert_eq!(
        row("accuracy"),
        format!("<td>0.5{interval}</td><td>0.625</td>")
    );
    assert_eq!(row("nll"), "<td>–</td><td>–</td>");
    assert_eq!(row("perplexity"), "<td>–</td><td>–</td>");
    assert_eq!(html.matches("<svg").count(), 3);
    assert!(html.contains("Points below the diagonal"));
}

#[test]
fn without_outcomes_a_sentence_stands_for_the_figures() {
    for shown in [vec![], vec![shown("base", 1, vec![(f64::NAN, true)])]] {
        let html = page(shown).html().expect("a page");
        assert!(!html.contains("<svg") && html.contains("The rows have no choices"));
        assert!(!html.contains("NaN") && !html.contains("None"), "{html}");
    }
}

#[test]
fn one_row_is_drawn() {
    for right in [false, true] {
        let html = page(vec![shown("base", 1, vec![(0.0, right)])]).html();
        let html = html.expect("a page");
        assert_eq!(html.matches("<svg").count(), 2);
        assert!(!html.contains("NaN") && !html.contains("inf\""), "{html}");
    }
}

#[test]
fn texts_are_not_markup() {
    let hostile = r#"<script>alert("1")</script>&"#;
    let mut page = page(vec![shown(hostile, 9, vec![(0.5, true)])]);
    page.title = hostile.to_owned();
    page.facts = vec![(hostile.to_owned(), hostile.to_owned())];
    page.notes = vec![hostile.to_owned()];
    let html = page.html().expect("a page");
    assert!(
        !html.contains("<script") && !html.contains("alert(\""),
        "{html}"
    );
    assert!(html.contains("&lt;script&gt;alert"));
    assert!(html.contains(r#"class="swatch s5""#) && !html.contains("s9"));
}

#[test]
fn many_rows_stay_small() {
    // A sequence that fills [0, 1) evenly.
    let rows: Vec<(f64, bool)> = (0..100_000)
        .map(|row| (f64::from(row) * 0.618_033_988_749_895).fract())
        .map(|confidence| (confidence, (confidence * 7919.0).fract() < confidence))
        .collect();
    let names = ["base", "posterior mean", "average of 10 draws", "ensemble"];
    let predictors = names.iter().zip(1..);
    let mut page = page(
        predictors
            .map(|(name, colour)| shown(name, colour, rows.clone()))
            .collect(),
    );
    page.n_bins = 1000;
    let html = page.html().expect("a page");
    assert!(html.len() < 300_000, "{} bytes", html.len());
    assert!(html.contains("The diagrams have 50 bins"));
}

#[test]
fn intervals_hold_their_share() {
    let bin = |n, accuracy| Bin {
        above: 0.0,
        to: 1.0,
        n,
        confidence: 0.5,
        accuracy,
    };
    // Half of 100: 0.404 to 0.596 (Wilson's interval as statsmodels' proportion_confint gives it).
    let [low, high] = interval(&bin(100, 0.5));
    assert!((low - 0.403_832).abs() < 1e-6 && (high - 0.596_168).abs() < 1e-6);
    for n in [1, 2, 7, 100_000] {
        for right in [0, 1, n / 2, n] {
            let share = right as f64 / n as f64;
            let [low, high] = interval(&bin(n, share));
            assert!(0.0 <= low && low <= share && share <= high && high <= 1.0);
        }
    }
}
