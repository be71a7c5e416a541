//! Waking a queue from anywhere: from another I/O thread, from a task of the same thread's runtime, from a timer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};

use tokio::sync::mpsc;

use super::Command;

/// A queue's place on its I/O thread, as the queue itself sees it.
#[derive(Debug)]
pub struct TaskHandle {
    /// Its number there.
    pub task: u32,
    /// Has the thread call [`Task::woken`](super::Task::woken). Any thread may use it, for as long as it likes.
    pub waker: Waker,
}

#[cfg(test)]
impl TaskHandle {
    /// That of a queue without a thread, which nobody wakes.
    pub(crate) fn unthreaded(task: u32) -> Self {
        Self { task, waker: Waker::noop().clone() }
    }
}

/// What a [`TaskHandle`]'s waker does.
#[derive(Debug)]
pub(super) struct Bell {
    /// Weak, because the thread ends when its channel is closed.
    commands: mpsc::WeakUnboundedSender<Command>,
    task: u32,
    /// Whether the thread was told, and has not looked yet.
    rung: AtomicBool,
}

impl Bell {
    pub(super) fn new(commands: mpsc::WeakUnboundedSender<Command>, task: u32) -> Arc<Self> {
        Arc::new(Self { commands, task, rung: AtomicBool::new(false) })
    }

    pub(super) fn handle(self: &Arc<Self>) -> TaskHandle {
        TaskHandle { task: self.task, waker: Arc::clone(self).into() }
    }

    /// The thread looks now: whoever wakes the queue from now on tells the thread again.
    pub(super) fn answer(&self) {
        self.rung.store(false, Ordering::SeqCst);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::SeqCst)
            && let Some(commands) = self.commands.upgrade()
        {
            // The thread may have died; its queues are not served any more then.
            drop(commands.send(Command::Wake(self.task)));
        }
    }
}
