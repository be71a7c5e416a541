//! A queue whose chains wait for input from outside: buffers are held until the source has a frame for them.
//!
//! Frames land in the driver's buffers without a copy. The source is read in bursts, each one batch of the data ring,
//! for as long as every read of a burst brings a frame; then a single poll waits for the next frame. On kernels
//! without non-blocking reads of the source (taps before 6.2 or so), the reads of a smaller burst wait instead. A
//! frame may fill several chains if the driver agreed to that; chains that a read had room in but did not need are
//! held for the next.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::io::ops::Io;
use crate::io::reactor::Task;
use crate::io::ring::{Ring, Token};
use crate::io::service::Service;
use crate::virtqueue::RingError;
use crate::virtqueue::buffers::{Chain, GuestIo, MAX_PIECES};

/// Where frames come from. Lives on one thread.
pub trait Source {
    /// Names of the counters: a frame delivered, then the names of [`Verdict::Drop`].
    const OPS: &'static [&'static str];

    /// Most bytes that one read can bring, so that many must be offered if the driver lets frames span chains.
    fn frame_len(&self) -> u64;

    /// Whether a frame may span chains.
    fn merges(&self) -> bool;

    /// Fewest bytes of a chain that can hold a frame where frames don't span chains: those of a header and of the
    /// addresses and type of an Ethernet frame.
    fn least_room(&self) -> u64 {
        26
    }

    /// Whether frames may come now. While they may not, reads find nothing or fail with EBADFD, and a kick of the
    /// queue tells when they may again.
    fn enabled(&self) -> bool {
        true
    }

    /// The source has failed for good.
    fn failed(&mut self) {}

    /// The descriptor to read and poll. Reading it must never wait.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Looks at a read that brought `len` bytes into `room`, which lies in `chains` chains once it is shared out.
    fn received(&mut self, room: &GuestIo, len: u64, chains: u16) -> Verdict;
}

/// The fate of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The driver gets it; payload bytes, for statistics.
    Deliver(u64),
    /// It is dropped and counted under this index of [`Source::OPS`].
    Drop(usize),
}

/// Index into [`Source::OPS`] under which delivered frames are counted.
const DELIVERED: usize = 0;

/// Reads of a burst: as many as lately brought something, and some more.
const LEAST_BURST: usize = 8;
const MOST_BURST: usize = 64;

/// The slot of the poll, beyond those of reads.
const POLL: u32 = MOST_BURST as u32;

/// Reads that wait at once, where they have to: each is woken for every frame.
const PATIENT: usize = 8;

/// Bytes that no read brings more of, whatever comes: a frame too long is cut by the room for it, but lies there first.
const MOST_RECEIVED: u64 = 4 << 20;

/// The least that drivers offer per chain: a frame of the usual MTU with its header.
const PLAIN_BUFFER: u64 = 1530;

/// Bursts that may be refused in a row before the source counts as gone: its queue may have been disabled and enabled
/// again in between.
const MAX_STRIKES: u8 = 3;

/// One read in flight: the chains that offer their room to it. Most need one, which stays where it was popped to.
#[derive(Default)]
struct Read {
    first: Chain,
    more: Vec<Chain>,
    /// The room of all of them, if there is more than one.
    joined: GuestIo,
}

