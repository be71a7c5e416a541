//! The code that runs on an I/O thread: the round over its queues, polling, parking, and commands.
#![allow(unsafe_code, reason = "registering descriptors with the runtime")]

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tracing::debug;
use vmm_sys_util::eventfd::EventFd;

use super::window::Window;
use super::{Command, Leave, Task, Teller};
use crate::io::ring::{Budget, Ring, Token};
use crate::virtqueue::{End, GuestMemory};

/// A kick's descriptor as `AsyncFd` wants it.
struct Kick(EventFd);

impl AsRawFd for Kick {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

struct RingFd(RawFd);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

struct Seat {
    task: Box<dyn Task>,
    kick: AsyncFd<Kick>,
    leaving: Option<Leave>,
    /// The guest memory that the kernel holds for it.
    memory: Option<GuestMemory>,
}

/// How long to wait before submissions that the kernel did not take are tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(1);

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
}

impl Core {
    pub(crate) fn new(cpu: Option<usize>, poll: Duration, budget: Option<Arc<Budget>>) -> io::Result<Self> {
        // Before this thread is bound: the guest may have other CPUs.
        let window = Window::new(poll);
        if let Some(cpu) = cpu {
            bind(cpu)?;
        }
        let hold_memory = budget.is_some();
        let ring = budget.map_or_else(Ring::new, Ring::with_budget).map_err(explain_no_ring)?;
        let (hold_next, hold_refused) = (Instant::now(), false);
        Ok(Self { ring, seats: Vec::new(), completions: Vec::new(), window, hold_memory, hold_next, hold_refused })
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>, teller: Teller) {
        // Dropped before the ring, which waits for everything in flight.
        let _teller = teller;
        // SAFETY: the ring outlives this local and always answers with the same descriptor.
        let ring_fd = match unsafe { AsyncFd::register_with_interest(RingFd(self.ring.fd()), Interest::READABLE) } {
            Ok(fd) => fd,
            Err(error) => return tracing::error!(%error, "I/O thread can't watch its ring"),
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
                continue;
            }
            let idle = Instant::now();
            if self.poll(&inbox) {
                continue;
            }
            // Arm every queue, even when one has work already: all must be armed when the thread parks.
            let armed = self.seats.iter_mut().flatten().fold(false, |work, seat| seat.task.arm() | work);
            if armed || self.ring.has_completions() {
                continue;
            }
            let retry = self.ring.has_unsubmitted();
            let park = poll_fn(|cx| self.poll_park(cx, &ring_fd, &mut inbox));
            let woken = if retry {
                // The kernel would not take a submission, and there may be no event for when it will.
                tokio::time::timeout(RETRY_PAUSE, park).await.unwrap_or(Woken::Work)
            } else {
                park.await
            };
            match woken {
                Woken::Command(Some(command)) => self.obey(command),
                Woken::Command(None) => return,
                Woken::Work => {}
            }
            self.window.woken(idle.elapsed());
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
        if window.is_zero() || self.seats.iter().all(Option::is_none) {
            return false;
        }
        let start = Instant::now();
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
            if start.elapsed() >= window {
                self.window.missed();
                self.seats.iter_mut().flatten().for_each(|seat| seat.task.service().stats.poll_misses += 1);
                return false;
            }
        }
    }

    fn poll_park(
        &mut self,
        cx: &mut Context<'_>,
        ring_fd: &AsyncFd<RingFd>,
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
        while let Poll::Ready(Ok(mut guard)) = ring_fd.poll_read_ready(cx) {
            guard.clear_ready();
            woken = true;
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
                    let mut task = build(index as u32);
                    let mut names_files = false;
                    task.files(&mut |file| {
                        self.ring.hold(file);
                        names_files = true;
                    });
                    let holds = self.hold_memory && names_files;
                    let memory = holds.then(|| Arc::clone(task.service().queue.memory()));
                    memory.iter().for_each(|memory| self.ring.hold_memory(memory));
                    task.service().span().in_scope(|| debug!("the queue is served by this thread"));
                    self.seats[index] = Some(Seat { task, kick, leaving: None, memory });
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
        let bound = std::thread::spawn(move || Core::new(Some(cpu), max, None).unwrap().window.max).join().unwrap();
        assert_eq!(bound, Core::new(None, max, None).unwrap().window.max);
    }
}
