//! The code that runs on an I/O thread: the round over its queues, polling, parking, and commands.
//!
//! The thread parks until a kick, a completion or a command comes, or until the time that one of its queues has named.
#![allow(unsafe_code, reason = "registering descriptors with the runtime")]

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tracing::debug;
use vmm_sys_util::eventfd::EventFd;

use super::wake::Bell;
use super::window::Window;
use super::{Command, Leave, Task, Teller};
use crate::io::ring::{Budget, Ring, Token};
use crate::io::tasks;
use crate::virtqueue::{End, GuestMemory};

/// A kick's descriptor as `AsyncFd` wants it.
struct Kick(EventFd);

impl AsRawFd for Kick {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A descriptor of the thread's own, which lives as long as the thread.
struct Watched(RawFd);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

struct Seat {
    task: Box<dyn Task>,
    kick: AsyncFd<Kick>,
    bell: Arc<Bell>,
    leaving: Option<Leave>,
    /// The guest memory that the kernel holds for it.
    memory: Option<GuestMemory>,
}

/// How long to wait before submissions that the kernel did not take are tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// How many turns that found work may follow each other before tasks of the runtime get their turn.
const TURNS_IN_A_ROW: u32 = 4;

/// How many of them pass before the clock is looked at for queues that wait for their time.
const TURNS_PER_LOOK: u32 = 64;

/// The state of one I/O thread. The ring comes first: dropped first, it waits for the operations of the tasks.
pub(crate) struct Core {
    ring: Ring,
    seats: Vec<Option<Seat>>,
    completions: Vec<(Token, i32)>,
    window: Window,
    hold_memory: bool,
    /// When the next piece of memory may be held if queues are busy.
    hold_next: Instant,
    /// Whether it was logged that some memory is not held.
    hold_refused: bool,
    /// Where tasks' wakers send their commands.
    commands: mpsc::WeakUnboundedSender<Command>,
    /// Ends a park at a time.
    alarm: Alarm,
    /// Turns that found work since the last that did not.
    busy_turns: u32,
}

/// A timer of the kernel's, which is exact to some microseconds: the runtime's own are to the millisecond.
struct Alarm {
    timer: OwnedFd,
    /// The time that it is set for, which may have passed.
    at: Option<Instant>,
}

impl Alarm {
    fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { timer: rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?, at: None })
    }

    /// Has the timer go off at this time at the latest.
    fn set(&mut self, at: Instant, now: Instant) {
        if self.at.is_some_and(|set| now < set && set <= at) {
            return;
        }
        // Zero would turn it off.
        let left = at.saturating_duration_since(now).max(Duration::from_nanos(1));
        let it_value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let value = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        let set = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value);
        debug_assert!(set.is_ok(), "{set:?}");
        self.at = Some(at);
    }
}

