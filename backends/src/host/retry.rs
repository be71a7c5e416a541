//! Retries for files that an ended process still keeps open for a moment. The kernel releases the files of an
//! io_uring only when its requests in flight have ended, which is after the process can be waited for; Linux 6.1
//! takes up to a second for registered files.

use std::io;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(5);

/// Makes `attempt` until it does not end with one of `busy` (errno), for three seconds at most.
pub(crate) fn outwait<T>(busy: &[i32], mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(error)
                if error.raw_os_error().is_some_and(|errno| busy.contains(&errno)) && start.elapsed() < PATIENCE =>
            {
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_busy_for_a_moment_is_had_and_other_errors_come_at_once() {
        let mut left = 3;
        let mut busy = || {
            left -= 1;
            if left > 0 { Err(io::Error::from_raw_os_error(libc::EBUSY)) } else { Ok(left) }
        };
        assert_eq!(outwait(&[libc::EAGAIN, libc::EBUSY], &mut busy).unwrap(), 0);
        let mut attempts = 0;
        let refused = || -> io::Result<()> {
            attempts += 1;
            Err(io::Error::from_raw_os_error(libc::EPERM))
        };
        assert_eq!(outwait(&[libc::EBUSY], refused).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(attempts, 1);
    }
}
