//! `ringvm-console`: consoles over vhost-user.

use std::process::ExitCode;

use clap::Parser;
use ringvm_backends::device::Device;
use ringvm_backends::io::reactor::ReactorPool;
use ringvm_backends::options::Checked;
use ringvm_cli::{help, keyval, usage};
use ringvm_hosted::console::{ConsoleBackend, ConsoleOptions, End};
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};

/// Serve consoles to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "ringvm-console", version, after_help = EXAMPLES)]
struct Cli {
    /// Add a console (virtio-console) at one of stdio, pty, socket, file and null; may be repeated
    #[arg(long, value_name = "OPTIONS")]
    console: Vec<String>,
    #[command(flatten)]
    serve: ServeOptions,
}

const EXAMPLES: &str = "\
Examples:
  ringvm-console --socket /run/c.sock --console socket=/run/login.sock
  ringvm-console --socket /run/c.sock --console file=console.log,max=16M

Exit codes: 0 ended by a signal, 1 a bug, 2 the configuration can't work, 3 the host failed";

fn main() -> ExitCode {
    let program = Program {
        name: "ringvm-console",
        kind: "console",
        read: keyval::read,
        // Its queues are served by a thread of its own.
        queues: |_: &Checked<ConsoleOptions>| 0,
        open,
    };
    match usage::parse::<Cli>("ringvm-console", |command| command.mut_arg("console", help::keys::<ConsoleOptions>)) {
        Ok(cli) => serve(&program, &cli.serve, &cli.console).into(),
        Err(message) => {
            eprintln!("ringvm-console: {message}");
            Exit::Configuration.into()
        }
    }
}

/// Opens a console, which has a thread of its own. The size of a terminal on standard output is read once, here.
fn open(name: &str, options: &Checked<ConsoleOptions>, pool: &ReactorPool) -> Result<Box<dyn Device>, String> {
    let end = End::open(name, options).map_err(|error| error.to_string())?;
    let (mut device, console) = ConsoleBackend::host(name, end).map_err(|error| error.to_string())?;
    if let Some(path) = console.slave() {
        eprintln!("ringvm-console: {name} is the terminal {}", path.display());
    }
    device.on_panic(pool.on_panic());
    Ok(Box::new(device))
}
