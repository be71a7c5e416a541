//! `ringvm-vsock`: vsock devices over vhost-user.

use std::process::ExitCode;

use clap::Parser;
use ringvm_backends::options::Checked;
use ringvm_cli::{help, keyval, usage};
use ringvm_hosted::vsock::{self, VsockOptions};
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};

/// Serve vsock devices to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "ringvm-vsock", version, after_help = EXAMPLES)]
struct Cli {
    /// Add a vsock device: stream sockets between the guest's programs and Unix sockets; may be repeated
    #[arg(long, value_name = "OPTIONS")]
    vsock: Vec<String>,
    #[command(flatten)]
    serve: ServeOptions,
}

const EXAMPLES: &str = "\
Examples:
  ringvm-vsock --socket /run/vhost-v.sock --vsock cid=3,socket=/run/v.sock
  printf 'CONNECT 1024\\n' | socat - UNIX-CONNECT:/run/v.sock    to port 1024 of the guest
  socat UNIX-LISTEN:/run/v.sock_52 -                            from the guest to port 52 of CID 2

Exit codes: 0 ended by a signal, 1 a bug, 2 the configuration can't work, 3 the host failed";

fn main() -> ExitCode {
    let program = Program {
        name: "ringvm-vsock",
        kind: "vsock",
        read: keyval::read,
        // The device has a thread of its own.
        queues: |_: &Checked<VsockOptions>| 0,
        open: |name, options, pool| {
            let mut device = vsock::open(name, options).map_err(|error| error.to_string())?;
            device.on_panic(pool.on_panic());
            Ok(Box::new(device))
        },
    };
    match usage::parse::<Cli>("ringvm-vsock", |command| command.mut_arg("vsock", help::keys::<VsockOptions>)) {
        Ok(cli) => serve(&program, &cli.serve, &cli.vsock).into(),
        Err(message) => {
            eprintln!("ringvm-vsock: {message}");
            Exit::Configuration.into()
        }
    }
}
