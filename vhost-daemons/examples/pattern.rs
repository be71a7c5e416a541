//! A disk that is never stored: every sector holds its own number, again and again. For anybody who wants a disk of a kind of
//! their own: what a request means is here, everything else is RingVM's.
//!
//!     cargo run --release --example pattern -- --socket /run/p.sock --disk size=1T
//!     ringvm run --kernel vmlinuz … --disk socket=/run/p.sock

use std::io;
use std::process::ExitCode;

use clap::Parser;
use ringvm_backends::block::storage::{Geometry, Progress, Storage};
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::io::ops::Io;
use ringvm_backends::virtqueue::buffers::GuestIo;
use ringvm_cli::{keyval, usage};
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};

const SECTOR: usize = 512;

/// The storage of one queue. It answers at once, so that an operation has no state and nothing to resume.
#[derive(Clone)]
struct Pattern(Geometry);

impl Storage for Pattern {
    type Op = ();

    fn geometry(&self) -> &Geometry {
        &self.0
    }

    fn read(&mut self, (): &mut (), offset: u64, data: &mut GuestIo, _: &mut Io<'_>) -> Progress {
        for (sector, at) in (offset / SECTOR as u64..).zip((0..data.len()).step_by(SECTOR)) {
            data.copy_from_at(at, &sector.to_le_bytes().repeat(SECTOR / size_of::<u64>()));
        }
        Progress::Done(Ok(()))
    }

    // The device is read-only, so that none of these is asked for.
    fn write(&mut self, (): &mut (), _: u64, _: &mut GuestIo, _: bool, _: &mut Io<'_>) -> Progress {
        refused()
    }

    fn discard(&mut self, (): &mut (), _: u64, _: u64, _: bool, _: &mut Io<'_>) -> Progress {
        refused()
    }

    fn write_zeroes(&mut self, (): &mut (), _: u64, _: u64, _: bool, _: bool, _: &mut Io<'_>) -> Progress {
        refused()
    }

    fn flush(&mut self, (): &mut (), _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn resume(&mut self, (): &mut (), _: &mut GuestIo, _: i32, _: &mut Io<'_>) -> Progress {
        refused()
    }
}

fn refused() -> Progress {
    Progress::Done(Err(io::ErrorKind::ReadOnlyFilesystem.into()))
}

/// Serves disks whose sectors hold their own numbers.
#[derive(Parser)]
struct Cli {
    /// Add a disk. Keys: size=SIZE, queues=N, queue-size=N, serial=TEXT
    #[arg(long)]
    disk: Vec<String>,
    #[command(flatten)]
    serve: ServeOptions,
}

fn main() -> ExitCode {
    let program = Program {
        name: "pattern",
        kind: "disk",
        read: |text| keyval::from_str::<BlockOptions>(text, Some("size")).map_err(|error| error.to_string()),
        queues: |options: &BlockOptions| options.queues.into(),
        open: |name, options, pool| {
            let capacity = options.size.filter(|size| *size > 0 && size.is_multiple_of(SECTOR as u64));
            let capacity = capacity.ok_or("size= is missing, or no multiple of 512")?;
            let geometry =
                Geometry { capacity, logical_block: 512, physical_block: 4096, readonly: true, discard: false };
            Ok(Box::new(BlockDevice::over(name, Pattern(geometry), options, pool)))
        },
    };
    match usage::parse::<Cli>("pattern", |command| command) {
        Ok(cli) => serve(&program, &cli.serve, &cli.disk).into(),
        Err(message) => {
            eprintln!("pattern: {message}");
            Exit::Configuration.into()
        }
    }
}
