//! How long the guest's output waits for a reader that is connected and does not read.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Time without progress after which the guest goes on without the reader, as at the serial port. A driver may do nothing
/// else meanwhile: Linux's hvc spins until it has its buffer back.
const STALL: Duration = Duration::from_millis(100);

/// The clock of the guest's wait.
#[derive(Debug)]
pub(super) struct Stall {
    pub(super) limit: Duration,
    timer: OwnedFd,
    /// When the guest has waited long enough, while it waits.
    deadline: Option<Instant>,
    timer_runs: bool,
}

impl Stall {
    /// A clock whose timer is in this epoll instance.
    pub(super) fn new(epoll: &Epoll, token: u64) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), EpollEvent::new(EventSet::IN, token))?;
        Ok(Self { limit: STALL, timer, deadline: None, timer_runs: false })
    }

    /// The timer has ended.
    pub(super) fn acknowledge(&mut self) {
        // One shot: reading it has the kernel forget that it ended.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.timer_runs = false;
    }

    /// The guest waits. Returns whether it has done so for long enough; if not, the timer calls.
    pub(super) fn waits(&mut self) -> bool {
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + self.limit);
        if deadline <= now {
            self.ends();
            return true;
        }
        if !self.timer_runs {
            self.set(deadline - now);
        }
        false
    }

    /// The reader has read something. The timer is left alone: it looks at the deadline when it ends.
    pub(super) fn progresses(&mut self) {
        self.deadline = None;
    }

    /// The guest does not wait.
    pub(super) fn ends(&mut self) {
        self.deadline = None;
        if self.timer_runs {
            self.set(Duration::ZERO);
        }
    }

    /// Starts the timer, or stops it with a time of zero.
    fn set(&mut self, time: Duration) {
        let value = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: i64::from(time.subsec_nanos()) };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // Refused only for times that are none.
        let is_set = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok();
        self.timer_runs = is_set && !time.is_zero();
    }
}
