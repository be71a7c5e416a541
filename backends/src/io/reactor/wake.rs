//! Waking a queue from anywhere: from another I/O thread, from a task of the same thread's runtime, from a timer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use tokio::sync::mpsc;

use super::Command;
use crate::io::service::TaskHandle;

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
