//! A disk that stops to answer: a file of a FUSE file system whose server reads no more requests once it is told so. What is asked
//! for then can't be cancelled, as with a network that is away; only the end of the process that waits for it ends it.
//!
//! The file system is mounted nowhere: the file is reached by a descriptor of this process, so nothing is left behind, and it
//! answers whoever waits for it with an error when it is dropped. A file of its own, without the rest of the harness, so that the
//! daemons' tests have it too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// Bytes of the disk, all of them zero whatever is written.
const SIZE: u64 = 1 << 20;
/// Longest request of the kernel: its headers, and what it writes.
const MOST: usize = (128 << 10) + 4096;
/// How often to look whether it is over.
const LOOK_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// How long answers stay true, in seconds.
const FOR_EVER: u64 = 1 << 30;
const ROOT: u64 = 1;
const DISK: u64 = 2;

// Of linux/fuse.h.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
/// Each request of a user is one of ours, and closing the file is none.
const OPEN_FLAGS: u32 = 1 | 1 << 5;

/// The disk. It answers until [`Self::stick`].
#[derive(Debug)]
pub struct StuckDisk {
    file: File,
    state: Arc<State>,
    server: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    stuck: AtomicBool,
    ended: AtomicBool,
    flushes: AtomicUsize,
}

impl StuckDisk {
    /// A disk that answers, of a MiB.
    ///
    /// # Errors
    /// When this process may not mount, or the host has no FUSE.
    pub fn new() -> io::Result<Self> {
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let device = File::options().read(true).write(true).custom_flags(nonblocking).open("/dev/fuse")?;
        let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let number = device.as_raw_fd().to_string();
        for (key, value) in [("fd", number.as_str()), ("rootmode", "40755"), ("user_id", "0"), ("group_id", "0")] {
            rustix::mount::fsconfig_set_string(&context, key, value)?;
        }
        rustix::mount::fsconfig_create(&context)?;
        let state = Arc::<State>::default();
        let theirs = Arc::clone(&state);
        let server = std::thread::Builder::new().name("stuck-disk".into()).spawn(move || serve(device, &theirs))?;
        let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let file = rustix::fs::openat(&mount, "disk", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { file: file.into(), state, server: Some(server) })
    }

    /// A path by which processes of this user can open it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Has it answer no more.
    pub fn stick(&self) {
        self.state.stuck.store(true, Ordering::Release);
    }

    /// How often it was flushed.
    #[must_use]
    pub fn flushes(&self) -> usize {
        self.state.flushes.load(Ordering::Acquire)
    }
}

impl Drop for StuckDisk {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Release);
        if let Some(server) = self.server.take() {
            // Its panic has been seen.
            drop(server.join());
        }
    }
}

/// Answers requests. The kernel ends what is left when the device is closed.
fn serve(mut device: File, state: &State) {
    let mut request = vec![0; MOST];
    while !state.ended.load(Ordering::Acquire) {
        let mut fds = [PollFd::new(&device, PollFlags::IN)];
        let came = rustix::event::poll(&mut fds, Some(&LOOK_PAUSE)) == Ok(1);
        if state.stuck.load(Ordering::Acquire) {
            // Requests that are not even read end with the process that waits for them.
            std::thread::sleep(Duration::from_millis(5));
        } else if came {
            // It fails where whoever asked has given it up meanwhile.
            if let Ok(len) = device.read(&mut request) {
                if request[4..8] == FSYNC.to_ne_bytes() {
                    state.flushes.fetch_add(1, Ordering::AcqRel);
                }
                answer(&mut device, &request[..len]);
            }
        }
    }
}

fn answer(device: &mut File, request: &[u8]) {
    let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().expect("a word is four bytes"));
    let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().expect("a word is eight bytes"));
    let (operation, unique, node) = (word(4), long(8), long(16));
    // Behind the header of 40 bytes.
    let result = match operation {
        FORGET | BATCH_FORGET | INTERRUPT => return,
        // Version 7.31 with nothing that is optional; the most bytes of a write, and the unit of time.
        INIT => Ok([words(&[7, 31, 0, 0, 12 | 9 << 16, 128 << 10, 1]), vec![0; 36]].concat()),
        LOOKUP if &request[40..] == b"disk\0" => {
            Ok([longs(&[DISK, 0, FOR_EVER, FOR_EVER]), words(&[0, 0]), attributes(DISK)].concat())
        }
        LOOKUP => Err(2),
        GETATTR | SETATTR => Ok([longs(&[FOR_EVER]), words(&[0, 0]), attributes(node)].concat()),
        OPEN => Ok([longs(&[0]), words(&[OPEN_FLAGS, 0])].concat()),
        READ => Ok(vec![0; long(48).min(SIZE).abs_diff(SIZE).min(u64::from(word(56))) as usize]),
        WRITE => Ok(words(&[word(56), 0])),
        RELEASE | FSYNC => Ok(Vec::new()),
        // ENOSYS: the kernel does without.
        _ => Err(38_i32),
    };
    let (error, body) = result.map_or_else(|errno| (-errno, Vec::new()), |body| (0, body));
    let header = [words(&[16 + body.len() as u32, error as u32]), longs(&[unique])].concat();
    // It fails for what was interrupted.
    drop(device.write(&[header, body].concat()));
}

/// `struct fuse_attr` of the root or the disk.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = if node == ROOT { (0o40755, 0) } else { (0o100600, SIZE) };
    [longs(&[node, size, size / 512, 0, 0, 0]), words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}
