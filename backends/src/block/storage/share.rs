//! Resources that the queues of a disk share: memory for bounce buffers, and blocks that only one operation at a time
//! may rewrite. An operation that can't have a resource waits for its turn, the oldest first. An operation that gives
//! a resource back hands it to the next in line and wakes their queues, so no queue has to poll for it.
//!
//! An operation takes memory before it claims a range, and never waits for memory while it holds a range. So the
//! holder of a range can always make progress, and every operation that waits for the range gets its turn.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Bytes for the bounce buffers of a disk, whatever its queues: enough for a hundred of the longest. A guest has as many requests
/// in flight as its queues have descriptors, and each would hold a buffer.
pub(super) const MEMORY: u64 = 16 << 20;

/// The resource that an operation may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// So many bytes.
    Memory(u64),
    /// The blocks between two offsets of the file, exclusively.
    Range(u64, u64),
}

/// An operation's place in the order.
type Ticket = u64;

/// The resource that an operation waits for, or has been given in the meantime.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    ticket: Ticket,
    pub(super) want: Want,
}

#[derive(Debug, Default)]
struct Share {
    /// Bytes that are given out.
    taken: u64,
    for_memory: BTreeSet<Ticket>,
    /// Ranges that are held, by their first bytes. They don't overlap.
    claims: BTreeMap<u64, Claim>,
    waiters: BTreeMap<Ticket, Waiter>,
    next_ticket: Ticket,
}

#[derive(Debug)]
struct Claim {
    end: u64,
    /// The operations that try again when this one goes; some of them may have given up.
    behind: BTreeSet<Ticket>,
}

#[derive(Debug)]
struct Waiter {
    want: Want,
    slot: u32,
    queue: Arc<Woken>,
}

/// The requests of a queue that may go on.
#[derive(Debug)]
struct Woken {
    list: Mutex<WokenList>,
    /// Tells the queue's thread of those that another thread has woken.
    event: EventFd,
}

#[derive(Debug, Default)]
struct WokenList {
    requests: VecDeque<(Ticket, u32)>,
    raised: bool,
}

/// One queue's part in what a disk has.
#[derive(Debug, Default)]
pub(super) struct Part {
    share: Arc<Mutex<Share>>,
    /// Made when an operation waits for the first time.
    woken: Option<Arc<Woken>>,
    /// Operations that wait, or were woken and have not gone on.
    waiting: usize,
}

impl Clone for Part {
    /// That of another queue of the same disk.
    fn clone(&self) -> Self {
        Self { share: Arc::clone(&self.share), woken: None, waiting: 0 }
    }
}

impl Part {
    /// Takes what is wanted, for the request in `slot`. If it can't be had, the request waits: [`Self::next_woken`] names it when
    /// it was given what it wants.
    ///
    /// # Errors
    /// When the host has no descriptor for the first that waits.
    pub(super) fn take(&mut self, want: Want, slot: u32) -> io::Result<Option<Wait>> {
        let mut share = lock(&self.share);
        if share.try_take(want) {
            return Ok(None);
        }
        let queue = match &self.woken {
            Some(woken) => woken,
            None => self
                .woken
                .insert(Arc::new(Woken { list: Mutex::default(), event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)? })),
        };
        let ticket = share.next_ticket;
        share.next_ticket += 1;
        share.waiters.insert(ticket, Waiter { want, slot, queue: Arc::clone(queue) });
        share.wait(ticket, want);
        self.waiting += 1;
        Ok(Some(Wait { ticket, want }))
    }

    /// Gives back what was taken.
    pub(super) fn give_back(&mut self, want: Want) {
        lock(&self.share).give_back(want, self.woken.as_ref());
    }

    /// An operation that was woken goes on with what it waited for.
    pub(super) fn went_on(&mut self) {
        self.waiting -= 1;
    }

    /// An operation does not wait any more, whether or not it was woken.
    pub(super) fn give_up(&mut self, wait: Wait) {
        self.waiting -= 1;
        let mut share = lock(&self.share);
        if share.waiters.remove(&wait.ticket).is_some() {
            share.for_memory.remove(&wait.ticket);
            // It may have been the one at the head of the line: the operations after it want less.
            share.hand_out_memory(self.woken.as_ref());
            return;
        }
        if let Some(woken) = &self.woken {
            lock(&woken.list).requests.retain(|(ticket, _)| *ticket != wait.ticket);
        }
        share.give_back(wait.want, self.woken.as_ref());
    }

    /// Whether operations of this queue wait; what is readable then once others have woken some.
    #[inline]
    pub(super) fn event(&self) -> Option<BorrowedFd<'_>> {
        if self.waiting == 0 { None } else { self.waiting_event() }
    }

    #[cold]
    #[allow(unsafe_code, reason = "the event type lends no descriptor of its own")]
    fn waiting_event(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the event is open for as long as it is borrowed.
        self.woken.as_ref().map(|woken| unsafe { BorrowedFd::borrow_raw(woken.event.as_raw_fd()) })
    }

    /// The next request that was woken.
    pub(super) fn next_woken(&mut self) -> Option<u32> {
        let mut list = lock(&self.woken.as_ref()?.list);
        if std::mem::take(&mut list.raised) {
            // Only this queue reads the event, and it was raised.
            _ = self.woken.as_ref()?.event.read();
        }
        list.requests.pop_front().map(|(_, slot)| slot)
    }
}

