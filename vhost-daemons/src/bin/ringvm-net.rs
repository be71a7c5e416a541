//! `ringvm-net`: NICs over vhost-user.

use std::process::ExitCode;

use clap::Parser;
use ringvm_backends::net::{NetDevice, NetOptions};
use ringvm_backends::options::Checked;
use ringvm_cli::{help, keyval, usage};
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};

/// Serve NICs to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "ringvm-net", version, after_help = EXAMPLES)]
struct Cli {
    /// Add a NIC (virtio-net) on one of tap, fds, link and loopback; may be repeated
    #[arg(long, value_name = "OPTIONS")]
    net: Vec<String>,
    #[command(flatten)]
    serve: ServeOptions,
}

const EXAMPLES: &str = "\
Examples:
  ringvm-net --socket /run/n.sock --net tap=vm0,queues=2

Exit codes: 0 ended by a signal, 1 a bug, 2 the configuration can't work, 3 the host failed";

fn main() -> ExitCode {
    let program = Program {
        name: "ringvm-net",
        kind: "net",
        read: keyval::read,
        queues: |options: &Checked<NetOptions>| 2 * usize::from(options.queues),
        open: |name, options, pool| match NetDevice::open_checked(name, options, pool) {
            Ok(device) => Ok(Box::new(device)),
            Err(error) => Err(error.to_string()),
        },
    };
    match usage::parse::<Cli>("ringvm-net", |command| command.mut_arg("net", help::keys::<NetOptions>)) {
        Ok(cli) => serve(&program, &cli.serve, &cli.net).into(),
        Err(message) => {
            eprintln!("ringvm-net: {message}");
            Exit::Configuration.into()
        }
    }
}
