//! The data ring: the only place that builds io_uring submissions for guest I/O.
//!
//! Each I/O thread owns one, next to the runtime that the thread parks in. A plain ring costs half the CPU of the
//! runtime's own at depth 1 and lets the thread poll for completions. Operations are pushed as they come and entered
//! with one system call per batch.
//!
//! Buffers belong to the code that pushes: the contract of [`Ring::read`] and [`Ring::write`] is that they stay
//! mapped until the completion was reaped. Dropping the ring waits for everything in flight, because closing an
//! io_uring does not stop writes into memory.
#![allow(unsafe_code, reason = "submission entries carry raw addresses; see the module's contract")]

mod memory;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Submitter, opcode, squeue, types};

pub use self::memory::Budget;
use self::memory::HeldMemory;
use crate::virtqueue::GuestMemory;
use crate::virtqueue::buffers::{MAX_BYTES, MAX_PIECES};

/// Submission entries of a ring. More than that wait in a queue of ours, which only costs speed.
const ENTRIES: u32 = 1024;

/// Most kernel threads of a kind (for files and block devices, for all else) that do for an I/O thread what would make it wait.
/// They are how many operations are under way at once on file systems that know no other way, such as NFS.
const MAX_WORKERS: u32 = 64;

/// Whose completion it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The queue, as numbered by its reactor.
    pub task: u32,
    /// The request, as numbered by its queue.
    pub slot: u32,
}

/// The token of a cancellation itself: its completion belongs to no request.
const CANCEL: Token = Token { task: u32::MAX, slot: u32::MAX };

impl Token {
    fn pack(self) -> u64 {
        u64::from(self.task) << 32 | u64::from(self.slot)
    }

    fn unpack(data: u64) -> Self {
        Self { task: (data >> 32) as u32, slot: data as u32 }
    }
}

/// One io_uring and what waits for room in it.
pub struct Ring {
    ring: IoUring,
    backlog: VecDeque<squeue::Entry>,
    /// Pushed and not reaped, the backlog included.
    in_flight: usize,
    /// Entries in the submission queue that the kernel has not taken.
    staged: usize,
    /// Files that the kernel holds for this ring, by descriptor.
    held: Vec<Option<Held>>,
    /// Free places in the kernel's table of them; `None` if it has none.
    places: Option<Vec<u32>>,
    memory: HeldMemory,
}

/// A file that the kernel holds.
#[derive(Clone, Copy)]
struct Held {
    place: u32,
    users: u32,
}

/// Most files that are held for a ring. Others are looked up by the kernel for every operation.
const MAX_HELD: u32 = 256;

impl Ring {
    /// Creates a ring for the calling thread.
    ///
    /// # Errors
    /// When the kernel has no io_uring, forbids it, or lacks memory that may be locked.
    pub fn new() -> io::Result<Self> {
        Self::with_budget(Arc::new(Budget::new(u64::MAX)))
    }

    /// The same, with a bound of the guest memory that it holds together with others.
    ///
    /// # Errors
    /// When the kernel has no io_uring, forbids it, or lacks memory that may be locked.
    pub fn with_budget(budget: Arc<Budget>) -> io::Result<Self> {
        // Each flag helps, but none is required: kernels before 6.0 know fewer.
        let wished: [fn(&mut io_uring::Builder); 3] = [
            |b| {
                b.setup_coop_taskrun().setup_taskrun_flag().setup_single_issuer();
            },
            |b| {
                b.setup_coop_taskrun().setup_taskrun_flag();
            },
            |_| {},
        ];
        let mut last = None;
        for wish in wished {
            let mut builder = IoUring::builder();
            builder.dontfork().setup_cqsize(ENTRIES * 2);
            wish(&mut builder);
            match builder.build(ENTRIES) {
                Ok(ring) => {
                    bound_workers(&ring.submitter());
                    return Ok(Self {
                        ring,
                        backlog: VecDeque::new(),
                        in_flight: 0,
                        staged: 0,
                        held: Vec::new(),
                        places: None,
                        memory: HeldMemory::new(budget),
                    });
                }
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => last = Some(e),
                Err(e) => return Err(e),
            }
        }
        Err(last.expect("every wish was tried"))
    }

