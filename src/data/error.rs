//! What can be wrong with data files, templates and tokenizers, and how it is said.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::rows::FieldProblem;

/// How many offenders one report lists; the rest are counted.
pub const MAX_SHOWN: usize = 20;

/// One thing wrong with one row of a data file.
///
/// Displayed as `file:line: field: problem; fix`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowProblem {
    /// The data file, as the user wrote it.
    pub path: PathBuf,
    /// Line in the file, from 1.
    pub line: usize,
    /// The offending field, such as `messages[2].role`, or `row`.
    pub field: String,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub fix: String,
}

impl RowProblem {
    pub(crate) fn new(path: &Path, line: usize, problem: FieldProblem) -> Self {
        Self {
            path: path.to_owned(),
            line,
            field: problem.field,
            problem: problem.problem,
            fix: problem.fix,
        }
    }
}

impl fmt::Display for RowProblem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{}:{}: {}: {}; {}",
            self.path.display(),
            self.line,
            self.field,
            self.problem,
            self.fix
        )
    }
}

/// The problems found in a file: the first [`MAX_SHOWN`] and the number of all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    shown: Vec<RowProblem>,
    total: usize,
}

impl Problems {
    /// Adds a problem; beyond [`MAX_SHOWN`] it is only counted.
    pub fn push(&mut self, problem: RowProblem) {
        self.total += 1;
        if self.shown.len() < MAX_SHOWN {
            self.shown.push(problem);
        }
    }

    /// The problems that are kept in full, in file order.
    pub fn shown(&self) -> &[RowProblem] {
        &self.shown
    }

    /// The number of all problems.
    pub fn total(&self) -> usize {
        self.total
    }

    /// The same problems with another remedy.
    fn with_fixes(mut self, fix: impl Fn(&str) -> String) -> Self {
        for problem in &mut self.shown {
            problem.fix = fix(&problem.fix);
        }
        self
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (idx, problem) in self.shown.iter().enumerate() {
            let end = if idx + 1 < self.shown.len() { "\n" } else { "" };
            write!(formatter, "{problem}{end}")?;
        }
        match self.total - self.shown.len() {
            0 => Ok(()),
            more => write!(formatter, "\nand {more} more"),
        }
    }
}

/// Errors of the data path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A data file is missing or cannot be read.
    #[error("cannot read `{}`; give the path of a data file", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A data file without a row.
    #[error("`{}` holds no row; expected one JSON object a line, or an array of them", .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A JSON array that is not one.
    #[error("{}:{line}: row: {problem}; correct the array, or write one JSON object a line", .path.display())]
    Array {
        /// The file.
        path: PathBuf,
        /// Line in the file, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A packed file that cannot be unpacked.
    #[error("`{}` cannot be unpacked into a temporary file; is it whole, and is there room in TMPDIR?", .path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A Parquet file in a build that cannot read it.
    #[error("`{}` is a Parquet file, and this build cannot read those; build with `--features parquet`, or convert it to JSON Lines", .path.display())]
    NoParquet {
        /// The file.
        path: PathBuf,
    },
    /// A Parquet file that cannot be read.
    #[error("`{}`: {problem}", .path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the column, and what to do.
        problem: String,
    },
    /// A directory or Hub data set whose files cannot be told apart.
    #[error("`{name}`: {problem}")]
    Files {
        /// The directory or data set, as the user wrote it.
        name: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Rows that cannot be used, all of them.
    #[error("{0}")]
    Rows(Problems),
    /// Rows of more than one format.
    #[error("`{}` mixes formats: {found}; split the file, or set data.format", .path.display())]
    MixedFormats {
        /// The file.
        path: PathBuf,
        /// Each format with its number of rows and its first lines.
        found: String,
    },
    /// Every row was dropped for its length.
    #[error("every row of `{}` is longer than max_seq_length {max_seq_length}; raise data.max_seq_length, or set data.overlong = \"truncate\"", .path.display())]
    AllDropped {
        /// The file.
        path: PathBuf,
        /// The limit in tokens.
        max_seq_length: usize,
    },
    /// A data file that is not what it was when it was checked.
    #[error("{}:{line}: the file changed after it was checked; start again", .path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// Line in the file, from 1.
        line: usize,
    },
    /// A chat template or tokenizer file named by the user that cannot be read.
    #[error("cannot read `{}`", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A malformed file of the model.
    #[error("`{}`: {message}", .path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A chat template that cannot be parsed.
    #[error("`{}`: the chat template is not valid Jinja: {message}; give a corrected one with --chat-template", .path.display())]
    TemplateSyntax {
        /// Where the template comes from.
        path: PathBuf,
        /// The parser's message.
        message: String,
    },
    /// A conversation given to a model that has no chat template.
    #[error(
        "the model has no chat template; give one with --chat-template, or take rows of prompt and completion as they are (data.apply_chat_template = false, or --no-chat-template)"
    )]
    NoTemplate,
    /// A chat template that refuses the conversation.
    #[error("the chat template refuses the conversation: {message}")]
    Render {
        /// The template's message.
        message: String,
    },
    /// Text or tokens that the tokenizer cannot handle.
    #[error("the tokenizer failed: {message}")]
    Tokenize {
        /// The tokenizer's message.
        message: String,
    },
    /// A tokenizer with ids that the model has no embedding for.
    #[error("`{}`: token `{token}` has id {id}, but the model has {model_vocab} embeddings; the tokenizer belongs to another model", .path.display())]
    Vocabulary {
        /// tokenizer.json.
        path: PathBuf,
        /// The offending token.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding matrix.
        model_vocab: usize,
    },
}

impl DataError {
    /// The same error for a verb without run.toml: remedies name flags, and those that only run.toml has are left out.
    pub fn in_flags(self) -> Self {
        match self {
            Self::Rows(problems) => Self::Rows(problems.with_fixes(|fix| {
                let fix = fix.split(", or set data.").next().unwrap_or(fix);
                fix.replace("data.max_seq_length", "--max-seq-length")
            })),
            other => other,
        }
    }

    /// The exit code: 2 for a template or a feature that is not there, 4 for a malformed model, 3 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Missing { .. } | Self::NoTemplate | Self::NoParquet { .. } => 2,
            Self::Model { .. } | Self::TemplateSyntax { .. } | Self::Vocabulary { .. } => 4,
            _ => 3,
        }
    }
}
