//! A NIC in a daemon of its own. Its tap is opened here, so that it stays while the daemon does not.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringvm_backends::io::reactor::ReactorOptions;
use ringvm_backends::net::{Mac, NetOptions};
use ringvm_backends::options::Checked;
use ringvm_cli::keyval;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::{PlaceError, common_arguments, program};
use crate::vhost_user::peer::{INHERITED, Peer, Program};
use crate::vhost_user::{VhostUserDevice, Wanted};

const PROGRAM: &str = "ringvm-net";

/// Starts a daemon for a NIC, and connects to it.
///
/// # Errors
/// Anything that is wrong with the options, the port or the daemon.
pub fn nic_in_daemon(
    name: &str,
    options: &Checked<NetOptions>,
    reactors: &ReactorOptions,
    stats: bool,
) -> Result<VhostUserDevice, PlaceError> {
    let host = |what, source| PlaceError::Host { device: name.to_owned(), what, source };
    // The NIC keeps its address when its daemon is started again.
    let mac = Mac(options.mac_or_random().map_err(|source| host("making an address", source))?);
    let mut inherited: Vec<Arc<OwnedFd>> = Vec::new();
    let mut told = NetOptions { mac: Some(mac), ..(**options).clone() };
    if options.link.is_none() && !options.loopback {
        let port = options.open()?;
        inherited.extend((0..port.pairs()).map(|pair| port.ends(pair).rx));
        told.tap = None;
        told.fds = (INHERITED..).take(inherited.len()).collect();
        told.mtu = told.mtu.or(port.mtu());
    }
    let net = keyval::to_string(&told).map_err(|error| host("writing the options", io::Error::other(error)))?;
    let mut words = vec!["--net".into(), net.into()];
    words.extend(common_arguments(name, reactors, 2 * usize::from(options.queues), stats));
    let wanted = Wanted { device_type: VIRTIO_ID_NET, queues: None, queue_size: options.queue_size };
    let peer = Peer::Program(Program::new(program(PROGRAM), words, inherited));
    Ok(VhostUserDevice::connect(name, peer, &wanted)?)
}
