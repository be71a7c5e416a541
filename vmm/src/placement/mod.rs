//! Where devices are served: in this process, in daemons of its own, or in third-party daemons. One word of the
//! configuration.

mod disk;
mod hosted;
mod net;
mod placed;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use ringvm_backends::block;
use ringvm_backends::device::DeviceError;
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::net as nic;
use ringvm_cli::io_options::IoOptions;
use ringvm_hosted::{HostedError, console, vsock};
use thiserror::Error;

use crate::vhost_user::ConnectError;

pub use crate::config::Place;
pub use disk::open_disk;
pub use hosted::{open_console, open_vsock};
pub use net::open_nic;
pub use placed::{Moved, Mover, PlacedDevice};

/// Where the programs are, if not next to this one.
const DAEMONS: &str = "RINGVM_DAEMONS";

/// Why a device is not where it should be.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// A disk can't be opened.
    #[error(transparent)]
    Disk(#[from] block::OpenError),
    /// A NIC's port can't be opened.
    #[error(transparent)]
    Net(#[from] nic::OpenError),
    /// A console's end on the host can't be opened.
    #[error(transparent)]
    Console(#[from] console::OpenError),
    /// A vsock device can't be opened.
    #[error(transparent)]
    Vsock(#[from] vsock::OpenError),
    /// A backend can't be a device.
    #[error(transparent)]
    Hosted(#[from] HostedError),
    /// Its daemon can't be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A queue can't be served there.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The host ran out of something.
    #[error("{device}: {what}: {source}")]
    Host {
        /// Name of the device.
        device: String,
        /// The operation that failed.
        what: &'static str,
        /// The error that it returned.
        source: std::io::Error,
    },
    /// No other process can map the guest's memory.
    #[error("{device}: the guest's memory is private (--memory ksm=on), so that no daemon can serve it")]
    Private {
        /// Name of the device.
        device: String,
    },
    /// The device's daemon is away, and requests in flight with it.
    #[error("{device}: its daemon is away, so that it can't move now; it comes back by itself")]
    Away {
        /// Name of the device.
        device: String,
    },
}

/// I/O threads of this process for one device, started when it is served here first.
struct Threads {
    reactors: ReactorOptions,
    pool: Mutex<Option<ReactorPool>>,
}

impl Threads {
    /// Those of `pool`, or threads of the device's own.
    fn new(reactors: &ReactorOptions, pool: Option<&ReactorPool>) -> Self {
        Self { reactors: reactors.clone(), pool: Mutex::new(pool.cloned()) }
    }

    fn pool(&self, device: &str) -> Result<ReactorPool, PlaceError> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = &*pool {
            return Ok(pool.clone());
        }
        let what = "starting I/O threads";
        let new = ReactorPool::new(&self.reactors);
        let new = new.map_err(|source| PlaceError::Host { device: device.to_owned(), what, source })?;
        Ok(pool.insert(new).clone())
    }
}

/// The path of a program of ours: next to this one, or where the environment says.
fn program(name: &str) -> PathBuf {
    match std::env::var_os(DAEMONS) {
        Some(dir) => PathBuf::from(dir).join(name),
        None => std::env::current_exe().map_or_else(|_| name.into(), |exe| exe.with_file_name(name)),
    }
}

/// Arguments for every daemon.
fn common_arguments(name: &str, stats: bool) -> Vec<OsString> {
    let mut words = vec!["--name".into(), name.into()];
    words.extend(stats.then(|| "--stats".into()));
    words
}

/// Arguments for a daemon that serves so many queues on I/O threads.
fn reactor_arguments(reactors: &ReactorOptions, queues: usize) -> Vec<OsString> {
    let mut words = IoOptions::of(reactors, queues).arguments();
    if reactors.hold_memory > 0 {
        words.push(format!("--hold-memory={}", reactors.hold_memory));
    }
    words.into_iter().map(OsString::from).collect()
}