    /// Has the kernel hold a file for operations to come, which saves it the look-up each time. [`Self::release`] must be
    /// called before the descriptor is closed.
    pub fn hold(&mut self, fd: BorrowedFd<'_>) {
        let raw = fd.as_raw_fd();
        let index = raw as usize;
        if self.held.len() <= index {
            self.held.resize(index + 1, None);
        }
        if let Some(held) = &mut self.held[index] {
            held.users += 1;
            return;
        }
        if let Some(place) = self.register(raw) {
            self.held[index] = Some(Held { place, users: 1 });
        }
    }

    /// Has the kernel keep a file open for as long as the ring exists, which is until nothing is in flight in it, whatever becomes
    /// of the process. The descriptor may be closed afterwards. Returns whether the kernel can.
    pub fn keep(&mut self, fd: BorrowedFd<'_>) -> bool {
        self.register(fd.as_raw_fd()).is_some()
    }

    /// Puts a file into the kernel's table, and returns its place there.
    fn register(&mut self, fd: RawFd) -> Option<u32> {
        let submitter = self.ring.submitter();
        let places = self.places.get_or_insert_with(|| {
            let made = submitter.register_files_sparse(MAX_HELD);
            // Kernels before 5.19 have no empty tables.
            if made.is_ok() { (0..MAX_HELD).rev().collect() } else { Vec::new() }
        });
        let &place = places.last()?;
        submitter.register_files_update(place, &[fd]).ok()?;
        places.pop();
        Some(place)
    }

    /// The counterpart of [`Self::hold`]. Nothing with the file may be in flight any more.
    pub fn release(&mut self, fd: BorrowedFd<'_>) {
        let Some(entry) = self.held.get_mut(fd.as_raw_fd() as usize) else { return };
        let Some(held) = entry else { return };
        held.users -= 1;
        if held.users > 0 {
            return;
        }
        let place = held.place;
        *entry = None;
        // Taking a file out of the table can't fail for a place that is in it.
        let emptied = self.ring.submitter().register_files_update(place, &[-1]);
        debug_assert!(emptied.is_ok(), "{emptied:?}");
        if let Some(places) = &mut self.places {
            places.push(place);
        }
    }

    /// Has the kernel hold guest memory for operations to come, which saves it the pages' look-up each time. All of it is
    /// allocated and locked by that, at [`Self::hold_more`]. [`Self::release_memory`] must be called before it is unmapped.
    pub fn hold_memory(&mut self, memory: &GuestMemory) {
        self.memory.hold(memory);
    }

    /// Whether there is guest memory that is to be held and is not.
    #[must_use]
    pub fn wants_memory(&self) -> bool {
        self.memory.is_wanting()
    }

    /// Has the kernel hold the next piece of what is to be held, which may take it milliseconds. Returns whether there was one.
    ///
    /// # Errors
    /// When the kernel can't (before 5.19), or may lock no more memory, or has this from a file that it locks nothing of, or the
    /// budget is spent. It is used like any other then, and not tried again.
    pub fn hold_more(&mut self) -> io::Result<bool> {
        self.memory.hold_more(&self.ring.submitter())
    }

    /// The counterpart of [`Self::hold_memory`]. Nothing with this memory may be in flight any more.
    pub fn release_memory(&mut self, memory: &GuestMemory) {
        self.memory.release(&self.ring.submitter(), memory);
    }

    /// How an operation names a file, and the flag that goes with it.
    #[inline]
    fn name(&self, fd: BorrowedFd<'_>) -> (types::Fd, squeue::Flags) {
        match self.held.get(fd.as_raw_fd() as usize) {
            Some(Some(held)) => (types::Fd(held.place as RawFd), squeue::Flags::FIXED_FILE),
            _ => (types::Fd(fd.as_raw_fd()), squeue::Flags::empty()),
        }
    }

