//! The table of requests in flight, in memory that outlives the server of the queue, so that its successor can
//! continue after a crash (vhost-user specification, "Inflight I/O tracking", split virtqueues).
//!
//! Every head that is popped is marked with a running number, and unmarked once its completion is published. Two more
//! fields tell what happened in between: a batch of completions is linked up before the used index is published, and
//! the table's own copy of that index follows after the marks are gone. A successor that finds both indices different
//! knows that the linked batch was published and its marks are stale; it serves all others again, in their old order.
#![allow(unsafe_code, reason = "maps and shares memory with other processes")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::host::shared::{Mapping, SharedFile};

/// The only version of the layout.
const VERSION: u16 = 1;
/// Tables of different queues share no cache line.
const ALIGN: u64 = 64;
/// The header before the entries: features, version, number of entries, head of the last batch, used index.
const HEADER_LEN: u64 = 16;
/// An entry: the mark, five bytes of nothing, the link, the running number.
const ENTRY_LEN: u64 = 16;
/// Most entries of a table, the largest split virtqueue.
const MAX_ENTRIES: u16 = 1 << 15;

const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;
const LINK_AT: usize = 6;
const NUMBER_AT: usize = 8;

/// Bytes of the table of a queue of `size` descriptors.
fn table_len(size: u16) -> u64 {
    (HEADER_LEN + ENTRY_LEN * u64::from(size)).next_multiple_of(ALIGN)
}

/// Memory with the tables of all queues of a device.
#[derive(Clone, Debug)]
pub struct InflightArea {
    map: Arc<Map>,
    queues: u16,
    queue_size: u16,
}

impl InflightArea {
    /// Makes one with nothing in flight.
    ///
    /// # Errors
    /// An invalid size, or the host's error.
    pub fn new(queues: u16, queue_size: u16) -> io::Result<Self> {
        check(queues, queue_size)?;
        let len = table_len(queue_size) * u64::from(queues);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("ringvm-inflight", flags)?;
        rustix::fs::ftruncate(&file, len)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = SharedFile::new(file)?;
        let map = file.map(0, len)?;
        Ok(Self { map: Arc::new(Map { file, len, map }), queues, queue_size })
    }

    /// Continues with one that another process has kept.
    ///
    /// # Errors
    /// When it is too small for so many queues of that size, can't be mapped, or may be truncated by its owner: then
    /// use [`Self::from_unsteady_file`] and [`InflightFile`].
    pub fn from_file(file: OwnedFd, offset: u64, len: u64, queues: u16, queue_size: u16) -> io::Result<Self> {
        let area = Self::from_unsteady_file(file, offset, len, queues, queue_size)?;
        if !area.map.file.is_steady() {
            return Err(invalid("its file is not a memfd of ordinary pages that is sealed against shrinking".into()));
        }
        Ok(area)
    }

    /// The same with a file that its owner may be able to cut short: touching a table that is gone raises SIGBUS, for which the
    /// caller is prepared over all of [`Self::extent`].
    ///
    /// # Errors
    /// When it is too small for so many queues of that size, or can't be mapped.
    pub fn from_unsteady_file(file: OwnedFd, offset: u64, len: u64, queues: u16, queue_size: u16) -> io::Result<Self> {
        let file = SharedFile::new(file)?;
        let len = check_place(&file, offset, len, queues, queue_size)?;
        let map = file.map(offset, len)?;
        Ok(Self { map: Arc::new(Map { file, len, map }), queues, queue_size })
    }

    /// The file that holds it; from its beginning on, if it was made here.
    #[must_use]
    pub fn file(&self) -> &File {
        self.map.file.file()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.map.len
    }

    /// Where it is mapped: an address and a length.
    #[must_use]
    pub fn extent(&self) -> (usize, usize) {
        self.map.map.extent()
    }

    /// How many queues it has tables for.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The largest queue that its tables are made for.
    #[must_use]
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// The table of one queue.
    #[must_use]
    pub fn table(&self, index: u16) -> Option<InflightTable> {
        let at = table_len(self.queue_size) * u64::from(index);
        // SAFETY: the mapping holds the tables of all queues.
        let base = (index < self.queues).then(|| unsafe { self.map.map.base().add(at as usize) })?;
        Some(InflightTable {
            base,
            entries: self.queue_size,
            next_number: 0,
            batch: Vec::new(),
            _map: Arc::clone(&self.map),
        })
    }
}