impl Share {
    fn try_take(&mut self, want: Want) -> bool {
        match want {
            Want::Memory(bytes) => {
                let free = self.for_memory.is_empty() && self.has_room(bytes);
                self.taken += if free { bytes } else { 0 };
                free
            }
            Want::Range(start, end) => {
                let free = self.overlapping(start, end).is_none();
                if free {
                    self.claims.insert(start, Claim { end, behind: BTreeSet::new() });
                }
                free
            }
        }
    }

    /// Whether so many bytes more can be given out; one operation can always have what it wants.
    fn has_room(&self, bytes: u64) -> bool {
        self.taken == 0 || self.taken + bytes <= MEMORY
    }

    /// A claim that has a part of the range.
    fn overlapping(&mut self, start: u64, end: u64) -> Option<&mut Claim> {
        let (_, last) = self.claims.range_mut(..end).next_back()?;
        (last.end > start).then_some(last)
    }

    /// Puts who can't have what it wants where it is found when that has changed.
    fn wait(&mut self, ticket: Ticket, want: Want) {
        match want {
            Want::Memory(_) => _ = self.for_memory.insert(ticket),
            Want::Range(start, end) => {
                if let Some(claim) = self.overlapping(start, end) {
                    claim.behind.insert(ticket);
                }
            }
        }
    }

    fn give_back(&mut self, want: Want, giver: Option<&Arc<Woken>>) {
        match want {
            Want::Memory(bytes) => {
                self.taken -= bytes;
                self.hand_out_memory(giver);
            }
            Want::Range(start, _) => {
                if let Some(claim) = self.claims.remove(&start) {
                    self.hand_out_range(claim.behind, giver);
                }
            }
        }
    }

    fn hand_out_memory(&mut self, giver: Option<&Arc<Woken>>) {
        while let Some(&ticket) = self.for_memory.first() {
            let Some(&Waiter { want: Want::Memory(bytes), .. }) = self.waiters.get(&ticket) else { return };
            if !self.has_room(bytes) {
                return;
            }
            self.taken += bytes;
            self.for_memory.pop_first();
            self.wake(ticket, giver);
        }
    }

    /// Lets the operations that waited for a claim try again, up to the first that has to wait once more. The others
    /// then wait for the same claim: most often it is that of the first of them, and all want the same block.
    fn hand_out_range(&mut self, mut behind: BTreeSet<Ticket>, giver: Option<&Arc<Woken>>) {
        while let Some(&ticket) = behind.first() {
            if let Some(&Waiter { want: want @ Want::Range(start, end), .. }) = self.waiters.get(&ticket) {
                if let Some(claim) = self.overlapping(start, end) {
                    claim.behind.append(&mut behind);
                    return;
                }
                self.try_take(want);
                self.wake(ticket, giver);
            }
            behind.pop_first();
        }
    }

