//! The descriptors of the device, in an epoll of their own. The thread that serves the queues listens to that one only.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Keys of the descriptors that are always there. Sockets of clients have greater ones.
pub(super) const LISTENER: u64 = 0;
/// The timer has ended.
pub(super) const TIMER: u64 = 1;
/// Work was left at the last turn.
pub(super) const AGAIN: u64 = 2;
/// First key of a client.
pub(super) const FIRST_CLIENT: u64 = 3;

/// Most events taken in one turn. More wait for the next.
const MAX_EVENTS: usize = 64;

/// Descriptors with keys, a timer, and a way to be called again.
pub(super) struct Poll {
    epoll: Epoll,
    events: Vec<EpollEvent>,
    timer: OwnedFd,
    timer_runs: bool,
    again: EventFd,
}

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let again = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let poll = Self {
            epoll: Epoll::new()?,
            events: vec![EpollEvent::default(); MAX_EVENTS],
            timer,
            timer_runs: false,
            again,
        };
        poll.add(poll.timer.as_raw_fd(), EventSet::IN, TIMER)?;
        poll.add(poll.again.as_raw_fd(), EventSet::IN, AGAIN)?;
        Ok(poll)
    }

    /// The descriptor that has events when one of these has.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Listens to a descriptor until it is closed.
    pub(super) fn add(&self, fd: RawFd, events: EventSet, key: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, key))
    }

    /// Listens to all that a client's socket can tell, once for each change: nothing that the device can't deal with now
    /// calls it again and again.
    pub(super) fn add_client(&self, fd: RawFd, key: u64) -> io::Result<()> {
        self.add(fd, EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED, key)
    }

    /// Does not listen to a descriptor any more.
    pub(super) fn remove(&self, fd: RawFd) {
        // It was added, and is open.
        let removed = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        debug_assert!(removed.is_ok(), "{removed:?}");
    }

    /// Takes the events that are there, with their keys.
    pub(super) fn take(&mut self, into: &mut Vec<(u64, EventSet)>) -> io::Result<()> {
        into.clear();
        let count = match self.epoll.wait(0, &mut self.events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in &self.events[..count] {
            let key = event.data();
            match key {
                TIMER => {
                    self.timer_runs = false;
                    // One shot: reading it has the kernel forget that it ended.
                    let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                }
                AGAIN => drop(self.again.read()),
                _ => {}
            }
            into.push((key, event.event_set()));
        }
        Ok(())
    }

    /// Has the thread come back at once, after it has looked at other things.
    pub(super) fn come_again(&self) {
        // Full: it is to come already.
        let _ = self.again.write(1);
    }

    /// Has the thread come back after a time, unless it is to come earlier anyway.
    pub(super) fn come_after(&mut self, time: Duration) {
        if self.timer_runs {
            return;
        }
        let value = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: i64::from(time.subsec_nanos()) };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // Refused only for times that are none.
        self.timer_runs = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok();
    }
}
