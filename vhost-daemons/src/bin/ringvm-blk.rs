//! `ringvm-blk`: disks over vhost-user.

use std::process::ExitCode;

use clap::Parser;
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::options::Checked;
use ringvm_cli::{help, keyval, usage};
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};

/// Serve disks to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "ringvm-blk", version, after_help = EXAMPLES)]
struct Cli {
    /// Add a disk (virtio-blk); may be repeated
    #[arg(long, value_name = "OPTIONS")]
    disk: Vec<String>,
    #[command(flatten)]
    serve: ServeOptions,
}

const EXAMPLES: &str = "\
Examples:
  ringvm-blk --socket /run/b.sock --disk path=x.img,queues=2
  ringvm-blk --socket /run/a.sock --disk a.img --socket /run/b.sock --disk b.img,readonly=on

Exit codes: 0 ended by a signal, 1 a bug, 2 the configuration can't work, 3 the host failed";

fn main() -> ExitCode {
    let program = Program {
        name: "ringvm-blk",
        kind: "disk",
        read: keyval::read,
        queues: |options: &Checked<BlockOptions>| options.queues.into(),
        open: |name, options, pool| match BlockDevice::open_checked(name, options, pool) {
            Ok(device) => Ok(Box::new(device)),
            Err(error) => Err(error.to_string()),
        },
    };
    match usage::parse::<Cli>("ringvm-blk", |command| command.mut_arg("disk", help::keys::<BlockOptions>)) {
        Ok(cli) => serve(&program, &cli.serve, &cli.disk).into(),
        Err(message) => {
            eprintln!("ringvm-blk: {message}");
            Exit::Configuration.into()
        }
    }
}
