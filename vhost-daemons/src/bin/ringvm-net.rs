//! `ringvm-net`: NICs over vhost-user.

use std::process::ExitCode;

use clap::Parser;
use ringvm_backends::net::{NetDevice, NetOptions};
use ringvm_cli::{keyval, usage};
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};

/// Serve NICs to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "ringvm-net", version, after_help = EXAMPLES)]
struct Cli {
    /// Add a NIC (virtio-net); may be repeated. Keys: one of tap=NAME|/dev/tapN, fds=[N,…], link=PATH, loopback=on; mac=ADDRESS,
    /// queues=PAIRS, queue-size=N, mtu=BYTES
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
        read: |text| {
            let options = keyval::from_str::<NetOptions>(text, Some("tap")).map_err(|error| error.to_string())?;
            options.validate().map(|()| options).map_err(|error| error.to_string())
        },
        queues: |options: &NetOptions| 2 * usize::from(options.queues),
        open: |name, options, pool| match NetDevice::open(name, options, pool) {
            Ok(device) => Ok(Box::new(device)),
            Err(error) => Err(error.to_string()),
        },
    };
    match usage::parse::<Cli>("ringvm-net") {
        Ok(cli) => serve(&program, &cli.serve, &cli.net).into(),
        Err(message) => {
            eprintln!("ringvm-net: {message}");
            Exit::Configuration.into()
        }
    }
}
