//! `ringvm-blk`: disks over vhost-user.

use std::io::ErrorKind;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use ringvm_backends::block::{BlockDevice, BlockOptions, OpenError};
use ringvm_backends::device::Device;
use ringvm_backends::keyval;
use ringvm_backends::reactor::ReactorPool;
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::{self, ServeOptions};
use ringvm_vhost_daemons::{Program, serve};

/// Serve disks to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "ringvm-blk", version, after_help = EXAMPLES)]
struct Cli {
    /// Add a disk (virtio-blk); may be repeated. Keys: path, direct=on|off, readonly=on|off, queues=N, queue-size=N,
    /// serial=TEXT, block-size=BYTES, storage=raw|null, size=SIZE (null storage only)
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

/// Longest time to wait for the lock of an image.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Opens a disk. A daemon that was killed holds its lock until the kernel has ended what it had in flight, and must: only then
/// is it time for the next one.
fn open(name: &str, options: &BlockOptions, pool: &ReactorPool) -> Result<Box<dyn Device>, String> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match BlockDevice::open(name, options, pool) {
            Ok(device) => return Ok(Box::new(device)),
            Err(OpenError::Host { source, .. })
                if source.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {}
            Err(error) => return Err(error.to_string()),
        }
        std::thread::sleep(LOCK_PAUSE);
    }
}

fn main() -> ExitCode {
    let program = Program {
        name: "ringvm-blk",
        kind: "disk",
        read: |text| {
            let options = keyval::from_str::<BlockOptions>(text, Some("path")).map_err(|error| error.to_string())?;
            options.validate().map(|()| options).map_err(|error| error.to_string())
        },
        queues: |options: &BlockOptions| options.queues.into(),
        open,
    };
    match options::parse::<Cli>() {
        Ok(cli) => serve(&program, &cli.serve, &cli.disk).into(),
        Err(message) => {
            eprintln!("ringvm-blk: {message}");
            Exit::Configuration.into()
        }
    }
}
