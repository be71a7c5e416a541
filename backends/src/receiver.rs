//! A queue whose chains wait for what comes from outside: buffers are held until the source has a frame for them.
//!
//! Frames land in the driver's buffers without a copy. The source is read in bursts, each one batch of the data ring, for as
//! long as all of a burst bring something; then one poll of it waits for the next frame. Kernels that know no reads of what is
//! there now (taps before 6.2 or so) let the reads of a smaller burst wait instead. A frame may fill several chains if
//! the driver agreed to that; chains that a read had room in but did not need are held for the next.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::guest_io::GuestIo;
use crate::io::Io;
use crate::queue::{Chain, RingError};
use crate::reactor::Task;
use crate::ring::{MAX_PIECES, Ring, Token};
use crate::service::{BATCH, Service};

/// Where frames come from. Lives on one thread.
pub trait Source {
    /// Names of what is counted: a frame delivered, then whatever [`Verdict::Drop`] names.
    const OPS: &'static [&'static str];

    /// Most bytes that one read can bring, so that many must be offered if the driver lets frames span chains.
    fn frame_len(&self) -> u64;

    /// Whether a frame may span chains.
    fn merges(&self) -> bool;

    /// Fewest bytes of a chain that can hold a frame where frames don't span chains: those of a header and of the addresses
    /// and type of an Ethernet frame.
    fn least_room(&self) -> u64 {
        26
    }

    /// Whether frames may come now. While not, reads find nothing or fail with EBADFD, and a kick of the queue says when they
    /// may again.
    fn enabled(&self) -> bool {
        true
    }

    /// The source has failed for good.
    fn failed(&mut self) {}

    /// What is read and polled. Reading it must never wait.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Looks at a read that brought `len` bytes into `room`, which lies in `chains` chains once it is shared out.
    fn received(&mut self, room: &GuestIo, len: u64, chains: u16) -> Verdict;
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The driver gets it; payload bytes, for statistics.
    Deliver(u64),
    /// It is dropped and counted under this index of [`Source::OPS`].
    Drop(usize),
}

/// Index into [`Source::OPS`] under which delivered frames are counted.
const DELIVERED: usize = 0;

/// The slot of the poll, beyond those of reads.
const POLL: u32 = BATCH as u32;

/// Reads that wait at once, where they have to: each is woken for every frame.
const PATIENT: usize = 8;

/// What drivers offer at least per chain: a frame of the usual MTU with its header.
const PLAIN_BUFFER: u64 = 1530;

/// Bursts that may be refused in a row before the source counts as gone: its queue may have been disabled and enabled again
/// in between.
const MAX_STRIKES: u8 = 3;

/// One read in flight: the chains that offer their room to it.
#[derive(Default)]
struct Read {
    chains: Vec<Chain>,
    room: GuestIo,
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
    service: Service,
    source: S,
    state: State,
    reads: Vec<Read>,
    in_flight: usize,
    /// A read of the burst found nothing.
    empty: bool,
    /// A read of the burst was refused, and how many bursts in a row were.
    refused: Option<i32>,
    strikes: u8,
    /// Reads wait for frames, for want of those that don't.
    patient: bool,
    /// Chains without a frame yet, in the driver's order.
    held: VecDeque<Chain>,
    /// Those that the burst in flight gives back.
    returned: Vec<Chain>,
    spare: Vec<Chain>,
}

impl<S: Source> Receiver<S> {
    /// A receiver for the queue of `service`.
    pub(crate) fn new(service: Service, source: S) -> Self {
        let reads = (0..BATCH).map(|_| Read::default()).collect();
        Self {
            service,
            source,
            state: State::Ready,
            reads,
            in_flight: 0,
            empty: false,
            refused: None,
            strikes: 0,
            patient: false,
            held: VecDeque::new(),
            returned: Vec::new(),
            spare: Vec::new(),
        }
    }

    fn next_chain(&mut self) -> Option<Chain> {
        if let Some(chain) = self.held.pop_front() {
            return Some(chain);
        }
        let mut chain = self.spare.pop().unwrap_or_default();
        // A driver that refills meanwhile what is given back at once waits for the next turn.
        for _ in 0..self.service.queue.size() {
            if !self.service.pop(&mut chain) {
                break;
            }
            if chain.unmapped || chain.writable.is_empty() {
                self.service.break_off(&RingError::Content { head: chain.head, what: "no buffer to receive into" });
                break;
            }
            if self.source.merges() || chain.writable.len() >= self.source.least_room() {
                return Some(chain);
            }
            // Held, it would be the first to be read into for ever, and each frame that came alone would be lost in it.
            // Drivers take an empty buffer for a frame too short (5.1.6.3.1 asks for far more room than this).
            self.service.queue.complete(chain.head, 0);
            self.service.stats.bad_chains += 1;
        }
        self.spare.push(chain);
        None
    }

    /// Whether the ring is so short that its driver may wait for frames before it offers more than `room`. Only a frame that
    /// does not fit is lost then, and counted.
    fn has_all_there_is(&self, room: u64) -> bool {
        let often = u64::from(self.service.queue.size()) / 2 * PLAIN_BUFFER;
        self.service.is_running() && often < self.source.frame_len() && room >= PLAIN_BUFFER
    }