fn check(queues: u16, queue_size: u16) -> io::Result<()> {
    if queues == 0 || queue_size == 0 || queue_size > MAX_ENTRIES {
        return Err(invalid(format!("there is no table for {queues} queues of {queue_size} descriptors")));
    }
    Ok(())
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// Checks where an area is said to be. Returns how long it has to be.
fn check_place(file: &SharedFile, offset: u64, len: u64, queues: u16, queue_size: u16) -> io::Result<u64> {
    check(queues, queue_size)?;
    let needed = table_len(queue_size) * u64::from(queues);
    if len < needed {
        let what = format!("{len} bytes are too few for the tables of {queues} queues of {queue_size} descriptors");
        return Err(invalid(what));
    }
    if !offset.is_multiple_of(8) {
        return Err(invalid(format!("a table can't begin at {offset}, which is no multiple of 8")));
    }
    file.check(offset, len)?;
    Ok(needed)
}

/// A mapped area.
#[derive(Debug)]
struct Map {
    file: SharedFile,
    len: u64,
    map: Mapping,
}

/// Tables in a file whose owner may truncate it, for code that serves no queue: they are read and written, never
/// mapped.
#[derive(Debug)]
pub struct InflightFile {
    file: SharedFile,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

impl InflightFile {
    /// Looks at the file.
    ///
    /// # Errors
    /// When it is no shared memory, or too small for so many queues of that size.
    pub fn new(file: OwnedFd, offset: u64, len: u64, queues: u16, queue_size: u16) -> io::Result<Self> {
        let file = SharedFile::new(file)?;
        check_place(&file, offset, len, queues, queue_size)?;
        Ok(Self { file, offset, queues, queue_size })
    }

    /// [`InflightTable::take_out`] of the table of queue `index`.
    ///
    /// # Errors
    /// A table that is not there any more, or that can't be the queue's.
    pub fn take_out(&self, index: u16, size: u16, used: u16) -> io::Result<Vec<u16>> {
        self.change(index, |table| table.take_out(size, used))
    }

    /// [`InflightTable::put_in`] of the table of queue `index`.
    ///
    /// # Errors
    /// A table that is not there any more, or that can't be the queue's; heads that can't be either.
    pub fn put_in(&self, index: u16, size: u16, used: u16, left: &[u16]) -> io::Result<()> {
        self.change(index, |table| table.put_in(size, used, left))
    }

    /// Changes a copy of the table and writes it back. The table has no other user: its queue is not served.
    fn change<T>(
        &self,
        index: u16,
        change: impl FnOnce(&mut InflightTable) -> Result<T, &'static str>,
    ) -> io::Result<T> {
        if index >= self.queues {
            return Err(invalid(format!("there is no table of queue {index} among {}", self.queues)));
        }
        let copy = InflightArea::new(1, self.queue_size)?;
        let mut bytes = vec![0; table_len(self.queue_size) as usize];
        let at = self.offset + table_len(self.queue_size) * u64::from(index);
        self.file.file().read_exact_at(&mut bytes, at)?;
        copy.file().write_all_at(&bytes, 0)?;
        let mut table = copy.table(0).expect("it has one");
        let done = change(&mut table).map_err(|reason| invalid(reason.into()))?;
        copy.file().read_exact_at(&mut bytes, 0)?;
        self.file.file().write_all_at(&bytes, at)?;
        Ok(done)
    }
}

/// A place between two stores that others can see, where a process may end. The compiler keeps the order of the stores around
/// it, and the processor shows it to others.
#[inline(always)]
pub(crate) fn crash_point() {
    fence(Ordering::Release);
    #[cfg(test)]
    tests::may_crash();
}

/// The requests in flight of one queue.
#[derive(Debug)]
pub struct InflightTable {
    base: *mut u8,
    entries: u16,
    next_number: u64,
    /// Heads completed and not published.
    batch: Vec<u16>,
    _map: Arc<Map>,
}

// SAFETY: the pointer goes into `_map`, which moves along.
unsafe impl Send for InflightTable {}

impl InflightTable {
    /// Takes over from the queue's previous server, which has published `used`: returns the heads to serve again,
    /// oldest first.
    ///
    /// # Errors
    /// A table of another layout, or one for smaller queues.
    pub(crate) fn take_over(&mut self, size: u16, used: u16) -> Result<Vec<u16>, &'static str> {
        let too_small = "the table of requests in flight is for smaller queues";
        if size > self.entries {
            return Err(too_small);
        }
        match self.word(VERSION_AT).load(Ordering::Relaxed) {
            0 => {
                self.word(ENTRIES_AT).store(self.entries, Ordering::Relaxed);
                self.word(VERSION_AT).store(VERSION, Ordering::Relaxed);
            }
            VERSION if self.word(ENTRIES_AT).load(Ordering::Relaxed) < size => return Err(too_small),
            VERSION => {}
            _ => return Err("the table of requests in flight has another version"),
        }
        let published = used.wrapping_sub(self.word(USED_AT).load(Ordering::Relaxed));
        let mut head = self.word(LAST_BATCH_AT).load(Ordering::Relaxed);
        for _ in 0..published.min(size) {
            if head >= size {
                break;
            }
            self.mark(head).store(0, Ordering::Relaxed);
            head = self.link(head).load(Ordering::Relaxed);
        }
        self.word(USED_AT).store(used, Ordering::Release);
        let mut heads: Vec<(u64, u16)> = (0..size)
            .filter(|&head| self.mark(head).load(Ordering::Relaxed) == 1)
            .map(|head| (self.number(head).load(Ordering::Relaxed), head))
            .collect();
        heads.sort_unstable();
        self.next_number = heads.last().map_or(0, |&(number, _)| number.wrapping_add(1));
        Ok(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// Takes the unanswered heads out of the table, oldest first, for a server that keeps none. `used` was published
    /// last.
    ///
    /// # Errors
    /// A table of another layout, or one for smaller queues.
    pub fn take_out(&mut self, size: u16, used: u16) -> Result<Vec<u16>, &'static str> {
        let heads = self.take_over(size, used)?;
        heads.iter().for_each(|&head| self.returned(head));
        Ok(heads)
    }

    /// Puts the heads that a server without a table has left into this one, for the next server of the queue.
    ///
    /// # Errors
    /// A table of another layout, or one for smaller queues, or heads that can't be the queue's.
    pub fn put_in(&mut self, size: u16, used: u16, left: &[u16]) -> Result<(), &'static str> {
        self.take_over(size, used)?;
        if left.iter().any(|&head| head >= size) {
            return Err("no such descriptor can be in flight");
        }
        left.iter().for_each(|&head| self.popped(head));
        Ok(())
    }

    /// A head was popped.
    pub(crate) fn popped(&mut self, head: u16) {
        self.number(head).store(self.next_number, Ordering::Relaxed);
        crash_point();
        self.next_number = self.next_number.wrapping_add(1);
        self.mark(head).store(1, Ordering::Release);
        crash_point();
    }

    /// A head is as if it had never been popped.
    pub(crate) fn returned(&mut self, head: u16) {
        self.mark(head).store(0, Ordering::Release);
        crash_point();
    }

    /// A head is in the used ring, and will be published with the next batch.
    pub(crate) fn completed(&mut self, head: u16) {
        self.link(head).store(self.word(LAST_BATCH_AT).load(Ordering::Relaxed), Ordering::Relaxed);
        crash_point();
        self.word(LAST_BATCH_AT).store(head, Ordering::Release);
        crash_point();
        self.batch.push(head);
    }

    /// The used index was published.
    pub(crate) fn published(&mut self, used: u16) {
        for &head in &self.batch {
            self.mark(head).store(0, Ordering::Relaxed);
            crash_point();
        }
        self.batch.clear();
        self.word(USED_AT).store(used, Ordering::Release);
        crash_point();
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        // SAFETY: the constants lie in the header, on even addresses: tables begin on multiples of 8.
        unsafe { &*self.base.add(at).cast() }
    }

    fn entry(&self, head: u16) -> *mut u8 {
        assert!(head < self.entries, "heads are checked against the queue, and queues against the table");
        // SAFETY: the table has so many entries.
        unsafe { self.base.add((HEADER_LEN + ENTRY_LEN * u64::from(head)) as usize) }
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        // SAFETY: the first byte of an entry.
        unsafe { &*self.entry(head).cast() }
    }

    fn link(&self, head: u16) -> &AtomicU16 {
        // SAFETY: inside of an entry, on an even address.
        unsafe { &*self.entry(head).add(LINK_AT).cast() }
    }

    fn number(&self, head: u16) -> &AtomicU64 {
        // SAFETY: inside of an entry, on a multiple of 8.
        unsafe { &*self.entry(head).add(NUMBER_AT).cast() }
    }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