impl Core {
    pub(crate) fn new(
        cpu: Option<usize>,
        poll: Duration,
        budget: Option<Arc<Budget>>,
        commands: mpsc::WeakUnboundedSender<Command>,
    ) -> io::Result<Self> {
        // Before this thread is bound: the guest may have other CPUs.
        let window = Window::new(poll);
        if let Some(cpu) = cpu {
            bind(cpu)?;
        }
        let hold_memory = budget.is_some();
        let ring = budget.map_or_else(Ring::new, Ring::with_budget).map_err(explain_no_ring)?;
        Ok(Self {
            ring,
            seats: Vec::new(),
            completions: Vec::new(),
            window,
            hold_memory,
            hold_next: Instant::now(),
            hold_refused: false,
            commands,
            alarm: Alarm::new()?,
            busy_turns: 0,
        })
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>, teller: Teller) {
        // Dropped before the ring, which waits for everything in flight.
        let _teller = teller;
        // SAFETY: ring and timer outlive these locals and always answer with the same descriptors.
        let watch = |fd| unsafe { AsyncFd::register_with_interest(Watched(fd), Interest::READABLE) };
        let watched = match (watch(self.ring.fd()), watch(self.alarm.timer.as_raw_fd())) {
            (Ok(ring), Ok(timer)) => [ring, timer],
            (Err(error), _) | (_, Err(error)) => {
                return tracing::error!(error = %io::Error::from(error), "I/O thread can't watch its ring and timer");
            }
        };
        loop {
            loop {
                match inbox.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => return,
                }
            }
            let mut worked = self.turn();
            self.let_go();
            worked |= self.hold_more(worked);
            if worked {
                self.busy_turns = self.busy_turns.wrapping_add(1);
                if self.busy_turns.is_multiple_of(TURNS_PER_LOOK) {
                    self.call_due(Instant::now());
                }
                if !(self.busy_turns.is_multiple_of(TURNS_IN_A_ROW) && tasks::any_run()) {
                    continue;
                }
            }
            let idle = Instant::now();
            let limit = if worked {
                // Parks, because the runtime submits its tasks' operations and hears of their ends only then, but for
                // no time.
                Some(idle)
            } else {
                if self.poll(&inbox) {
                    continue;
                }
                // Arm every queue, even when one has work already: all must be armed when the thread parks.
                let armed = self.seats.iter_mut().flatten().fold(false, |work, seat| seat.task.arm() | work);
                if armed || self.ring.has_completions() {
                    continue;
                }
                self.next_wake(idle)
            };
            if let Some(limit) = limit {
                self.alarm.set(limit, Instant::now());
            }
            match poll_fn(|cx| self.poll_park(cx, &watched, &mut inbox)).await {
                Woken::Command(Some(command)) => self.obey(command),
                Woken::Command(None) => return,
                Woken::Work => {}
            }
            let now = Instant::now();
            if !worked {
                self.window.woken(now - idle);
            }
            if limit.is_some_and(|limit| limit <= now) {
                self.call_due(now);
            }
        }
    }

    /// When the thread must not sleep any longer, if there is such a time.
    fn next_wake(&self, now: Instant) -> Option<Instant> {
        // Where the kernel would not take a submission, there may be no event for when it will.
        let retry = self.ring.has_unsubmitted().then(|| now + RETRY_PAUSE);
        self.seats.iter().flatten().filter_map(|seat| seat.task.next_wake()).chain(retry).min()
    }

    fn call_due(&mut self, now: Instant) {
        for seat in self.seats.iter_mut().flatten() {
            if seat.task.next_wake().is_some_and(|at| at <= now) {
                seat.task.due(now);
            }
        }
    }

    /// One round over everything. Returns whether there was anything to do.
    pub(crate) fn turn(&mut self) -> bool {
        let mut worked = false;
        for seat in self.seats.iter_mut().flatten() {
            worked |= seat.task.turn(&mut self.ring);
        }
        self.submit();
        if self.ring.has_completions() {
            worked = true;
            self.ring.reap(&mut self.completions);
            let now = Instant::now();
            for &(token, result) in &self.completions {
                let seat = self.seats.get_mut(token.task as usize).and_then(Option::as_mut);
                let seat = seat.expect("a task leaves only when nothing of it is in flight");
                seat.task.completed(token.slot, result, now, &mut self.ring);
            }
            self.submit();
        }
        for seat in self.seats.iter_mut().flatten() {
            seat.task.service().publish();
        }
        worked
    }

    fn submit(&mut self) {
        if let Err(error) = self.ring.submit() {
            // Entries stay where they are and are tried again at the next turn.
            tracing::error!(%error, "the kernel refuses submissions to the data ring");
        }
    }

    /// Polls within the window. Returns whether there is work.
    fn poll(&mut self, inbox: &mpsc::UnboundedReceiver<Command>) -> bool {
        let window = self.window.current;
        if window.is_zero() || self.seats.iter().all(Option::is_none) || tasks::any_run() {
            return false;
        }
        let start = Instant::now();
        let limit = self.next_wake(start).map_or(start + window, |wake| wake.min(start + window));
        loop {
            // Reading the clock costs as much as looking at a few queues.
            for _ in 0..8 {
                if let Some(seat) = self.seats.iter_mut().flatten().find(|seat| seat.task.ready()) {
                    seat.task.service().stats.poll_hits += 1;
                    self.window.hit();
                    return true;
                }
                if self.ring.has_completions() {
                    self.window.hit();
                    return true;
                }
                if !inbox.is_empty() || inbox.is_closed() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= limit {
                self.window.missed();
                self.seats.iter_mut().flatten().for_each(|seat| seat.task.service().stats.poll_misses += 1);
                return false;
            }
        }
    }

    fn poll_park(
        &mut self,
        cx: &mut Context<'_>,
        watched: &[AsyncFd<Watched>],
        inbox: &mut mpsc::UnboundedReceiver<Command>,
    ) -> Poll<Woken> {
        let mut woken = false;
        for seat in self.seats.iter_mut().flatten() {
            // Readiness is an edge: clearing it waits for the next write, the counter itself is never read.
            while let Poll::Ready(Ok(mut guard)) = seat.kick.poll_read_ready(cx) {
                guard.clear_ready();
                seat.task.service().stats.kicks += 1;
                woken = true;
            }
        }
        for fd in watched {
            while let Poll::Ready(Ok(mut guard)) = fd.poll_read_ready(cx) {
                guard.clear_ready();
                woken = true;
            }
        }
        if woken {
            return Poll::Ready(Woken::Work);
        }
        inbox.poll_recv(cx).map(Woken::Command)
    }

    pub(crate) fn obey(&mut self, command: Command) {
        match command {
            Command::Attach { kick, build, reply } => {
                // SAFETY: the registered value owns the eventfd and never replaces it.
                let kick = unsafe { AsyncFd::register_with_interest(Kick(kick), Interest::READABLE) };
                let seat = kick.map_err(io::Error::from).map(|kick| {
                    let free = self.seats.iter().position(Option::is_none);
                    let index = free.unwrap_or_else(|| {
                        self.seats.push(None);
                        self.seats.len() - 1
                    });
                    let bell = Bell::new(self.commands.clone(), index as u32);
                    let mut task = build(bell.handle());
                    let mut names_files = false;
                    task.files(&mut |file| {
                        self.ring.hold(file);
                        names_files = true;
                    });
                    let holds = self.hold_memory && names_files;
                    let memory = holds.then(|| Arc::clone(task.service().queue.memory()));
                    memory.iter().for_each(|memory| self.ring.hold_memory(memory));
                    task.service().span().in_scope(|| debug!("the queue is served by this thread"));
                    self.seats[index] = Some(Seat { task, kick, bell, leaving: None, memory });
                    index as u32
                });
                drop(reply.send(seat));
            }
            Command::Detach { task, end, leave } => {
                let seat = self.seats.get_mut(task as usize).and_then(Option::as_mut);
                if let Some(seat) = seat.filter(|seat| seat.leaving.is_none()) {
                    seat.task.service().span().in_scope(|| debug!(?end, "the queue is asked to stop"));
                    seat.task.service().stop(end);
                    seat.task.stop(&mut self.ring);
                    seat.leaving = Some(leave);
                }
            }
            Command::Hurry => {
                for seat in self.seats.iter_mut().flatten() {
                    let hurries = seat.leaving.as_ref().is_some_and(|leave| leave.departure.hurries());
                    if hurries && !seat.task.service().is_suspending() {
                        seat.task.service().stop(End::Suspended);
                        seat.task.stop(&mut self.ring);
                    }
                }
            }
            Command::Wake(task) => {
                if let Some(Some(seat)) = self.seats.get_mut(task as usize) {
                    seat.bell.answer();
                    seat.task.woken(Instant::now(), &mut self.ring);
                }
            }
            Command::Call(call) => call(),
            Command::Stats { task, reply } => {
                if let Some(Some(seat)) = self.seats.get_mut(task as usize) {
                    drop(reply.send(seat.task.service().stats.clone()));
                }
            }
            Command::Keep { file, reply } => {
                let kept = self.ring.keep(file.as_fd());
                // Before the answer, so that the caller's is then the only handle.
                drop(file);
                let _ = reply.send(kept);
            }
        }
    }

    /// Has the kernel hold the next piece of guest memory; where queues are always busy, for a tenth of the time.
    /// Returns whether there was one.
    fn hold_more(&mut self, busy: bool) -> bool {
        if !self.ring.wants_memory() {
            return false;
        }
        let start = Instant::now();
        if busy && start < self.hold_next {
            return false;
        }
        let held = self.ring.hold_more().unwrap_or_else(|error| {
            // A guest can have this tried again and again, by resets.
            if !std::mem::replace(&mut self.hold_refused, true) {
                let advice = match error.kind() {
                    io::ErrorKind::QuotaExceeded => "the rest is used like any other",
                    _ => "unless it is a file's, more memory must be allowed to be locked (ulimit -l, CAP_IPC_LOCK)",
                };
                tracing::warn!(%error, "the kernel does not hold all of the guest's memory for I/O; {advice}");
            }
            true
        });
        self.hold_next = start + start.elapsed() * 10;
        held
    }

    /// Releases tasks that were told to leave and have nothing in flight. `turn` has published their completions.
    pub(crate) fn let_go(&mut self) {
        for place in &mut self.seats {
            if let Some(seat) = place
                && seat.leaving.is_some()
                && seat.task.is_idle()
                && let Some(mut seat) = place.take()
            {
                seat.task.files(&mut |file| self.ring.release(file));
                seat.task.give_back();
                let service = seat.task.service();
                service.publish();
                service.span().in_scope(|| debug!("the queue has stopped"));
                if let Some(leave) = seat.leaving.take() {
                    leave.end(service.end(), &service.stats);
                }
                // Last: the thread that waits for the queue need not wait for this, and `seat` keeps the memory
                // mapped until then.
                if let Some(memory) = &seat.memory {
                    self.ring.release_memory(memory);
                }
            }
        }
    }
}

