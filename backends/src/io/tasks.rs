//! Async code on an I/O thread: everything that is not on the way of a raw disk's or a NIC's request, such as the
//! metadata of an image, sockets and files by the dozen.
//!
//! An I/O thread serves its queues in turns and enters their operations in the data ring. Beside them its tokio-uring
//! runtime runs tasks that [`spawn`] has started there. A task may do as many operations at once as it likes, wait for
//! time to pass and wake a queue when it is done. While tasks run, the thread does not poll, and pauses between turns
//! for the runtime's sake.

use std::cell::Cell;
use std::io;

use tokio_uring::fs::File;

use crate::virtqueue::buffers::GuestIo;

thread_local! {
    /// Tasks of this thread that have not ended.
    static RUNNING: Cell<usize> = const { Cell::new(0) };
}

/// Counts a task for as long as it lives.
struct Running;

impl Running {
    fn new() -> Self {
        RUNNING.set(RUNNING.get() + 1);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(RUNNING.get() - 1);
    }
}

/// Runs a future on the calling I/O thread until it ends. If it panics, it alone ends.
///
/// # Panics
/// On any other thread.
pub fn spawn(future: impl Future<Output = ()> + 'static) {
    let running = Running::new();
    drop(tokio_uring::spawn(async move {
        let _running = running;
        future.await;
    }));
}

/// Whether any task of this thread has not ended.
pub(crate) fn any_run() -> bool {
    RUNNING.get() > 0
}

/// Fills guest memory from a file, in as many reads as it takes.
///
/// # Errors
/// The host's; `UnexpectedEof` if the file ends before `data` does.
pub async fn read_exact_at(file: &File, mut data: GuestIo, mut offset: u64) -> io::Result<()> {
    while !data.is_empty() {
        let (count, _) = file.readv_at(data.next_empty(), offset).await;
        offset += advance(&mut data, count, io::ErrorKind::UnexpectedEof)?;
    }
    Ok(())
}

/// Writes guest memory to a file, in as many writes as it takes.
///
/// # Errors
/// The host's.
pub async fn write_all_at(file: &File, mut data: GuestIo, mut offset: u64) -> io::Result<()> {
    while !data.is_empty() {
        let (count, _) = file.writev_at(data.next_filled(), offset).await;
        offset += advance(&mut data, count, io::ErrorKind::WriteZero)?;
    }
    Ok(())
}

/// Drops what an operation has done from the front. Returns how much that was; nothing at all is the error `none`.
fn advance(data: &mut GuestIo, count: io::Result<usize>, none: io::ErrorKind) -> io::Result<u64> {
    let count = match count {
        Ok(0) => return Err(none.into()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        count => count? as u64,
    };
    data.advance(count);
    Ok(count)
}