impl Read {
    fn room(&self) -> &GuestIo {
        if self.more.is_empty() { &self.first.writable } else { &self.joined }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Wants to read.
    Ready,
    /// Reads are in flight.
    Reading,
    /// The source is empty, and polled.
    Polling,
    /// The driver has offered too little room.
    Starved,
    /// The source is disabled.
    Away,
    /// The source has failed for good.
    Dead,
}

/// A queue and the source that fills it.
pub struct Receiver<S: Source> {
    stock: Stock<S>,
    state: State,
    /// The kernel knows the addresses of their rooms, so they never move.
    reads: Vec<Read>,
    in_flight: usize,
    /// Reads of the next burst.
    burst: usize,
    /// Frames that the burst in flight has brought.
    brought: usize,
    /// A read of the burst found nothing.
    empty: bool,
    /// A read of the burst was refused, and how many bursts in a row were.
    refused: Option<i32>,
    strikes: u8,
    /// Reads wait for frames, for want of those that don't.
    patient: bool,
}

/// The chains that reads take, and return to when they have ended.
struct Stock<S: Source> {
    service: Service,
    source: S,
    /// Chains without a frame yet, in the driver's order.
    held: VecDeque<Chain>,
    /// Those that the burst in flight gives back.
    returned: Vec<Chain>,
    spare: Vec<Chain>,
}

impl<S: Source> Receiver<S> {
    /// A receiver for the queue of `service`.
    pub(crate) fn new(mut service: Service, source: S) -> Self {
        service.queue.writes_at_most(source.frame_len().max(MOST_RECEIVED));
        Self {
            stock: Stock { service, source, held: VecDeque::new(), returned: Vec::new(), spare: Vec::new() },
            state: State::Ready,
            reads: (0..MOST_BURST).map(|_| Read::default()).collect(),
            in_flight: 0,
            burst: LEAST_BURST,
            brought: 0,
            empty: false,
            refused: None,
            strikes: 0,
            patient: false,
        }
    }

    fn burst_ended(&mut self, ring: &mut Ring) {
        for chain in self.stock.returned.drain(..).rev() {
            self.stock.held.push_front(chain);
        }
        match self.refused.take() {
            Some(errno) if self.state != State::Away => {
                self.strikes += 1;
                if self.strikes >= MAX_STRIKES {
                    self.die(errno);
                }
            }
            _ => self.strikes = 0,
        }
        if matches!(self.state, State::Dead | State::Away) || !self.stock.service.is_running() {
            return;
        }
        self.state = State::Ready;
        let brought = std::mem::take(&mut self.brought);
        self.burst = (brought * 2).clamp(LEAST_BURST, MOST_BURST);
        if std::mem::take(&mut self.empty) {
            self.state = State::Polling;
            self.in_flight = 1;
            let mut io = Io::new(ring, Token { task: self.stock.service.task(), slot: POLL });
            #[allow(unsafe_code)]
            // SAFETY: the source keeps its descriptor for as long as the receiver lives.
            unsafe {
                io.wait_readable(self.stock.source.fd());
            }
        }
    }

    fn die(&mut self, errno: i32) {
        if self.state != State::Dead {
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::warn!(parent: self.stock.service.span(), %error, "what frames come from is gone");
            self.state = State::Dead;
            self.stock.source.failed();
        }
    }

    fn wants_buffers(&self) -> bool {
        self.stock.service.is_running() && self.state == State::Starved
    }
}

impl<S: Source> Stock<S> {
    /// Finds the next chain without a frame; `into` keeps its allocations. Returns whether there was one.
    fn next_chain(&mut self, into: &mut Chain) -> bool {
        if let Some(chain) = self.held.pop_front() {
            let spare = std::mem::replace(into, chain);
            self.put_by(spare);
            return true;
        }
        // Bounded by the queue size: a driver that refills while we return buffers must not keep us in this loop.
        for _ in 0..self.service.queue.size() {
            if !self.service.pop(into) {
                break;
            }
            if into.unmapped || into.writable.is_empty() {
                self.service.break_off(&RingError::Content { head: into.head, what: "no buffer to receive into" });
                break;
            }
            if self.source.merges() || into.writable.len() >= self.source.least_room() {
                return true;
            }
            // If it were held, it would be the first to be read into for ever, and each frame that came alone would
            // be lost in it. Drivers take an empty buffer for a frame that is too short (5.1.6.3.1 asks for far more
            // room than this).
            self.service.queue.complete(into.head, 0);
            self.service.stats.bad_chains += 1;
        }
        false
    }

    /// Keeps a chain that is done with, for its allocations.
    fn put_by(&mut self, mut chain: Chain) {
        chain.trim();
        self.spare.push(chain);
    }

