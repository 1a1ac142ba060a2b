//! `corepage verify`: reads a closed store whole and names what is damaged.
//!
//! 1. Exit code 0 means that every byte the store refers to was read and is the one written; anything else is 1.
//!
//! Changes nothing, and repairs nothing.

use super::{Failure, output};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory of the store
    #[arg(long, value_name = "DIR", default_value = "./corepage-data")]
    dir: PathBuf,
}

/// Prints what was found.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let report = corepage::verify(&arguments.dir)?;
    let mut said = String::new();
    for damage in &report.damaged {
        let _ = writeln!(said, "damaged: {damage}");
    }
    output::print(&format!("{said}{report}\n"))?;
    if !report.damaged.is_empty() {
        return Err(Failure::new(format_args!(
            "the store {} is damaged, see above; what is not listed can still be read: copy it out, or restore a copy",
            arguments.dir.display()
        )));
    }
    Ok(ExitCode::SUCCESS)
}