    /// Reads at `offset` into the pieces, at most [`MAX_PIECES`] of them, and of a single one at most [`MAX_BYTES`].
    ///
    /// # Safety
    /// The pieces must stay mapped, the list in place and `fd` open until the completion for `token` was reaped or the ring
    /// dropped.
    pub unsafe fn read(&mut self, token: Token, fd: BorrowedFd<'_>, pieces: &[libc::iovec], offset: u64) {
        let (fd, flags) = self.name(fd);
        let entry = self.entry_for_read(fd, pieces, offset, 0);
        self.push(token, entry.flags(flags));
    }

    /// Reads from what has no offset into the pieces, at most [`MAX_PIECES`] of them, or completes with EAGAIN at once.
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub unsafe fn read_now(&mut self, token: Token, fd: BorrowedFd<'_>, pieces: &[libc::iovec]) {
        // O_NONBLOCK alone would not do: io_uring waits on behalf of such files.
        let (fd, flags) = self.name(fd);
        let entry = self.entry_for_read(fd, pieces, u64::MAX, libc::RWF_NOWAIT);
        self.push(token, entry.flags(flags));
    }

    #[inline]
    fn entry_for_read(&self, fd: types::Fd, pieces: &[libc::iovec], offset: u64, flags: i32) -> squeue::Entry {
        let [piece] = pieces else {
            let count = pieces.len().min(MAX_PIECES) as u32;
            return opcode::Readv::new(fd, pieces.as_ptr(), count).offset(offset).rw_flags(flags).build();
        };
        let (at, len) = (piece.iov_base.cast(), one_piece(piece));
        match self.memory.place(piece) {
            Some(place) => opcode::ReadFixed::new(fd, at, len, place).offset(offset).rw_flags(flags).build(),
            None => opcode::Read::new(fd, at, len).offset(offset).rw_flags(flags).build(),
        }
    }

    /// Writes the pieces at `offset`; with `durable`, the completion means that they are on stable storage.
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub unsafe fn write(
        &mut self,
        token: Token,
        fd: BorrowedFd<'_>,
        pieces: &[libc::iovec],
        offset: u64,
        durable: bool,
    ) {
        let (fd, held) = self.name(fd);
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        let entry = if let [piece] = pieces {
            let (at, len) = (piece.iov_base.cast(), one_piece(piece));
            match self.memory.place(piece) {
                Some(place) => opcode::WriteFixed::new(fd, at, len, place).offset(offset).rw_flags(flags).build(),
                None => opcode::Write::new(fd, at, len).offset(offset).rw_flags(flags).build(),
            }
        } else {
            let count = pieces.len().min(MAX_PIECES) as u32;
            opcode::Writev::new(fd, pieces.as_ptr(), count).offset(offset).rw_flags(flags).build()
        };
        self.push(token, entry.flags(held));
    }

    /// Makes the file's data durable.
    ///
    /// # Safety
    /// `fd` must stay open until the completion for `token` was reaped or the ring dropped.
    pub unsafe fn sync_data(&mut self, token: Token, fd: BorrowedFd<'_>) {
        let (fd, flags) = self.name(fd);
        self.push(token, opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build().flags(flags));
    }

    /// Deallocates or zeroes a range; `mode` is that of fallocate(2).
    ///
    /// # Safety
    /// As for [`Self::sync_data`].
    pub unsafe fn fallocate(&mut self, token: Token, fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) {
        let (fd, flags) = self.name(fd);
        self.push(token, opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build().flags(flags));
    }

    /// Completes with the events when any of `events` (poll(2)), an error or a hang-up is there.
    ///
    /// # Safety
    /// As for [`Self::sync_data`].
    pub unsafe fn poll(&mut self, token: Token, fd: BorrowedFd<'_>, events: u32) {
        let (fd, flags) = self.name(fd);
        self.push(token, opcode::PollAdd::new(fd, events).build().flags(flags));
    }

    /// Ends the operation pushed for `token`, if it waits; it completes with ECANCELED then, and as usual if it does not.
    pub fn cancel(&mut self, token: Token) {
        let entry = opcode::AsyncCancel::new(token.pack()).build();
        self.push(CANCEL, entry);
    }

