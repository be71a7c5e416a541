//! Resources that the queues of a disk share: memory for bounce buffers, and blocks that only one operation at a time
//! may rewrite. An operation that can't have a resource waits for its turn, the oldest first. An operation that gives
//! a resource back hands it to the next in line and wakes their queues, so no queue has to poll for it.
//!
//! An operation takes memory before it claims a range, and never waits for memory while it holds a range. So the
//! holder of a range can always make progress, and every operation that waits for the range gets its turn.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// Bytes for the bounce buffers of a disk, whatever its queues: enough for a hundred of the longest. A guest has as
/// many requests in flight as its queues have descriptors, and each would hold a buffer.
pub(super) const MEMORY: u64 = 16 << 20;

/// The resource that an operation may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// This many bytes.
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

/// The requests of a queue that may continue.
#[derive(Debug)]
struct Woken {
    requests: Mutex<VecDeque<(Ticket, u32)>>,
    /// Has the queue's thread look at them.
    waker: Waker,
}

/// One queue's share in a disk's resources.
#[derive(Debug, Default)]
pub(super) struct Part {
    share: Arc<Mutex<Share>>,
    /// Of a queue that is served.
    woken: Option<Arc<Woken>>,
}

impl Clone for Part {
    /// That of another queue of the same disk.
    fn clone(&self) -> Self {
        Self { share: Arc::clone(&self.share), woken: None }
    }
}

impl Part {
    /// The queue is served by a thread that looks for woken requests when this waker is used.
    pub(super) fn attached(&mut self, waker: &Waker) {
        self.woken = Some(Arc::new(Woken { requests: Mutex::default(), waker: waker.clone() }));
    }

    /// Takes the wanted resource, for the request in `slot`. If it can't be had now, the request waits:
    /// [`Self::next_woken`] names the request once it was given the resource.
    pub(super) fn take(&mut self, want: Want, slot: u32) -> Option<Wait> {
        let mut share = lock(&self.share);
        if share.try_take(want) {
            return None;
        }
        let queue = Arc::clone(self.woken.as_ref().expect("only requests of a queue that is served wait"));
        let ticket = share.next_ticket;
        share.next_ticket += 1;
        share.waiters.insert(ticket, Waiter { want, slot, queue });
        share.wait(ticket, want);
        Some(Wait { ticket, want })
    }

    /// Gives a resource back.
    pub(super) fn give_back(&mut self, want: Want) {
        lock(&self.share).give_back(want);
    }

    /// An operation does not wait any more, whether or not it was woken.
    pub(super) fn give_up(&mut self, wait: Wait) {
        let mut share = lock(&self.share);
        if share.waiters.remove(&wait.ticket).is_some() {
            share.for_memory.remove(&wait.ticket);
            // It may have been the one at the head of the line: the operations after it want less.
            share.hand_out_memory();
            return;
        }
        if let Some(woken) = &self.woken {
            lock(&woken.requests).retain(|(ticket, _)| *ticket != wait.ticket);
        }
        share.give_back(wait.want);
    }

