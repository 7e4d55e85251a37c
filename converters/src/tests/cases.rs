//! Where the cases of tests lie: small inputs after public reports, each in a folder of its own.

use std::path::{Path, PathBuf};

/// The folder of the case called `name`, such as `formats/bom`: below the root that `MONTECLORA_CASES` names, or the project's copy.
pub(crate) fn case(name: &str) -> PathBuf {
    let own = || {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .map(|dir| dir.join("tests/data/cases"))
            .find(|dir| dir.is_dir())
            .expect("the tests run in the project's repository")
    };
    let root = std::env::var_os("MONTECLORA_CASES").map_or_else(own, PathBuf::from);
    let path = root.join(name);
    assert!(path.is_dir(), "no case `{}`", path.display());
    path
}