    /// Whether the ring is so short that its driver may wait for frames before it offers more than `room`. Only a
    /// frame that does not fit is lost then, and counted.
    fn has_all_there_is(&self, room: u64) -> bool {
        let often = u64::from(self.service.queue.size()) / 2 * PLAIN_BUFFER;
        self.service.is_running() && often < self.source.frame_len() && room >= PLAIN_BUFFER
    }

    /// Collects room for one frame. Returns whether there was enough.
    fn gather(&mut self, read: &mut Read, index: usize) -> bool {
        if !self.next_chain(&mut read.first) {
            return false;
        }
        let want = if self.source.merges() { self.source.frame_len() } else { 1 };
        if read.first.writable.len() >= want && read.first.writable.pieces().len() <= MAX_PIECES {
            return true;
        }
        self.gather_more(read, index, want)
    }

    /// Adds chains to the first until there is room for a frame.
    fn gather_more(&mut self, read: &mut Read, index: usize, want: u64) -> bool {
        read.joined.clear();
        read.joined.append(&read.first.writable);
        let mut fits = read.joined.pieces().len() <= MAX_PIECES;
        while fits && read.joined.len() < want {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !self.next_chain(&mut chain) {
                self.put_by(chain);
                if index == 0 && self.has_all_there_is(read.joined.len()) {
                    return true;
                }
                break;
            }
            fits = read.joined.pieces().len() + chain.writable.pieces().len() <= MAX_PIECES;
            if !fits && read.joined.len() >= PLAIN_BUFFER {
                // Only a frame that does not fit into as many pieces as the kernel takes is lost, and counted.
                self.held.push_front(chain);
                return true;
            }
            read.joined.append(&chain.writable);
            read.more.push(chain);
        }
        if !fits {
            let head = read.more.last().map_or(read.first.head, |chain| chain.head);
            self.service.break_off(&RingError::Content { head, what: "receive buffers in too many pieces" });
        } else if read.joined.len() >= want {
            return true;
        }
        // Keep the collected chains until the driver has offered more.
        let kept = self.take(read).collect::<Vec<_>>();
        kept.into_iter().rev().for_each(|chain| self.held.push_front(chain));
        false
    }

    /// Takes the chains out of a read, in the driver's order.
    fn take<'a>(&mut self, read: &'a mut Read) -> impl Iterator<Item = Chain> + use<'a, S> {
        let empty = self.spare.pop().unwrap_or_default();
        std::iter::once(std::mem::replace(&mut read.first, empty)).chain(read.more.drain(..))
    }

    fn deliver(&mut self, read: &mut Read, len: u64) {
        let mut left = len;
        let mut count = 0u16;
        for chain in std::iter::once(&read.first).chain(&read.more) {
            if left > 0 {
                left -= left.min(chain.writable.len());
                count += 1;
            }
        }
        match self.source.received(read.room(), len, count) {
            Verdict::Deliver(bytes) => {
                let mut left = len;
                let part = left.min(read.first.writable.len());
                self.service.queue.complete(read.first.head, part as u32);
                left -= part;
                for chain in read.more.drain(..) {
                    if left > 0 {
                        let part = left.min(chain.writable.len());
                        self.service.queue.complete(chain.head, part as u32);
                        left -= part;
                        self.put_by(chain);
                    } else {
                        self.returned.push(chain);
                    }
                }
                self.service.stats.count(DELIVERED, bytes, true);
            }
            Verdict::Drop(why) => {
                self.service.stats.count(why, 0, false);
                let chains = self.take(read);
                self.returned.extend(chains);
            }
        }
    }
}

impl<S: Source> Task for Receiver<S> {
    fn service(&mut self) -> &mut Service {
        &mut self.stock.service
    }