enum Woken {
    Command(Option<Command>),
    Work,
}

fn bind(cpu: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(io::Error::other(format!("binding an I/O thread to CPU {cpu}: there is no such CPU")));
    }
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| {
        let e = io::Error::from(e);
        io::Error::new(e.kind(), format!("binding an I/O thread to CPU {cpu}: {e}; choose among those of this process"))
    })
}

fn explain_no_ring(e: io::Error) -> io::Error {
    let hint = match e.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring, 5.11 or later is needed",
        Some(libc::EPERM) => "io_uring is forbidden here, see the sysctl kernel.io_uring_disabled and seccomp filters",
        Some(libc::ENOMEM) => "too little memory may be locked, raise the memlock limit (ulimit -l)",
        _ => return e,
    };
    io::Error::new(e.kind(), format!("creating an io_uring: {e}: {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_bound_to_a_cpu_polls_as_others_do() {
        let max = Duration::from_micros(50);
        let cpus = rustix::thread::sched_getaffinity(None).unwrap();
        let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|&cpu| cpus.is_set(cpu)).unwrap();
        // Bound on a thread of its own, which ends.
        let max_of = move |cpu| Core::new(cpu, max, None, mpsc::unbounded_channel().0.downgrade()).unwrap().window.max;
        let bound = std::thread::spawn(move || max_of(Some(cpu))).join().unwrap();
        assert_eq!(bound, max_of(None));
    }
}
