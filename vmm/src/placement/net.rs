//! A NIC that is served in this process or in a daemon. Its port is opened here, once, and lent to either: frames in
//! a tap or a socket stay there while the NIC is not served, and the peer at the other end notices nothing.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::net::port::{Filter, Offloads, Port};
use ringvm_backends::net::{Lent, Mac, NetDevice, NetOptions};
use ringvm_backends::options::Checked;
use ringvm_cli::keyval;
use tracing::warn;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::placed::{Server, Source};
use super::{Mover, PlaceError, PlacedDevice, Threads, common_arguments, program, reactor_arguments};
use crate::config::Place;
use crate::vhost_user::peer::{INHERITED, Peer, Program};
use crate::vhost_user::{VhostUserDevice, Wanted};

const PROGRAM: &str = "ringvm-net";

/// Opens a NIC in a place. `pool` serves it here.
///
/// # Errors
/// Anything that is wrong with the options, the port or the daemon.
pub fn open_nic(
    name: &str,
    place: Place,
    options: &Checked<NetOptions>,
    reactors: &ReactorOptions,
    pool: Option<&ReactorPool>,
    stats: bool,
) -> Result<(PlacedDevice, Mover), PlaceError> {
    let port = options.open()?;
    let what = "making a MAC address";
    let mac = options.mac_or_random().map_err(|source| PlaceError::Host { device: name.to_owned(), what, source })?;
    let threads = Threads::new(reactors, pool);
    let nic = Nic { name: name.to_owned(), options: options.clone(), stats, port, mac, threads };
    nic.reset();
    PlacedDevice::open(Arc::new(nic), place)
}

/// The parts needed to serve a NIC anywhere.
struct Nic {
    name: String,
    options: Checked<NetOptions>,
    stats: bool,
    port: Arc<dyn Port>,
    /// The same in every place.
    mac: [u8; 6],
    threads: Threads,
}

impl Nic {
    /// The descriptors lent to a daemon: of a tap one for each pair, of sockets the one to read from and then the one
    /// to write to.
    fn lends(&self) -> Vec<Arc<OwnedFd>> {
        let ends = (0..self.port.pairs()).map(|pair| self.port.ends(pair));
        if self.options.link.is_some() || self.options.loopback {
            ends.flat_map(|ends| [ends.rx, ends.tx]).collect()
        } else {
            ends.map(|ends| ends.rx).collect()
        }
    }
}

impl Source for Nic {
    fn name(&self) -> &str {
        &self.name
    }

    fn serve(&self, place: Place) -> Result<Box<dyn Server>, PlaceError> {
        let Self { name, options, stats, port, mac, threads } = self;
        match place {
            Place::Process => {
                let (port, pool) = (Arc::clone(port), threads.pool(name)?);
                Ok(Box::new(NetDevice::over_lent(name, port, *mac, options, &pool)))
            }
            Place::Daemon => {
                let inherited = self.lends();
                let net = arguments(options, &**port, *mac, inherited.len()).map_err(|error| PlaceError::Host {
                    device: name.clone(),
                    what: "writing its daemon's options",
                    source: io::Error::other(error),
                })?;
                let mut words = vec!["--net".into(), net];
                words.extend(common_arguments(name, *stats));
                words.extend(reactor_arguments(&threads.reactors, 2 * usize::from(options.queues)));
                let wanted = Wanted::new(VIRTIO_ID_NET, None, options.queue_size);
                let peer = Peer::Program(Program::new(program(PROGRAM), words, inherited));
                Ok(Box::new(VhostUserDevice::connect(name, peer, &wanted)?))
            }
        }
    }

    /// Brings the port to its state for a fresh driver: whole frames, all of them, on one pair.
    fn reset(&self) {
        // Ports that filter nothing say so, and bring everything anyway.
        drop(self.port.set_filter(&Filter { promiscuous: true, ..Filter::default() }));
        let single = self.port.set_pairs(1).and_then(|()| self.port.set_offloads(Offloads::default()));
        if let Err(error) = single {
            warn!(%error, "bringing the port back to its first state");
        }
    }
}

impl Server for NetDevice {}

/// The daemon's options for the NIC: the same, with its open port lent as so many descriptors.
fn arguments(options: &NetOptions, port: &dyn Port, mac: [u8; 6], lent: usize) -> Result<OsString, keyval::Error> {
    let told = NetOptions {
        tap: None,
        fds: (INHERITED..).take(lent).collect(),
        lent: Some(Lent::of(port.offloads())),
        mac: Some(Mac(mac)),
        queues: port.pairs() as u16,
        mtu: options.mtu.or(port.mtu()),
        ..options.clone()
    };
    Ok(keyval::to_string(&told)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_told_all_that_its_options_take() {
        let link = std::env::temp_dir().join("a,mac=b \"link\"");
        for (options, lent) in [
            (NetOptions { loopback: true, queues: 2, ..NetOptions::default() }, 4),
            (NetOptions { link: Some(link), mtu: Some(9000), queue_size: 512, ..NetOptions::default() }, 2),
        ] {
            let loopback = NetOptions { loopback: true, queues: options.queues, ..NetOptions::default() };
            let port = Checked::new(loopback).unwrap().open().unwrap();
            let text = arguments(&options, &*port, [2, 0, 0, 0, 0, 1], lent).unwrap();
            let read = keyval::read::<Checked<NetOptions>>(text.to_str().unwrap()).unwrap().into_inner();
            let fds = (INHERITED..).take(lent).collect();
            let (mac, lent) = (Some(Mac([2, 0, 0, 0, 0, 1])), Some(Lent::All));
            assert_eq!(read, NetOptions { fds, lent, mac, ..options });
        }
    }
}