    #[inline(always)]
    fn push(&mut self, token: Token, entry: squeue::Entry) {
        self.in_flight += 1;
        let entry = entry.user_data(token.pack());
        if !self.backlog.is_empty() || !self.stage(&entry) {
            // A clone: `entry` never has its address taken then, and is written straight into the queue.
            self.put_off(entry.clone());
        }
    }

    #[cold]
    fn put_off(&mut self, entry: squeue::Entry) {
        self.backlog.push_back(entry);
    }

    #[inline(always)]
    fn stage(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: what the entry points to is kept alive by the contract of the method that built it.
        let staged = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.staged += usize::from(staged);
        staged
    }

    /// Enters the pushed operations. Those that the kernel does not take now are entered at the next call.
    ///
    /// # Errors
    /// When the kernel refuses for a reason that waiting does not cure.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.staged > 0 || !self.backlog.is_empty() {
            while let Some(entry) = self.backlog.pop_front() {
                if !self.stage(&entry) {
                    self.backlog.push_front(entry);
                    break;
                }
            }
            match self.ring.submit() {
                Ok(taken) => {
                    self.staged -= taken.min(self.staged);
                    if taken == 0 {
                        return Ok(());
                    }
                }
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Completions must be reaped, or memory freed, first; the entries stay in the queue.
                    Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => return Ok(()),
                    _ => return Err(e),
                },
            }
        }
        Ok(())
    }

    /// Whether anything pushed has not reached the kernel.
    #[must_use]
    pub fn has_unsubmitted(&self) -> bool {
        self.staged > 0 || !self.backlog.is_empty()
    }

    /// Whether a completion can be reaped; runs the kernel's deferred work if it asks for that.
    pub fn has_completions(&mut self) -> bool {
        if !self.ring.completion().is_empty() {
            return true;
        }
        let (taskrun, overflow) = {
            let sq = self.ring.submission();
            (sq.taskrun(), sq.cq_overflow())
        };
        if !taskrun && !overflow {
            return false;
        }
        // SAFETY: no argument is passed, nothing is submitted; this only lets the kernel post completions.
        drop(unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 0, ENTER_GETEVENTS, None) });
        !self.ring.completion().is_empty()
    }

    /// Takes one batch of completions into `into`, which is emptied first.
    pub fn reap(&mut self, into: &mut Vec<(Token, i32)>) {
        into.clear();
        for entry in self.ring.completion() {
            self.in_flight -= 1;
            let token = Token::unpack(entry.user_data());
            if token != CANCEL {
                into.push((token, entry.result()));
            }
        }
    }

    /// Operations pushed and not reaped.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The ring's descriptor, readable when there are completions.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Ring {
    /// Waits for everything in flight, because its buffers are about to go. Operations that wait for others are
    /// cancelled: those may never come.
    fn drop(&mut self) {
        let mut completions = Vec::new();
        while self.in_flight > 0 {
            let limit = types::Timespec::from(ENDS_BY_ITSELF);
            let wait = types::SubmitArgs::new().timespec(&limit);
            let entered = self.submit().and_then(|()| self.ring.submitter().submit_with_args(1, &wait).map(drop));
            if let Err(e) = &entered
                && e.raw_os_error() == Some(libc::ETIME)
            {
                // Kernels before 5.19 don't know this; what waits there ends with whom it waits for.
                let all = types::CancelBuilder::any();
                self.push(CANCEL, opcode::AsyncCancel2::new(all).build());
                continue;
            }
            if let Err(e) = entered
                && !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM))
            {
                // The ring itself is broken. Memory that the kernel may still write to must not be reused.
                tracing::error!(in_flight = self.in_flight, error = %e, "data ring can't be drained, ending the process");
                std::process::abort();
            }
            self.reap(&mut completions);
        }
        if self.places.is_some() {
            // Unregister now rather than when the kernel gets to it: the next process that opens such a file must not
            // find it in use.
            _ = self.ring.submitter().unregister_files();
        }
        if self.memory.has_table() {
            _ = self.ring.submitter().unregister_buffers();
        }
    }
}

