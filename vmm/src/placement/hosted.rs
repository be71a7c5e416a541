//! Devices that are written for rust-vmm's backend trait: served in this process or in a daemon, where they stay. Their
//! backend can leave nothing for another to go on with.

use std::ffi::OsString;
use std::io;

use ringvm_backends::device::Device;
use ringvm_backends::io::reactor::ReactorOptions;
use ringvm_backends::options::{Check, Checked};
use ringvm_cli::keyval;
use ringvm_hosted::console::{ConsoleBackend, End};
use ringvm_hosted::vsock;
use serde::Serialize;
use virtio_bindings::virtio_ids::{VIRTIO_ID_CONSOLE, VIRTIO_ID_VSOCK};

use super::{Place, PlaceError, common_arguments, program};
use crate::config::{ConsoleDevice, VsockDevice};
use crate::vhost_user::peer::{Peer, Program};
use crate::vhost_user::{VhostUserDevice, Wanted};

/// Descriptors of their queues.
const QUEUE_SIZE: u16 = 256;

/// Opens a console. `stdio` are the input and output of this process, if the console is theirs.
///
/// # Errors
/// Anything that is wrong with its end on the host, or its daemon.
pub fn open_console(
    name: &str,
    options: &ConsoleDevice,
    stdio: impl FnOnce() -> io::Result<End>,
    reactors: &ReactorOptions,
    stats: bool,
) -> Result<Box<dyn Device>, PlaceError> {
    if options.place == Place::Daemon {
        let wanted = Wanted::new(VIRTIO_ID_CONSOLE, Some(2), QUEUE_SIZE);
        return daemon(name, ("ringvm-console", "--console"), &options.console, &wanted, reactors, stats);
    }
    let host = |what| move |source| PlaceError::Host { device: name.to_owned(), what, source };
    let end = if options.is_stdio() {
        stdio().map_err(host("opening the terminal"))?
    } else {
        End::open(name, &checked(&options.console)?).map_err(|error| PlaceError::Hosted(error.to_string()))?
    };
    let (device, console) = ConsoleBackend::host(name, end).map_err(|error| PlaceError::Hosted(error.to_string()))?;
    if let Some(path) = console.slave() {
        eprintln!("ringvm: {name} is the terminal {}", path.display());
    }
    Ok(Box::new(device))
}

/// Opens a vsock device.
///
/// # Errors
/// Anything that is wrong with its socket, or its daemon.
pub fn open_vsock(
    name: &str,
    options: &VsockDevice,
    reactors: &ReactorOptions,
    stats: bool,
) -> Result<Box<dyn Device>, PlaceError> {
    if options.place == Place::Daemon {
        let wanted = Wanted::new(VIRTIO_ID_VSOCK, Some(3), QUEUE_SIZE);
        return daemon(name, ("ringvm-vsock", "--vsock"), &options.vsock, &wanted, reactors, stats);
    }
    let device = vsock::open(name, &checked(&options.vsock)?).map_err(|error| PlaceError::Hosted(error.to_string()))?;
    Ok(Box::new(device))
}

/// Options that were checked with those around them.
fn checked<T: Check + Clone>(options: &T) -> Result<Checked<T>, PlaceError> {
    Checked::new(options.clone()).map_err(PlaceError::Hosted)
}

/// Has a program of ours serve a device.
fn daemon<T: Serialize>(
    name: &str,
    (file, option): (&str, &str),
    options: &T,
    wanted: &Wanted,
    reactors: &ReactorOptions,
    stats: bool,
) -> Result<Box<dyn Device>, PlaceError> {
    let text = keyval::to_string(options).map_err(|error| PlaceError::Host {
        device: name.to_owned(),
        what: "writing its daemon's options",
        source: io::Error::other(error),
    })?;
    let mut words: Vec<OsString> = vec![option.into(), text.into()];
    words.extend(common_arguments(name, reactors, 1, stats));
    let program = Program::new(program(file), words, Vec::new());
    Ok(Box::new(VhostUserDevice::connect(name, Peer::Program(program), wanted)?))
}
