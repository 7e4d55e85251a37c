//! What is wrong, for the one who can mend it: the problem type of the whole workspace, and lists of problems.

use std::fmt;

use serde::Serialize;

/// How many problems a message lists before it only counts the rest.
const LISTED: usize = 20;

/// The first of `names`, and how many more there are.
pub(crate) fn listed(names: &[impl AsRef<str>]) -> String {
    let shown: Vec<&str> = names.iter().take(LISTED).map(AsRef::as_ref).collect();
    let more = names.len() - shown.len();
    match more {
        0 => shown.join(", "),
        _ => format!("{} and {more} more", shown.join(", ")),
    }
}

/// One thing that is wrong with an adapter, a model, a file or a setting, with its remedy.
///
/// Displayed as `at: message; fix`; a part that is empty is left out with its mark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Stable machine-readable name, such as `dora` or `shape`.
    pub code: &'static str,
    /// File, configuration key, tensor or module concerned; empty where the message says it.
    #[serde(rename = "where")]
    pub at: String,
    /// What is wrong.
    pub message: String,
    /// What the user can do about it.
    pub fix: String,
    /// The exit code of a process that ends for it: 2 usage, 3 data, 4 adapters and models, 5 numbers, 1 the rest.
    #[serde(skip)]
    pub exit: u8,
}

/// `word` as a shell takes it.
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=+:,@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

impl Problem {
    /// A problem of an adapter or a model (exit code 4) at `at`.
    pub fn new(
        code: &'static str,
        at: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            code,
            at: at.into(),
            message: message.into(),
            fix: fix.into(),
            exit: 4,
        }
    }

    /// A problem that one sentence says, without a place of its own; exit code 4.
    pub fn sentence(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(code, "", message, "")
    }

    /// Wrong use: a flag, a name or a destination that cannot be taken. Exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::sentence("usage", message).exit(2)
    }

    /// The same problem with another exit code.
    #[must_use]
    pub fn exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut is_first = true;
        for (mark, part) in [("", &self.at), (": ", &self.message), ("; ", &self.fix)] {
            if !part.is_empty() {
                write!(f, "{}{part}", if is_first { "" } else { mark })?;
                is_first = false;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

/// Problems one a line, the first 20 spelt out and the rest counted; indented below the heading if there is one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    /// What they are about, such as "`out/adapter` is refused".
    pub heading: Option<String>,
    /// The problems, in the order found.
    pub list: Vec<Problem>,
    /// Those that were only counted.
    pub n_more: usize,
}

impl Problems {
    /// `list` under `heading`.
    pub fn under(heading: impl Into<String>, list: Vec<Problem>) -> Self {
        Self {
            heading: Some(heading.into()),
            ..Self::from(list)
        }
    }

    /// Adds a problem; what a message would not spell out is only counted, so that any number takes no more memory.
    pub fn push(&mut self, problem: Problem) {
        match self.list.len() < LISTED {
            true => self.list.push(problem),
            false => self.n_more += 1,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Fails with all of `list` under `heading`, if there are any.
    ///
    /// # Errors
    /// If `list` is not empty.
    pub fn refuse_any(heading: impl Into<String>, list: Vec<Problem>) -> Result<(), Self> {
        if list.is_empty() {
            return Ok(());
        }
        Err(Self::under(heading, list))
    }

    /// The exit code: that of the first problem.
    pub fn exit(&self) -> u8 {
        self.list.first().map_or(1, |problem| problem.exit)
    }
}

impl From<Vec<Problem>> for Problems {
    fn from(list: Vec<Problem>) -> Self {
        Self {
            list,
            ..Self::default()
        }
    }
}

impl<P: Into<Problem>> FromIterator<P> for Problems {
    fn from_iter<I: IntoIterator<Item = P>>(problems: I) -> Self {
        Self::from(Vec::from_iter(problems.into_iter().map(Into::into)))
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.list.iter().take(LISTED).map(Problem::to_string);
        let more = self.list.len().saturating_sub(LISTED) + self.n_more;
        let rest = (more > 0).then(|| format!("and {more} more"));
        let lines: Vec<String> = lines.chain(rest).collect();
        match &self.heading {
            Some(heading) => write!(f, "{heading}:\n  {}", lines.join("\n  ")),
            None => f.write_str(&lines.join("\n")),
        }
    }
}

impl std::error::Error for Problems {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_after_twenty_and_counted() {
        let list: Vec<Problem> = (0..23)
            .map(|idx| Problem::new("x", format!("t{idx}"), "bad", ""))
            .collect();
        let text = Problems::from(list.clone()).to_string();
        assert!(text.starts_with("t0: bad\nt1: bad\n"));
        assert!(text.contains("t19: bad") && !text.contains("t20: bad"));
        assert!(text.ends_with("\nand 3 more"));
        let refused = Problems::refuse_any("`x` is refused", list).expect_err("23 problems");
        let text = refused.to_string();
        assert!(text.starts_with("`x` is refused:\n  t0: bad\n  t1: bad\n"));
        assert!(text.ends_with("\n  and 3 more"));
        assert_eq!(Problems::refuse_any("fine", Vec::new()), Ok(()));
        let mut counted = Problems::default();
        (0..23).for_each(|idx| counted.push(Problem::new("x", format!("t{idx}"), "bad", "")));
        assert_eq!(counted.list.len(), 20);
        assert!(counted.to_string().ends_with("t19: bad\nand 3 more"));
    }

    #[test]
    fn a_problem_serialises_as_code_where_message_fix() {
        let json = serde_json::to_value(Problem::new("c", "w", "m", "f")).expect("plain strings");
        assert_eq!(
            json,
            serde_json::json!({"code": "c", "where": "w", "message": "m", "fix": "f"})
        );
    }

    #[test]
    fn parts_that_are_empty_leave_no_mark() {
        let text = |at, message, fix| Problem::new("c", at, message, fix).to_string();
        assert_eq!(text("w", "m", "f"), "w: m; f");
        assert_eq!(text("", "m", "f"), "m; f");
        assert_eq!(text("w", "m", ""), "w: m");
        assert_eq!(text("", "m", ""), "m");
        assert_eq!(text("w", "", "f"), "w; f");
        assert_eq!(Problem::usage("no").exit, 2);
    }
}
