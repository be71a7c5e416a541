//! The messages about the table of requests in flight (vhost-user specification, "Inflight I/O tracking"). Its layout is the
//! business of the backends.

use std::io;
use std::os::fd::OwnedFd;

use ringvm_backends::inflight::InflightArea;
use rustix::fs::SealFlags;
use vhost::vhost_user::message::VhostUserInflight;

/// Makes an area for as many queues as the frontend asks for, of at most `queues` and `size`.
pub(crate) fn make(asked: &VhostUserInflight, queues: u16, size: u16) -> io::Result<(VhostUserInflight, InflightArea)> {
    check(asked, queues, size)?;
    let area = InflightArea::new(asked.num_queues, asked.queue_size)?;
    Ok((VhostUserInflight::new(area.size(), 0, asked.num_queues, asked.queue_size), area))
}

/// Goes on with an area that the frontend has kept.
pub(crate) fn take(given: &VhostUserInflight, file: OwnedFd, queues: u16, size: u16) -> io::Result<InflightArea> {
    check(given, queues, size)?;
    // A table is read and written by pointer for as long as a queue runs: its file must keep its size.
    let _ = rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK);
    if !rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        return Err(invalid("its file is not a memfd sealed against shrinking".into()));
    }
    InflightArea::from_file(file, given.mmap_offset, given.mmap_size, given.num_queues, given.queue_size)
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
