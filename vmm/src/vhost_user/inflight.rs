//! The table of requests in flight that a daemon has made. It outlives the daemon here. The daemon may still have its
//! file open and do anything to it, so the table is only ever copied (pread, pwrite), never mapped.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use ringvm_backends::virtqueue::inflight::{InflightArea, InflightTable};
use vhost::vhost_user::message::VhostUserInflight;

use super::error::LinkError;

/// The memory with the tables of all queues.
pub(super) struct Inflight {
    about: VhostUserInflight,
    file: File,
}

impl Inflight {
    /// Takes the memory that a daemon has made. It takes nothing but memory: reading a file of another kind may wait
    /// for the server of its file system.
    pub(super) fn new(about: VhostUserInflight, file: File) -> Result<Self, LinkError> {
        // The kernel answers this for memory files alone, and asks no file system.
        if rustix::fs::fcntl_get_seals(file.as_fd()).is_err() {
            return Err(LinkError::broken("GET_INFLIGHT_FD", "its table of requests in flight is no memfd"));
        }
        Ok(Self { about, file })
    }

    pub(super) fn about(&self) -> &VhostUserInflight {
        &self.about
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Takes a queue's unanswered heads out of its table.
    pub(super) fn take_out(&self, index: u16, size: u16, used: u16) -> Vec<u16> {
        // A table that can't be read was never written to by a daemon that serves anything.
        self.with_copy(index, |table| table.take_out(size, used)).unwrap_or_default()
    }

    /// Puts a queue's unanswered heads into its table.
    pub(super) fn put_in(
        inflight: Option<&Self>,
        index: u16,
        size: u16,
        used: u16,
        left: &[u16],
    ) -> Result<(), LinkError> {
        let what = "handing over requests in flight";
        let inflight = inflight.ok_or_else(|| LinkError::ours(what, "it keeps no table of them"))?;
        inflight
            .with_copy(index, |table| table.put_in(size, used, left))
            .map_err(|error| LinkError::ours(what, error.to_string()))
    }

    /// Does something to a copy of a queue's table, and writes it back.
    fn with_copy<T>(
        &self,
        index: u16,
        work: impl FnOnce(&mut InflightTable) -> Result<T, &'static str>,
    ) -> io::Result<T> {
        let VhostUserInflight { mmap_size, mmap_offset, queue_size, .. } = self.about;
        let area = InflightArea::new(1, queue_size)?;
        let at = area.size() * u64::from(index);
        let place = mmap_offset.checked_add(at).filter(|_| at + area.size() <= mmap_size);
        let place = place.ok_or_else(|| io::Error::other("it is too short for so many queues"))?;
        let mut bytes = vec![0; area.size() as usize];
        self.file.read_exact_at(&mut bytes, place)?;
        area.file().write_all_at(&bytes, 0)?;
        let mut table = area.table(0).ok_or_else(|| io::Error::other("there is no such table"))?;
        let result = work(&mut table).map_err(io::Error::other)?;
        area.file().read_exact_at(&mut bytes, 0)?;
        self.file.write_all_at(&bytes, place)?;
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, SealFlags};

    use super::*;

    const SIZE: u16 = 16;

    fn about(len: u64, offset: u64) -> VhostUserInflight {
        VhostUserInflight { mmap_size: len, mmap_offset: offset, num_queues: 2, queue_size: SIZE }
    }

    /// A daemon's memory, not sealed, with an offset.
    fn made(offset: u64) -> (Inflight, File) {
        let len = InflightArea::new(2, SIZE).unwrap().size();
        let file = File::from(rustix::fs::memfd_create("inflight", MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(offset + len).unwrap();
        (Inflight::new(about(len, offset), file.try_clone().unwrap()).unwrap(), file)
    }

    #[test]
    fn what_is_put_into_a_table_is_taken_out_of_it() {
        let (inflight, file) = made(24);
        Inflight::put_in(Some(&inflight), 1, SIZE, 7, &[3, 1]).unwrap();
        assert_eq!(inflight.take_out(0, SIZE, 7), [0_u16; 0]);
        assert_eq!(inflight.take_out(1, SIZE, 7), [3, 1]);
        assert_eq!(inflight.take_out(1, SIZE, 7), [0_u16; 0], "only once");
        assert_eq!(file.metadata().unwrap().len(), 24 + inflight.about.mmap_size);
    }

    #[test]
    fn a_table_that_its_daemon_cuts_short_is_an_error() {
        let (inflight, file) = made(0);
        Inflight::put_in(Some(&inflight), 1, SIZE, 7, &[3, 1]).unwrap();
        for len in [100, 0] {
            // Mapped, this would be a SIGBUS.
            file.set_len(len).unwrap();
            assert_eq!(inflight.take_out(1, SIZE, 7), [0_u16; 0]);
            Inflight::put_in(Some(&inflight), 1, SIZE, 7, &[3]).unwrap_err();
            assert_eq!(file.metadata().unwrap().len(), len, "and it is not made longer");
        }
    }

    #[test]
    fn tables_outside_their_file_are_an_error() {
        let (_, file) = made(0);
        for (len, offset) in [(64, 0), (u64::MAX, u64::MAX), (4096, 1 << 62), (4096, i64::MAX as u64)] {
            let inflight = Inflight::new(about(len, offset), file.try_clone().unwrap()).unwrap();
            assert_eq!(inflight.take_out(1, SIZE, 0), [0_u16; 0], "{len} at {offset}");
        }
    }

    #[test]
    fn a_table_in_no_memfd_is_refused() {
        let (pipe, _writer) = std::io::pipe().unwrap();
        for file in [File::open("/proc/self/exe").unwrap(), File::from(std::os::fd::OwnedFd::from(pipe))] {
            assert!(Inflight::new(about(4096, 0), file).is_err());
        }
        let (inflight, file) = made(0);
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        assert!(Inflight::put_in(Some(&inflight), 0, SIZE, 0, &[1]).is_err(), "one that can't be written to either");
    }
}
