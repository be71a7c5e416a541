//! The messages about the table of requests in flight (vhost-user specification, "Inflight I/O tracking"). Its layout is the
//! business of the backends.

use std::io;
use std::os::fd::OwnedFd;

use ringvm_backends::virtqueue::inflight::InflightArea;
use vhost::vhost_user::message::VhostUserInflight;

use crate::mailbox::Event;
use crate::sigbus::{self, Guard};

/// Tables that rings are served with. The guard goes first.
#[derive(Debug)]
pub(crate) struct Inflight {
    _guard: Guard,
    area: InflightArea,
}

impl Inflight {
    /// The tables.
    pub(crate) fn area(&self) -> &InflightArea {
        &self.area
    }
}

/// Makes an area for as many queues as the frontend asks for, of at most `queues` and `size`.
pub(crate) fn make(asked: &VhostUserInflight, queues: u16, size: u16) -> io::Result<(VhostUserInflight, InflightArea)> {
    check(asked, queues, size)?;
    let area = InflightArea::new(asked.num_queues, asked.queue_size)?;
    Ok((VhostUserInflight::new(area.size(), 0, asked.num_queues, asked.queue_size), area))
}

/// Continues with an area that the frontend has kept. Its maker may have made it unsealable (DPDK): a table that is
/// truncated while its queue runs ends the session.
pub(crate) fn take(
    given: &VhostUserInflight,
    file: OwnedFd,
    queues: u16,
    size: u16,
    alarm: &Event,
) -> io::Result<Inflight> {
    check(given, queues, size)?;
    let VhostUserInflight { mmap_offset, mmap_size, num_queues, queue_size } = *given;
    let area = InflightArea::from_unsteady_file(file, mmap_offset, mmap_size, num_queues, queue_size)?;
    Ok(Inflight { _guard: sigbus::protect(area.extent(), alarm)?, area })
}

fn check(said: &VhostUserInflight, queues: u16, size: u16) -> io::Result<()> {
    if said.num_queues > queues || said.queue_size > size {
        let what = format!("{} queues of {} are more than {queues} of {size}", said.num_queues, said.queue_size);
        return Err(invalid(what));
    }
    Ok(())
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