    /// The next request that was woken.
    pub(super) fn next_woken(&mut self) -> Option<u32> {
        lock(&self.woken.as_ref()?.requests).pop_front().map(|(_, slot)| slot)
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

    /// Whether this many more bytes can be given out; one operation can always have all that it wants.
    fn has_room(&self, bytes: u64) -> bool {
        self.taken == 0 || self.taken + bytes <= MEMORY
    }

    /// A claim that has a part of the range.
    fn overlapping(&mut self, start: u64, end: u64) -> Option<&mut Claim> {
        let (_, last) = self.claims.range_mut(..end).next_back()?;
        (last.end > start).then_some(last)
    }

    /// Puts an operation that has to wait where the next change of its resource finds it.
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

    fn give_back(&mut self, want: Want) {
        match want {
            Want::Memory(bytes) => {
                self.taken -= bytes;
                self.hand_out_memory();
            }
            Want::Range(start, _) => {
                if let Some(claim) = self.claims.remove(&start) {
                    self.hand_out_range(claim.behind);
                }
            }
        }
    }

    fn hand_out_memory(&mut self) {
        while let Some(&ticket) = self.for_memory.first() {
            let Some(&Waiter { want: Want::Memory(bytes), .. }) = self.waiters.get(&ticket) else { return };
            if !self.has_room(bytes) {
                return;
            }
            self.taken += bytes;
            self.for_memory.pop_first();
            self.wake(ticket);
        }
    }

    /// Lets the operations that waited for a claim try again, up to the first that has to wait once more. The others
    /// then wait for the same claim: most often it is that of the first of them, and all want the same block.
    fn hand_out_range(&mut self, mut behind: BTreeSet<Ticket>) {
        while let Some(&ticket) = behind.first() {
            if let Some(&Waiter { want: want @ Want::Range(start, end), .. }) = self.waiters.get(&ticket) {
                if let Some(claim) = self.overlapping(start, end) {
                    claim.behind.append(&mut behind);
                    return;
                }
                self.try_take(want);
                self.wake(ticket);
            }
            behind.pop_first();
        }
    }

    /// The waiter is given the resource.
    fn wake(&mut self, ticket: Ticket) {
        let Some(Waiter { slot, queue, .. }) = self.waiters.remove(&ticket) else { return };
        lock(&queue.requests).push_back((ticket, slot));
        queue.waker.wake_by_ref();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    impl Part {
        /// Bytes that are given out.
        pub(in crate::block::storage) fn taken(&self) -> u64 {
            lock(&self.share).taken
        }
    }

    fn all_woken(part: &mut Part) -> Vec<u32> {
        std::iter::from_fn(|| part.next_woken()).collect()
    }

    /// Counts how often a queue is woken.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// The part of a queue that is served.
    fn served() -> (Part, Arc<Count>) {
        let (mut part, count) = (Part::default(), Arc::<Count>::default());
        part.attached(&Arc::clone(&count).into());
        (part, count)
    }

    #[test]
    fn memory_is_handed_out_in_the_order_of_asking() {
        let (mut part, _) = served();
        let most = Want::Memory(MEMORY);
        let (small, large) = (Want::Memory(1), Want::Memory(MEMORY - 1));
        assert!(part.take(most, 0).is_none());
        for (slot, want) in [(1, large), (2, small), (3, small)] {
            assert!(part.take(want, slot).is_some());
        }
        assert_eq!(part.next_woken(), None);
        part.give_back(most);
        assert_eq!(all_woken(&mut part), [1, 2], "a third does not fit beside them");
        part.give_back(small);
        assert_eq!(all_woken(&mut part), [3]);
        let fourth = part.take(large, 4).expect("there is no room");
        let fifth = part.take(Want::Memory(0), 5).expect("somebody else was first");
        part.give_up(fourth);
        assert_eq!(part.next_woken(), Some(5), "what was asked for behind it can be had");
        part.give_up(fifth);
        part.give_back(small);
        part.give_back(large);
        assert_eq!(part.taken(), 0);
        let beyond = Want::Memory(2 * MEMORY);
        assert!(part.take(beyond, 6).is_none(), "one can always go on");
        assert!(part.take(beyond, 7).is_some());
        part.give_back(beyond);
        assert_eq!(all_woken(&mut part), [7]);
    }

    #[test]
    fn a_range_is_held_by_one_and_all_others_come_to_their_turn() {
        let (mut part, _) = served();
        let block = |at: u64, count: u64| Want::Range(at * 4096, (at + count) * 4096);
        assert!(part.take(block(0, 4), 0).is_none());
        assert!(part.take(block(4, 1), 1).is_none(), "side by side is not in each other's way");
        for (slot, want) in [(2, block(0, 1)), (3, block(1, 1)), (4, block(0, 1)), (5, block(3, 2)), (6, block(0, 1))] {
            assert!(part.take(want, slot).is_some());
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
    fn a_queue_is_woken_once_for_each_of_its_operations() {
        let (mut first, woken) = served();
        let (mut second, second_woken) = (first.clone(), Arc::<Count>::default());
        second.attached(&Arc::clone(&second_woken).into());
        let counts = || [&woken, &second_woken].map(|count| count.0.load(Ordering::SeqCst));
        let want = Want::Range(0, 4096);
        assert!(first.take(want, 0).is_none());
        let wait = second.take(want, 7).expect("another has it");
        assert!(first.take(want, 1).is_some());
        assert_eq!(counts(), [0, 0]);
        first.give_back(want);
        assert_eq!(counts(), [0, 1]);
        assert_eq!((all_woken(&mut second), all_woken(&mut first)), (vec![7], vec![]));
        second.give_back(wait.want);
        assert_eq!((all_woken(&mut first), counts()), (vec![1], [1, 1]));
    }

    #[test]
    fn who_gives_up_leaves_nothing_behind() {
        let (mut part, _) = served();
        let want = Want::Range(0, 4096);
        assert!(part.take(want, 0).is_none());
        let [one, two, three] = [1, 2, 3].map(|slot| part.take(want, slot).expect("another has it"));
        part.give_up(one);
        part.give_back(want);
        // Woken, and given up before it went on.
        part.give_up(two);
        assert_eq!(part.next_woken(), Some(3), "and not the second");
        part.give_up(three);
        assert!(part.next_woken().is_none() && lock(&part.share).waiters.is_empty());
        assert!(part.take(want, 4).is_none());
    }
}
