//! What a person types, on its way to a virtio console: through the console thread, which looks for the escape, and a
//! pipe.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::pipe::{PipeFlags, pipe_with};
use tracing::warn;

use super::InputPort;

/// The end of the pipe that is typed into.
struct Keyboard {
    pipe: File,
    /// It was said that keys are lost.
    told: bool,
}

/// Makes the pipe: where input goes, and what the device reads.
///
/// # Errors
/// When the host has no descriptor left.
pub fn keyboard() -> io::Result<(Arc<Mutex<dyn InputPort>>, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    Ok((Arc::new(Mutex::new(Keyboard { pipe: write.into(), told: false })), read))
}

impl InputPort for Keyboard {
    fn receive(&mut self, input: &[u8]) -> usize {
        match self.pipe.write(input) {
            Ok(count) => count,
            Err(error) => {
                // A guest that reads nothing must not keep the escape from being seen.
                if !std::mem::replace(&mut self.told, true) {
                    warn!(%error, "the guest does not read its console; what is typed is lost");
                }
                input.len()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn keys_come_out_until_nobody_reads_them() {
        let (port, read) = keyboard().unwrap();
        let mut port = port.lock().unwrap();
        assert_eq!(port.receive(b"login"), 5);
        let mut typed = [0; 5];
        File::from(read.try_clone().unwrap()).read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"login");
        // A full pipe takes no more, and none of it is waited for.
        for _ in 0..100 {
            assert!(port.receive(&[b'x'; 4096]) > 0);
        }
        drop(read);
        assert_eq!(port.receive(b"gone"), 4);
    }
}