/// Longest time that storage takes for what is in flight when a ring goes; what is left then waits for others.
const ENDS_BY_ITSELF: Duration = Duration::from_secs(1);

const ENTER_GETEVENTS: u32 = 1;

/// The rest comes back as a short transfer.
fn one_piece(piece: &libc::iovec) -> u32 {
    piece.iov_len.min(MAX_BYTES as usize) as u32
}

/// Bounds the kernel's workers for the calling thread. Of itself the kernel starts up to four for each CPU, and of those that are
/// not for files as many as there may be processes: a guest decides how many operations wait.
fn bound_workers(submitter: &Submitter<'_>) {
    // Zero asks. Kernels before 5.15 answer with an error, and keep limits of their own.
    let mut limits = [0; 2];
    if submitter.register_iowq_max_workers(&mut limits).is_ok() {
        let mut bounded = limits.map(|limit| limit.min(MAX_WORKERS));
        let set = submitter.register_iowq_max_workers(&mut bounded);
        debug_assert!(set.is_ok(), "{set:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::memory::PIECE;
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn reap_all(ring: &mut Ring) -> Vec<(Token, i32)> {
        let (mut all, mut batch) = (Vec::new(), Vec::new());
        while ring.in_flight() > 0 {
            ring.submit().unwrap();
            if ring.has_completions() {
                ring.reap(&mut batch);
                all.append(&mut batch);
            }
        }
        all
    }

    #[test]
    fn pitfall_25_what_the_kernel_does_not_take_at_once_is_submitted_later() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abcdefgh").unwrap();
        let count = ENTRIES as usize * 3;
        let mut buffers = vec![[0u8; 2]; count];
        let mut pieces: Vec<_> =
            buffers.iter_mut().map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 2 }).collect();
        let mut ring = Ring::new().unwrap();
        for (slot, piece) in pieces.iter_mut().enumerate() {
            let token = Token { task: 7, slot: slot as u32 };
            // SAFETY: buffers and pieces outlive the ring's last completion below.
            unsafe { ring.read(token, file.as_fd(), std::slice::from_ref(piece), (slot % 4 * 2) as u64) };
        }
        let mut done = reap_all(&mut ring);
        done.sort_by_key(|(token, _)| token.slot);
        assert_eq!(done.len(), count);
        for (slot, (token, result)) in done.into_iter().enumerate() {
            assert_eq!((token, result), (Token { task: 7, slot: slot as u32 }, 2));
            assert_eq!(&buffers[slot], &b"abcdefgh"[slot % 4 * 2..][..2]);
        }
    }

    #[test]
    fn the_kernel_has_few_workers_for_a_ring() {
        let ring = Ring::new().unwrap();
        let mut limits = [0; 2];
        match ring.ring.submitter().register_iowq_max_workers(&mut limits) {
            Ok(()) => assert!(limits.iter().all(|limit| (1..=MAX_WORKERS).contains(limit)), "{limits:?}"),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EINVAL), "only old kernels have no such limits"),
        }
    }

    #[test]
    fn a_file_that_is_held_is_written_and_read_like_any_other_until_its_last_user_releases_it() {
        let file = tempfile::tempfile().unwrap();
        let (mut from, mut into) = (*b"held", [0; 4]);
        let piece = |bytes: &mut [u8; 4]| libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 4 };
        let pieces = [piece(&mut from), piece(&mut into)];
        let mut ring = Ring::new().unwrap();
        ring.hold(file.as_fd());
        ring.hold(file.as_fd());
        for users in [2, 1, 0] {
            let held = ring.held[file.as_raw_fd() as usize];
            assert_eq!(held.map_or(0, |held| held.users), users);
            assert_eq!(ring.name(file.as_fd()).1.contains(squeue::Flags::FIXED_FILE), users > 0);
            // SAFETY: the buffers outlive both operations, which have ended before the next begins.
            unsafe { ring.write(Token { task: 0, slot: 0 }, file.as_fd(), &pieces[..1], users.into(), false) };
            assert_eq!(reap_all(&mut ring), [(Token { task: 0, slot: 0 }, 4)]);
            // SAFETY: as above.
            unsafe { ring.read(Token { task: 0, slot: 1 }, file.as_fd(), &pieces[1..], users.into()) };
            assert_eq!(reap_all(&mut ring), [(Token { task: 0, slot: 1 }, 4)]);
            assert_eq!(into, from);
            ring.release(file.as_fd());
        }
    }

    fn hold_all(ring: &mut Ring) -> io::Result<usize> {
        std::iter::repeat_with(|| ring.hold_more())
            .take_while(|more| !matches!(more, Ok(false)))
            .try_fold(0, |n, more| more.map(|_| n + 1))
    }

    #[test]
    fn a_file_that_is_kept_is_open_until_the_ring_goes() {
        let is_open = |reader: &io::PipeReader| {
            let mut fds = [rustix::event::PollFd::new(reader, rustix::event::PollFlags::empty())];
            rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())) == Ok(0)
        };
        let (reader, writer) = io::pipe().unwrap();
        let mut ring = Ring::new().unwrap();
        assert!(ring.keep(writer.as_fd()));
        let number = writer.as_raw_fd();
        drop(writer);
        assert!(is_open(&reader));
        // The file that gets the number of the descriptor next is not taken for it.
        // SAFETY: the number is only looked up.
        let reused = unsafe { BorrowedFd::borrow_raw(number) };
        assert!(!ring.name(reused).1.contains(squeue::Flags::FIXED_FILE));
        drop(ring);
        assert!(!is_open(&reader));
    }

    #[test]
    fn memory_that_is_held_is_written_and_read_like_any_other_until_its_last_user_releases_it() {
        const LEN: u64 = PIECE as u64 + (1 << 16);
        const END: u64 = PIECE as u64 - 2;
        const SECOND: u64 = 1 << 30;
        let ranges = [(GuestAddress(0), LEN as usize), (GuestAddress(SECOND), LEN as usize)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let file = tempfile::tempfile().unwrap();
        let mut ring = Ring::new().unwrap();
        let mut pieces = 0;
        for users in [0, 2, 1, 0] {
            if users == 2 {
                ring.hold_memory(&memory);
                ring.hold_memory(&memory);
                pieces = hold_all(&mut ring).unwrap();
            }
            for at in [100, END, LEN - 4, SECOND + 100, SECOND + LEN - 4] {
                let buffer = |at| libc::iovec {
                    iov_base: memory.get_host_address(GuestAddress(at)).unwrap().cast(),
                    iov_len: 4,
                };
                // Over the end of a piece, no place is named.
                assert_eq!(ring.memory.place(&buffer(at)).is_some(), users > 0 && at != END);
                memory.write_slice(b"held", GuestAddress(at)).unwrap();
                // SAFETY: the memory outlives both operations, which have ended before the next begins.
                unsafe { ring.write(Token { task: 0, slot: 0 }, file.as_fd(), &[buffer(at)], at, true) };
                assert_eq!(reap_all(&mut ring), [(Token { task: 0, slot: 0 }, 4)]);
                memory.write_slice(&[0; 4], GuestAddress(at)).unwrap();
                // SAFETY: as above.
                unsafe { ring.read(Token { task: 0, slot: 1 }, file.as_fd(), &[buffer(at)], at) };
                assert_eq!(reap_all(&mut ring), [(Token { task: 0, slot: 1 }, 4)]);
                assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(at)).unwrap(), *b"held");
            }
            if users > 0 {
                ring.release_memory(&memory);
            }
        }
        assert_eq!((pieces, ring.memory.free_places()), (4, 1 << 14));
        ring.hold_memory(&memory);
        hold_all(&mut ring).unwrap();
        let elsewhere = [0; 4];
        let outside = libc::iovec { iov_base: elsewhere.as_ptr().cast_mut().cast(), iov_len: 4 };
        assert_eq!(ring.memory.place(&outside), None);
    }

    #[test]
    fn memory_that_cannot_be_held_is_left_alone_and_what_was_held_before_stays() {
        let memory = || Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap());
        let (before, behind) = (memory(), memory());
        // Longer than what is in it, which the kernel finds when it comes to the second page.
        let file = rustix::fs::memfd_create("cut", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(file);
        file.set_len(1 << 16).unwrap();
        let offset = Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let cut = Arc::new(GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), 1 << 16, offset)]).unwrap());
        let place = |ring: &Ring, memory: &GuestMemory| {
            let at = memory.get_host_address(GuestAddress(0)).unwrap().cast();
            ring.memory.place(&libc::iovec { iov_base: at, iov_len: 4096 })
        };
        let mut ring = Ring::new().unwrap();
        ring.hold_memory(&cut);
        assert_eq!(hold_all(&mut ring).unwrap(), 1, "as long as it is whole it can be held");
        ring.release_memory(&cut);
        file.set_len(4096).unwrap();
        ring.hold_memory(&before);
        assert_eq!(hold_all(&mut ring).unwrap(), 1);
        ring.hold_memory(&cut);
        ring.hold_memory(&behind);
        hold_all(&mut ring).unwrap_err();
        assert_eq!(hold_all(&mut ring).unwrap(), 1, "what comes behind it is held, and it is not tried again");
        assert!(!ring.wants_memory());
        assert_eq!(place(&ring, &cut), None);
        assert!(place(&ring, &before).is_some() && place(&ring, &behind).is_some());
        for (memory, held) in [(&cut, 2), (&before, 1), (&behind, 0)] {
            ring.release_memory(memory);
            assert_eq!(ring.memory.free_places(), (1 << 14) - held);
        }
    }

    #[test]
    fn rings_hold_no_more_memory_than_they_may_together() {
        let memory = || Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PIECE + 4096)]).unwrap());
        let (first, second) = (memory(), memory());
        let budget = Arc::new(Budget::new(PIECE as u64 + 8192));
        let mut rings = [(); 2].map(|()| Ring::with_budget(Arc::clone(&budget)).unwrap());
        let held = |ring: &mut Ring, memory: &GuestMemory| {
            ring.hold_memory(memory);
            hold_all(ring).map_err(|error| error.kind())
        };
        for ring in &mut rings {
            assert_eq!(held(ring, &first), Ok(2), "what both hold counts once");
        }
        assert_eq!(held(&mut rings[0], &second), Err(io::ErrorKind::QuotaExceeded));
        assert_eq!(hold_all(&mut rings[0]).unwrap(), 0, "it is not tried again");
        rings[0].release_memory(&second);
        rings[0].release_memory(&first);
        assert_eq!(held(&mut rings[0], &second), Err(io::ErrorKind::QuotaExceeded), "the other ring has it still");
        rings[0].release_memory(&second);
        rings[1].release_memory(&first);
        assert_eq!(held(&mut rings[0], &second), Ok(2));
    }

    #[test]
    fn dropping_ends_what_waits_for_others() {
        let never = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let mut ring = Ring::new().unwrap();
        // SAFETY: the event outlives the ring.
        let fd = unsafe { BorrowedFd::borrow_raw(never.as_raw_fd()) };
        // SAFETY: as above.
        unsafe { ring.poll(Token { task: 0, slot: 0 }, fd, libc::POLLIN as u32) };
        ring.submit().unwrap();
        // SAFETY: as above.
        unsafe { ring.poll(Token { task: 0, slot: 1 }, fd, libc::POLLIN as u32) };
        drop(ring);
    }

    #[test]
    fn dropping_waits_for_what_is_in_flight() {
        let file = tempfile::tempfile().unwrap();
        let mut buffer = vec![5u8; 1 << 20];
        let piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut ring = Ring::new().unwrap();
        // SAFETY: the buffer outlives the ring.
        unsafe { ring.write(Token { task: 0, slot: 0 }, file.as_fd(), &[piece], 0, true) };
        drop(ring);
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    }
}