    fn turn(&mut self, ring: &mut Ring) -> bool {
        let due = match self.state {
            State::Ready => true,
            State::Starved => self.stock.service.queue.has_avail(),
            State::Away => self.stock.source.enabled(),
            State::Reading | State::Polling | State::Dead => false,
        };
        // The kernel still uses the memory that the reads in flight point to.
        if !due || self.in_flight > 0 || !self.stock.service.is_running() {
            return false;
        }
        self.stock.service.disable_kicks();
        let burst = match self.patient {
            // The chains that a read gathers beyond its frame go in front of the next read's only once both reads
            // have ended.
            _ if self.stock.service.queue.in_order => 1,
            true => PATIENT,
            false => self.burst,
        };
        let mut count = 0;
        // Borrowed, never taken out: operations pushed for the first reads point into them, should a later one panic.
        let reads = self.reads.as_mut_slice();
        while count < burst && self.stock.gather(&mut reads[count], count) {
            let mut io = Io::new(ring, Token { task: self.stock.service.task(), slot: count as u32 });
            #[allow(unsafe_code)]
            // SAFETY: the room stays as it is until the read has completed, its chains until they are given back, and
            // the source with its descriptor as long as the receiver.
            unsafe {
                let (fd, room) = (self.stock.source.fd(), reads[count].room());
                if self.patient { io.read_next(fd, room) } else { io.read_now(fd, room) }
            }
            count += 1;
        }
        self.in_flight = count;
        self.state = if count > 0 { State::Reading } else { State::Starved };
        count > 0
    }

    fn completed(&mut self, slot: u32, result: i32, _: Instant, ring: &mut Ring) {
        self.in_flight -= 1;
        if slot == POLL {
            if self.state == State::Polling {
                self.state = State::Ready;
            }
            return;
        }
        match result {
            1.. => {
                self.brought += 1;
                self.stock.deliver(&mut self.reads[slot as usize], result as u64);
            }
            _ => {
                match -result {
                    libc::EAGAIN => self.empty = true,
                    libc::EINTR | libc::ECANCELED => {}
                    libc::EOPNOTSUPP if !self.patient => self.patient = true,
                    // The rest of the burst that found it out.
                    libc::EOPNOTSUPP if !self.stock.returned.is_empty() => {}
                    libc::EBADFD if !self.stock.source.enabled() => self.state = State::Away,
                    // A frame that the kernel could not hand over; the next may be sound.
                    libc::EINVAL | libc::EIO | libc::EMSGSIZE | libc::ENOBUFS => {
                        self.stock.service.stats.count(DELIVERED, 0, false);
                        // Not at once again: if it is the source that fails, its poll says so.
                        self.empty = true;
                    }
                    // A datagram of nothing.
                    0 => self.stock.service.stats.count(DELIVERED, 0, false),
                    errno => self.refused = Some(errno),
                }
                let chains = self.stock.take(&mut self.reads[slot as usize]);
                self.stock.returned.extend(chains);
            }
        }
        if self.in_flight == 0 {
            self.burst_ended(ring);
        }
    }

    fn ready(&self) -> bool {
        self.wants_buffers() && self.stock.service.queue.has_avail()
    }

    fn arm(&mut self) -> bool {
        self.wants_buffers() && self.stock.service.enable_kicks()
    }

    fn files(&self, with: &mut dyn FnMut(BorrowedFd<'_>)) {
        with(self.stock.source.fd());
    }

    fn stop(&mut self, ring: &mut Ring) {
        let mut cancel = |slot| ring.cancel(Token { task: self.stock.service.task(), slot });
        match self.state {
            State::Polling => cancel(POLL),
            State::Reading if self.patient => (0..PATIENT as u32).for_each(cancel),
            _ => {}
        }
    }

    fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    fn give_back(&mut self) {
        // Older than whatever was not looked at, and as empty.
        while let Some(head) = self.stock.service.queue.take_replay() {
            self.stock.held.push_back(Chain { head, ..Chain::default() });
        }
        while let Some(chain) = self.stock.held.pop_back() {
            // A frame may have overtaken an empty read, so that later chains are used already. The next server of a
            // suspended queue is told of the chain and reads into it first. Otherwise it is given back empty, which
            // drivers take for a frame that is too short.
            if !self.stock.service.queue.unpop(chain.head) && !self.stock.service.is_suspending() {
                self.stock.service.queue.complete(chain.head, 0);
            }
        }
    }
}

#[cfg(test)]
#[path = "receiver_tests.rs"]
mod tests;
