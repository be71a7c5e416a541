//! A device that is served in this process or in a daemon, and stays where it is: its backend can leave nothing for
//! another to go on with.

use std::ffi::OsString;

use ringvm_backends::device::Device;
use ringvm_backends::io::reactor::ReactorOptions;

use super::{Place, PlaceError, common_arguments, program};
use crate::vhost_user::peer::{Peer, Program};
use crate::vhost_user::{VhostUserDevice, Wanted};

/// The daemon of such a device.
pub struct HostedDaemon<'a> {
    /// The program, and its option for a device.
    pub program: &'static str,
    /// That option.
    pub option: &'static str,
    /// The options of this device.
    pub text: String,
    /// What the driver is to get.
    pub wanted: Wanted,
    /// How its I/O threads behave.
    pub reactors: &'a ReactorOptions,
    /// Whether it prints its statistics when it ends.
    pub stats: bool,
}

/// Opens a device in a place; `here` makes it in this process.
///
/// # Errors
/// What `here` says, or anything that is wrong with the daemon.
pub fn open_hosted(
    name: &str,
    place: Place,
    daemon: HostedDaemon<'_>,
    here: impl FnOnce() -> Result<Box<dyn Device>, PlaceError>,
) -> Result<Box<dyn Device>, PlaceError> {
    if place == Place::Process {
        return here();
    }
    let mut words: Vec<OsString> = vec![daemon.option.into(), daemon.text.into()];
    words.extend(common_arguments(name, daemon.reactors, 1, daemon.stats));
    let program = Program::new(program(daemon.program), words, Vec::new());
    Ok(Box::new(VhostUserDevice::connect(name, Peer::Program(program), &daemon.wanted)?))
}
