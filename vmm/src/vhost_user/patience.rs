//! Limits to waiting: the crate that speaks the protocol tries again for ever when a socket's own limit has passed.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};

/// Ends sockets when a thread waits too long for a message over them.
pub(super) struct Patience {
    limits: Sender<Option<Duration>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    sockets: Mutex<Vec<OwnedFd>>,
    ended: AtomicBool,
}

impl Patience {
    /// Starts a thread that lives as long as this does.
    pub(super) fn new(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (limits, told) = mpsc::channel();
        let theirs = Arc::clone(&shared);
        thread::Builder::new().name("vhost-patience".into()).spawn(move || theirs.watch(&told))?;
        let patience = Self { limits, shared };
        patience.also(socket)?;
        Ok(patience)
    }

    /// Ends this socket with the others.
    pub(super) fn also(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let socket = socket.try_clone_to_owned()?;
        self.shared.sockets.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
        Ok(())
    }

    /// From now on there is so much time, or any.
    pub(super) fn limit(&self, time: Option<Duration>) {
        // The thread ends before this only when it has nothing left to end.
        let _ = self.limits.send(time);
    }

    /// Whether it has come to an end.
    pub(super) fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }
}

impl Shared {
    fn watch(&self, told: &Receiver<Option<Duration>>) {
        let mut limit = None;
        loop {
            let next = match limit {
                None => told.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(time) => told.recv_timeout(time),
            };
            match next {
                Ok(next) => limit = next,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
        self.ended.store(true, Ordering::Release);
        for socket in &*self.sockets.lock().unwrap_or_else(PoisonError::into_inner) {
            // One that the other side has ended already is ended.
            let _ = shutdown(socket, Shutdown::Both);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn pitfall_54_a_wait_ends_with_its_limit_and_not_before() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let patience = Patience::new(ours.as_fd()).unwrap();
        patience.limit(Some(Duration::from_secs(3600)));
        patience.limit(None);
        assert!(!patience.has_ended());
        patience.limit(Some(Duration::from_millis(10)));
        assert_eq!(ours.read(&mut [0]).unwrap(), 0, "the wait has ended");
        assert!(patience.has_ended());
    }
}