    /// Collects room for one frame. Returns whether there was enough.
    fn gather(&mut self, index: usize) -> bool {
        let want = if self.source.merges() { self.source.frame_len() } else { 1 };
        self.reads[index].room.clear();
        while self.reads[index].room.len() < want {
            let Some(chain) = self.next_chain() else {
                if index == 0 && self.has_all_there_is(self.reads[0].room.len()) {
                    return true;
                }
                // What was collected is kept for when the driver has offered more.
                for chain in self.reads[index].chains.drain(..).rev() {
                    self.held.push_front(chain);
                }
                return false;
            };
            let read = &mut self.reads[index];
            if read.room.pieces().len() + chain.writable.pieces().len() > MAX_PIECES {
                let head = chain.head;
                self.service.break_off(&RingError::Content { head, what: "receive buffers in too many pieces" });
                self.held.push_front(chain);
                return false;
            }
            read.room.append(&chain.writable);
            read.chains.push(chain);
        }
        true
    }

    fn deliver(&mut self, index: usize, len: u64) {
        let read = &mut self.reads[index];
        let mut left = len;
        let mut count = 0u16;
        for chain in &read.chains {
            if left > 0 {
                left -= left.min(chain.writable.len());
                count += 1;
            }
        }
        match self.source.received(&read.room, len, count) {
            Verdict::Deliver(bytes) => {
                let mut left = len;
                for chain in read.chains.drain(..) {
                    if left > 0 {
                        let part = left.min(chain.writable.len());
                        self.service.queue.complete(chain.head, part as u32);
                        left -= part;
                        self.spare.push(chain);
                    } else {
                        self.returned.push(chain);
                    }
                }
                self.service.stats.count(DELIVERED, bytes, true);
            }
            Verdict::Drop(why) => {
                self.service.stats.count(why, 0, false);
                self.returned.append(&mut read.chains);
            }
        }
    }

    fn burst_ended(&mut self, ring: &mut Ring) {
        for chain in self.returned.drain(..).rev() {
            self.held.push_front(chain);
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
        if matches!(self.state, State::Dead | State::Away) || !self.service.is_running() {
            return;
        }
        self.state = State::Ready;
        if std::mem::take(&mut self.empty) {
            self.state = State::Polling;
            self.in_flight = 1;
            Io::new(ring, Token { task: self.service.task(), slot: POLL }).wait_readable(self.source.fd());
        }
    }

    fn die(&mut self, errno: i32) {
        if self.state != State::Dead {
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::warn!(queue = %self.service.name(), %error, "what frames come from is gone");
            self.state = State::Dead;
            self.source.failed();
        }
    }

    fn wants_buffers(&self) -> bool {
        self.service.is_running() && self.state == State::Starved
    }
}

impl<S: Source> Task for Receiver<S> {
    fn service(&mut self) -> &mut Service {
        &mut self.service
    }

    fn turn(&mut self, ring: &mut Ring) -> bool {
        let due = match self.state {
            State::Ready => true,
            State::Starved => self.service.queue.has_avail(),
            State::Away => self.source.enabled(),
            State::Reading | State::Polling | State::Dead => false,
        };
        // The kernel still uses what the reads in flight point to.
        if !due || self.in_flight > 0 || !self.service.is_running() {
            return false;
        }
        self.service.disable_kicks();
        let burst = match self.patient {
            // What a read gathers beyond its frame goes back in front of the next read's only once both have ended.
            _ if self.service.queue.in_order => 1,
            true => PATIENT,
            false => BATCH,
        };
        let mut count = 0;
        while count < burst && self.gather(count) {
            let mut io = Io::new(ring, Token { task: self.service.task(), slot: count as u32 });
            #[allow(unsafe_code)]
            // SAFETY: the room stays as it is until the read has completed, and its chains until they are given back.
            unsafe {
                let (fd, room) = (self.source.fd(), &self.reads[count].room);
                if self.patient { io.read(fd, room, u64::MAX) } else { io.read_now(fd, room) }
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
            1.. => self.deliver(slot as usize, result as u64),
            _ => {
                match -result {
                    libc::EAGAIN => self.empty = true,
                    libc::EINTR | libc::ECANCELED => {}
                    libc::EOPNOTSUPP if !self.patient => self.patient = true,
                    // The rest of the burst that found it out.
                    libc::EOPNOTSUPP if !self.returned.is_empty() => {}
                    libc::EBADFD if !self.source.enabled() => self.state = State::Away,
                    // A frame that the kernel could not hand over; the next may be sound.
                    libc::EINVAL | libc::EIO | libc::EMSGSIZE | libc::ENOBUFS => {
                        self.service.stats.count(DELIVERED, 0, false);
                        // Not at once again: if it is the source that fails, its poll says so.
                        self.empty = true;
                    }
                    // A datagram of nothing.
                    0 => self.service.stats.count(DELIVERED, 0, false),
                    errno => self.refused = Some(errno),
                }
                let read = &mut self.reads[slot as usize];
                self.returned.append(&mut read.chains);
            }
        }
        if self.in_flight == 0 {
            self.burst_ended(ring);
        }
    }

    fn ready(&self) -> bool {
        self.wants_buffers() && self.service.queue.has_avail()
    }

    fn arm(&mut self) -> bool {
        self.wants_buffers() && self.service.enable_kicks()
    }

    fn files(&self, with: &mut dyn FnMut(BorrowedFd<'_>)) {
        with(self.source.fd());
    }

    fn stop(&mut self, ring: &mut Ring) {
        let mut cancel = |slot| ring.cancel(Token { task: self.service.task(), slot });
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
        while let Some(head) = self.service.queue.take_replay() {
            self.held.push_back(Chain { head, ..Chain::default() });
        }
        while let Some(chain) = self.held.pop_back() {
            // A frame may have overtaken an empty read, so that later chains are used already; drivers take an empty
            // buffer for a frame too short.
            if !self.service.queue.unpop(chain.head) {
                self.service.queue.complete(chain.head, 0);
            }
        }
    }
}

#[cfg(test)]
#[path = "receiver_tests.rs"]
mod tests;