    /// The waiter has what it wants.
    fn wake(&mut self, ticket: Ticket, giver: Option<&Arc<Woken>>) {
        let Some(Waiter { slot, queue, .. }) = self.waiters.remove(&ticket) else { return };
        let mut list = lock(&queue.list);
        list.requests.push_back((ticket, slot));
        // The giver's queue looks at its own list next.
        if !list.raised && giver.is_none_or(|giver| !Arc::ptr_eq(giver, &queue)) {
            // It is not raised, so this can't fail, nor wait.
            list.raised = queue.event.write(1).is_ok();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Part {
        /// Bytes that are given out.
        pub(in crate::block::storage) fn taken(&self) -> u64 {
            lock(&self.share).taken
        }
    }

    fn is_raised(part: &Part) -> bool {
        part.woken.as_ref().is_some_and(|woken| lock(&woken.list).raised)
    }

    fn all_woken(part: &mut Part) -> Vec<u32> {
        let woken: Vec<_> = std::iter::from_fn(|| part.next_woken()).collect();
        woken.iter().for_each(|_| part.went_on());
        woken
    }

    #[test]
    fn memory_is_handed_out_in_the_order_of_asking() {
        let mut part = Part::default();
        let most = Want::Memory(MEMORY);
        let (small, large) = (Want::Memory(1), Want::Memory(MEMORY - 1));
        assert!(part.take(most, 0).unwrap().is_none());
        for (slot, want) in [(1, large), (2, small), (3, small)] {
            assert!(part.take(want, slot).unwrap().is_some());
        }
        assert_eq!(part.next_woken(), None);
        part.give_back(most);
        assert_eq!(all_woken(&mut part), [1, 2], "a third does not fit beside them");
        part.give_back(small);
        assert_eq!(all_woken(&mut part), [3]);
        let fourth = part.take(large, 4).unwrap().expect("there is no room");
        let fifth = part.take(Want::Memory(0), 5).unwrap().expect("somebody else was first");
        part.give_up(fourth);
        assert_eq!(part.next_woken(), Some(5), "what was asked for behind it can be had");
        part.give_up(fifth);
        part.give_back(small);
        part.give_back(large);
        assert_eq!((part.taken(), part.waiting), (0, 0));
        let beyond = Want::Memory(2 * MEMORY);
        assert!(part.take(beyond, 6).unwrap().is_none(), "one can always go on");
        assert!(part.take(beyond, 7).unwrap().is_some());
        part.give_back(beyond);
        assert_eq!(all_woken(&mut part), [7]);
    }

    #[test]
    fn a_range_is_held_by_one_and_all_others_come_to_their_turn() {
        let mut part = Part::default();
        let block = |at: u64, count: u64| Want::Range(at * 4096, (at + count) * 4096);
        assert!(part.take(block(0, 4), 0).unwrap().is_none());
        assert!(part.take(block(4, 1), 1).unwrap().is_none(), "side by side is not in each other's way");
        for (slot, want) in [(2, block(0, 1)), (3, block(1, 1)), (4, block(0, 1)), (5, block(3, 2)), (6, block(0, 1))] {
            assert!(part.take(want, slot).unwrap().is_some());
        }
        part.give_back(block(0, 4));
        assert_eq!(all_woken(&mut part), [2, 3], "the next wants what the first has");
        part.give_back(block(1, 1));
        assert_eq!(all_woken(&mut part), [0; 0]);
        part.give_back(block(0, 1));
        assert_eq!(all_woken(&mut part), [4], "the last wants what this one has");
        part.give_back(block(4, 1));
        assert_eq!(all_woken(&mut part), [5]);
        part.give_back(block(0, 1));
        assert_eq!(all_woken(&mut part), [6]);
        part.give_back(block(3, 2));
        part.give_back(block(0, 1));
        assert!(lock(&part.share).claims.is_empty() && lock(&part.share).waiters.is_empty());
    }

    #[test]
    fn another_queue_is_woken_by_its_event() {
        let mut first = Part::default();
        let mut second = first.clone();
        let want = Want::Range(0, 4096);
        assert!(first.take(want, 0).unwrap().is_none());
        assert!(second.event().is_none(), "nobody waits");
        let wait = second.take(want, 7).unwrap().expect("another has it");
        assert!(second.event().is_some() && !is_raised(&second));
        assert!(first.take(want, 1).unwrap().is_some());
        first.give_back(want);
        assert!(is_raised(&second) && !is_raised(&first));
        assert_eq!(all_woken(&mut second), [7]);
        assert!(!is_raised(&second) && second.event().is_none());
        second.give_back(wait.want);
        assert_eq!((is_raised(&first), all_woken(&mut first)), (true, vec![1]));
    }

    #[test]
    fn who_gives_up_leaves_nothing_behind() {
        let mut part = Part::default();
        let want = Want::Range(0, 4096);
        assert!(part.take(want, 0).unwrap().is_none());
        let [one, two, three] = [1, 2, 3].map(|slot| part.take(want, slot).unwrap().expect("another has it"));
        part.give_up(one);
        part.give_back(want);
        // Woken, and given up before it went on.
        part.give_up(two);
        assert_eq!(part.next_woken(), Some(3), "and not the second");
        part.give_up(three);
        assert!(part.event().is_none() && part.next_woken().is_none());
        assert!(part.take(want, 4).unwrap().is_none());
    }
}
