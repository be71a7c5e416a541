//! Requests from here to the frontend (vhost-user specification, "Back-end communication"). There is one so far: that
//! the configuration space has changed.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_vhost_user::connection::{Connection, Limit};
use ringvm_vhost_user::message;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use vhost::vhost_user::message::BackendReq;

/// Makes an interrupt that tells the frontend of a change of the configuration space; `None` if the descriptor is no
/// stream socket. The message asks for no answer, and none is awaited: raising the interrupt never blocks.
pub(crate) fn config_change(socket: OwnedFd) -> Option<Interrupt> {
    let is_stream = socket_domain(&socket) == Ok(AddressFamily::UNIX) && socket_type(&socket) == Ok(SocketType::STREAM);
    if !is_stream {
        return None;
    }
    let connection = Connection::new(socket.into());
    let changed = message::request(BackendReq::CONFIG_CHANGE_MSG, false, &[]);
    Some(Interrupt::Call(Arc::new(move || {
        // A frontend that does not read what it was told before will read the configuration space when it does.
        if let Err(error) = connection.send(&changed, &[], Limit::now()) {
            tracing::info!(%error, "telling the frontend that the configuration space has changed");
        }
    })))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_change_is_told_in_one_message_and_nobody_waits_for_a_reader() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let notify = config_change(theirs.into()).unwrap();
        notify.raise();
        let mut message = [0; 12];
        ours.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let begun = Instant::now();
        (0..100_000).for_each(|_| notify.raise());
        assert!(begun.elapsed() < Duration::from_secs(30));
        drop(ours);
        notify.raise();
    }

    #[test]
    fn only_stream_sockets_will_do() {
        let (datagrams, _other) = UnixDatagram::pair().unwrap();
        assert!(config_change(datagrams.into()).is_none());
        assert!(config_change(std::fs::File::open("/dev/null").unwrap().into()).is_none());
    }
}
