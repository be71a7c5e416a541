//! Devices that are written for rust-vmm's backend trait: served in this process or in a daemon, where they stay. Their
//! backend can leave nothing for another to go on with.

use std::ffi::OsString;
use std::io;
use std::sync::Arc;

use ringvm_backends::device::Device;
use ringvm_backends::options::{Check, Checked};
use ringvm_cli::keyval;
use ringvm_hosted::console::{ConsoleBackend, End};
use ringvm_hosted::vsock;
use serde::Serialize;
use virtio_bindings::virtio_ids::{VIRTIO_ID_CONSOLE, VIRTIO_ID_VSOCK};

use super::{Place, PlaceError, common_arguments, program};
use crate::config::{ConsoleDevice, VsockDevice};
use crate::console::terminal::Resized;
use crate::vhost_user::peer::{Peer, Program};
use crate::vhost_user::{VhostUserDevice, Wanted};

/// Descriptors of their queues.
const QUEUE_SIZE: u16 = 256;

/// Opens a console. `terminal` is its end if that is the standard input and output of this process. Also returns what to
/// call when the size of the terminal has changed.
///
/// # Errors
/// Anything that is wrong with its end on the host, or its daemon.
pub fn open_console(
    name: &str,
    options: &ConsoleDevice,
    terminal: Option<End>,
    stats: bool,
) -> Result<(Box<dyn Device>, Option<Resized>), PlaceError> {
    if options.place == Place::Daemon {
        let wanted = Wanted::new(VIRTIO_ID_CONSOLE, Some(2), QUEUE_SIZE);
        return Ok((daemon(name, ("ringvm-console", "--console"), &options.console, &wanted, stats)?, None));
    }
    let end = match terminal {
        Some(end) => end,
        None => End::open(name, &checked(name, &options.console)?)?,
    };
    let (device, console) = ConsoleBackend::host(name, end)?;
    if let Some(path) = console.slave() {
        eprintln!("ringvm: {name} is the terminal {}", path.display());
    }
    // The device alone keeps it: what is left of the output is written when that goes.
    let console = Arc::downgrade(&console);
    let resized = move || console.upgrade().iter().for_each(|console| console.update_size());
    Ok((Box::new(device), options.is_stdio().then(|| Box::new(resized) as Resized)))
}

/// Opens a vsock device.
///
/// # Errors
/// Anything that is wrong with its socket, or its daemon.
pub fn open_vsock(name: &str, options: &VsockDevice, stats: bool) -> Result<Box<dyn Device>, PlaceError> {
    if options.place == Place::Daemon {
        let wanted = Wanted::new(VIRTIO_ID_VSOCK, Some(3), QUEUE_SIZE);
        return daemon(name, ("ringvm-vsock", "--vsock"), &options.vsock, &wanted, stats);
    }
    Ok(Box::new(vsock::open(name, &checked(name, &options.vsock)?)?))
}

/// Options that were checked with those around them.
fn checked<T: Check + Clone>(name: &str, options: &T) -> Result<Checked<T>, PlaceError> {
    let refused = |error| PlaceError::Host {
        device: name.to_owned(),
        what: "reading its options",
        source: io::Error::new(io::ErrorKind::InvalidInput, error),
    };
    Checked::new(options.clone()).map_err(refused)
}

/// Has a program of ours serve a device.
fn daemon<T: Serialize>(
    name: &str,
    (file, option): (&str, &str),
    options: &T,
    wanted: &Wanted,
    stats: bool,
) -> Result<Box<dyn Device>, PlaceError> {
    let text = keyval::to_string(options).map_err(|error| PlaceError::Host {
        device: name.to_owned(),
        what: "writing its daemon's options",
        source: io::Error::other(error),
    })?;
    let mut words: Vec<OsString> = vec![option.into(), text.into()];
    words.extend(common_arguments(name, stats));
    let program = Program::new(program(file), words, Vec::new());
    Ok(Box::new(VhostUserDevice::connect(name, Peer::Program(program), wanted)?))
}
