//! Runs a program where io_uring is forbidden, as sandboxes do it: io_uring_setup fails with EPERM.
//!
//! `without-io-uring PROGRAM [ARGUMENT...]`

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// io_uring_setup, on x86_64 as everywhere.
const IO_URING_SETUP: i64 = 425;
const EPERM: u32 = 1;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(program) = arguments.next() else {
        eprintln!("usage: without-io-uring PROGRAM [ARGUMENT...]");
        return ExitCode::from(2);
    };
    if let Err(e) = forbid() {
        eprintln!("without-io-uring: installing the filter: {e}");
        return ExitCode::from(2);
    }
    let error = Command::new(&program).args(arguments).exec();
    eprintln!("without-io-uring: starting {}: {error}", program.display());
    ExitCode::from(2)
}

fn forbid() -> Result<(), Box<dyn std::error::Error>> {
    let rules = BTreeMap::from([(IO_URING_SETUP, Vec::new())]);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(EPERM), TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}
