//! A disk in a directory: a file for each 64 MiB of it, made when it is first written to. For anybody whose storage is
//! more than one file: operations are async code, as many at once as a request needs.
//!
//!     cargo run --release --example chunks -- --socket /run/c.sock --disk path=/var/lib/disk,size=1T,queues=2
//!     ringvm run --kernel vmlinuz … --disk socket=/run/c.sock,queues=2

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Parser;
use ringvm_backends::block::storage::Geometry;
use ringvm_backends::block::storage::tasks::AsyncStorage;
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::io::tasks::{read_exact_at, write_all_at};
use ringvm_backends::virtqueue::buffers::GuestIo;
use ringvm_cli::{keyval, usage};
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};
use tokio_uring::fs::{File, OpenOptions};

const CHUNK: u64 = 64 << 20;
/// Of fallocate(2): FALLOC_FL_ZERO_RANGE, FALLOC_FL_KEEP_SIZE.
const ZERO_RANGE: i32 = 0x10 | 0x01;

/// The storage of one queue.
struct Chunks {
    dir: PathBuf,
    readonly: bool,
    open: RefCell<HashMap<u64, Rc<File>>>,
    /// Chunks that some queue has written to.
    written: Arc<Mutex<BTreeSet<u64>>>,
}

/// The parts of a range that lie in one chunk each: its number, the offset there and the length.
fn parts(mut offset: u64, len: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let end = offset + len;
    std::iter::from_fn(move || {
        let (chunk, at) = (offset / CHUNK, offset % CHUNK);
        let len = (CHUNK - at).min(end - offset);
        offset += len;
        (len > 0).then_some((chunk, at, len))
    })
}

impl Chunks {
    /// A chunk's file; with `create`, one that does not exist is made.
    async fn file(&self, chunk: u64, create: bool) -> io::Result<Rc<File>> {
        if let Some(file) = self.open.borrow().get(&chunk) {
            return Ok(Rc::clone(file));
        }
        let path = self.dir.join(format!("{chunk}.chunk"));
        let file = OpenOptions::new().read(true).write(!self.readonly).open(&path).await;
        let file = match file {
            Err(error) if error.kind() == io::ErrorKind::NotFound && create => {
                let file = OpenOptions::new().read(true).write(true).create(true).open(&path).await?;
                File::open(&self.dir).await?.sync_all().await?;
                file
            }
            file => file?,
        };
        if !self.readonly {
            // Also one that was made and not filled: the host may have had no room, or have stopped in between.
            file.fallocate(0, CHUNK, 0).await?;
        }
        Ok(Rc::clone(self.open.borrow_mut().entry(chunk).or_insert_with(|| Rc::new(file))))
    }

    /// A chunk's file, to change it.
    async fn file_to_write(&self, chunk: u64) -> io::Result<Rc<File>> {
        let file = self.file(chunk, true).await?;
        self.written.lock().unwrap_or_else(PoisonError::into_inner).insert(chunk);
        Ok(file)
    }
}

impl AsyncStorage for Chunks {
    async fn read(&self, offset: u64, mut data: GuestIo) -> io::Result<()> {
        for (chunk, at, len) in parts(offset, data.len()) {
            let data = data.split_to(len);
            match self.file(chunk, false).await {
                Ok(file) => read_exact_at(&file, data, at).await?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => _ = data.copy_from(&vec![0; len as usize]),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn write(&self, offset: u64, mut data: GuestIo, durable: bool) -> io::Result<()> {
        for (chunk, at, len) in parts(offset, data.len()) {
            write_all_at(&*self.file_to_write(chunk).await?, data.split_to(len), at).await?;
        }
        if durable { self.flush().await } else { Ok(()) }
    }

    async fn flush(&self) -> io::Result<()> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for chunk in written {
            self.file(chunk, false).await?.sync_data().await?;
        }
        Ok(())
    }

    async fn discard(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into()) // Not offered.
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _: bool, durable: bool) -> io::Result<()> {
        for (chunk, at, len) in parts(offset, len) {
            self.file_to_write(chunk).await?.fallocate(at, len, ZERO_RANGE).await?;
        }
        if durable { self.flush().await } else { Ok(()) }
    }
}

/// Serves disks that lie in directories.
#[derive(Parser)]
struct Cli {
    /// Add a disk. Keys: path=DIR, size=SIZE, readonly=on|off, queues=N, queue-size=N, serial=TEXT
    #[arg(long)]
    disk: Vec<String>,
    #[command(flatten)]
    serve: ServeOptions,
}

fn main() -> ExitCode {
    let program = Program {
        name: "chunks",
        kind: "disk",
        read: |text| keyval::from_str::<BlockOptions>(text, Some("path")).map_err(|error| error.to_string()),
        queues: |options: &BlockOptions| options.queues.into(),
        open: |name, options, pool| {
            let dir = options.path.clone().filter(|path| path.is_dir()).ok_or("path= is missing, or no directory")?;
            let capacity = options.size.filter(|size| *size > 0 && size.is_multiple_of(512));
            let capacity = capacity.ok_or("size= is missing, or no multiple of 512")?;
            let readonly = options.readonly;
            let geometry = Geometry { capacity, logical_block: 512, physical_block: 4096, readonly, discard: false };
            let written = Arc::<Mutex<BTreeSet<u64>>>::default();
            let make =
                move || Chunks { dir: dir.clone(), readonly, open: RefCell::default(), written: Arc::clone(&written) };
            Ok(Box::new(BlockDevice::over_async(name, geometry, make, options, pool)))
        },
    };
    match usage::parse::<Cli>("chunks", |command| command) {
        Ok(cli) => serve(&program, &cli.serve, &cli.disk).into(),
        Err(message) => {
            eprintln!("chunks: {message}");
            Exit::Configuration.into()
        }
    }
}
