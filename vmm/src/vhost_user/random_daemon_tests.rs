//! Our frontend against a daemon that gives arbitrary answers, with arbitrary descriptors.
#![allow(unsafe_code, reason = "a table of descriptors of its own")]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use bolero::TypeGenerator;
use ringvm_vhost_user::connection::{Connection, Limit};
use ringvm_vhost_user::message::Message;
use rustix::fs::MemfdFlags;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;

const SIZE: u16 = 16;
const QUEUES: u16 = 2;
/// A daemon that is asked for nothing for so long has left the frontend without something, and closes the connection.
const IDLE: Duration = Duration::from_millis(4);
/// Longest wait for threads that end by themselves.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon's answer to one message: for the most part the right one.
#[derive(Clone, Debug, TypeGenerator)]
struct Answer {
    how: u8,
    number: u64,
    body: Vec<u8>,
    /// Descriptors that come with it.
    files: u8,
    header: [u32; 3],
}

/// The driver's actions in the meantime.
#[derive(Clone, Debug, TypeGenerator)]
enum Act {
    Features(u64),
    Start {
        queue: u8,
        left: Vec<u8>,
        relayed: bool,
        outside: u8,
    },
    Stop(u8),
    Suspend(u8),
    WriteConfig {
        offset: u8,
        data: Vec<u8>,
    },
    ReadConfig {
        offset: u32,
        len: u8,
    },
    Reset,
    Save,
    Load(Vec<u8>),
    /// The frontend hears the daemon's messages so far.
    Wait,
}

/// Messages of the frontend that have an answer of their own.
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const SET_DEVICE_STATE_FD: u32 = 42;
const CHECK_DEVICE_STATE: u32 = 43;
const SKIP_DRAIN: u32 = 45;
const OWN_ANSWERS: [u32; 9] = [
    GET_FEATURES,
    GET_VRING_BASE,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    GET_CONFIG,
    GET_INFLIGHT_FD,
    SET_DEVICE_STATE_FD,
    CHECK_DEVICE_STATE,
    SKIP_DRAIN,
];
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, DEVICE_STATE, and both bits of suspending.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn send(wire: &Connection, bytes: &[u8], files: &[OwnedFd]) {
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    // The frontend may have gone, or not have read the earlier messages.
    let _ = wire.send(bytes, &files, Limit::now());
}

/// Answers message after message until nothing is left to say.
struct Daemon {
    script: std::vec::IntoIter<Answer>,
    /// Where events are sent.
    events: Option<Connection>,
}

impl Daemon {
    fn run(mut self, listener: &UnixListener, stop: &AtomicBool) {
        while self.script.len() > 0 {
            let (stream, _) = listener.accept().unwrap();
            if stop.load(Ordering::Acquire) {
                return;
            }
            let mut wire = Connection::new(stream);
            while self.serve(&mut wire).is_some() {}
            self.events = None;
        }
    }

    /// Answers one message. `None` is the end of the connection.
    fn serve(&mut self, wire: &mut Connection) -> Option<()> {
        let Message { request, need_reply, body, files } = wire.receive_request(Limit::after(IDLE)).ok()??;
        let came = files.expect("the frontend sends what it may").pop();
        if request == SET_BACKEND_REQ_FD {
            self.events = came.as_ref().map(|file| Connection::new(file.try_clone().unwrap().into()));
        }
        if !OWN_ANSWERS.contains(&request) && !need_reply {
            return Some(());
        }
        let answer = self.script.next()?;
        let number = |sound: u64| if answer.how % 16 == 12 { answer.number } else { sound }.to_ne_bytes().to_vec();
        let mut files = Vec::new();
        let mut reply = match request {
            GET_FEATURES => number(1 << 32 | 1 << 30 | 1 << 28 | 1 << 12 | 1 << 9),
            GET_PROTOCOL_FEATURES => number(PROTOCOL),
            GET_QUEUE_NUM => number(QUEUES.into()),
            GET_CONFIG => {
                let mut space = body;
                if let Some(queues) = space.get_mut(12 + 34..12 + 36) {
                    queues.copy_from_slice(&QUEUES.to_le_bytes());
                }
                space
            }
            GET_VRING_BASE | SKIP_DRAIN => {
                [body[..4.min(body.len())].to_vec(), words(&[answer.number as u32])].concat()
            }
            GET_INFLIGHT_FD => {
                let len = if answer.how % 16 == 12 { answer.number } else { 0x1000 };
                let file = rustix::fs::memfd_create("table", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
                rustix::fs::ftruncate(&file, 0x1000).unwrap();
                let table = &answer.body[..answer.body.len().min(0x1000)];
                let _ = rustix::io::pwrite(&file, table, 0);
                files.push(file);
                let mut area = [len, 0].map(u64::to_ne_bytes).concat();
                area.extend(body.get(16..).unwrap_or_default());
                area
            }
            SET_DEVICE_STATE_FD => {
                // It is the end to write to, or else the frontend writes to it.
                let _ = came.map(|pipe| rustix::io::write(&pipe, &answer.body));
                number(1 << 8)
            }
            _ => number(0),
        };
        let mut header = [request, 1 | 1 << 2, reply.len() as u32];
        match answer.how % 16 {
            0 => return None,
            1 => return Some(()),
            2 => reply = answer.body,
            3 => (header, reply) = (answer.header, answer.body),
            4 => header[(answer.number % 3) as usize] = answer.header[0],
            5 => reply.truncate(answer.number as usize % 32),
            6 => reply.iter_mut().zip(&answer.body).for_each(|(byte, other)| *byte ^= other),
            7 => files.extend((0..answer.files % 40).map(|_| File::open("/dev/null").unwrap().into())),
            8 => files.clear(),
            9 => {
                // The configuration space has changed, or something else has happened.
                let sound = answer.number % 4 != 3;
                let event = if sound { words(&[2, 1, 0]) } else { answer.body };
                let with = (0..answer.files % 3).map(|_| File::open("/dev/null").unwrap().into());
                self.events.iter().for_each(|events| send(events, &event, &with.clone().collect::<Vec<_>>()));
            }
            _ => {}
        }
        send(wire, &[words(&header), reply].concat(), &files);
        Some(())
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/thread-self/fd").unwrap().count()
}

fn drive(device: &mut VhostUserDevice, memory: &GuestMemory, acts: &[Act]) {
    // One more than a disk has: the control queue of a NIC.
    let mut running = [false; QUEUES as usize + 1];
    for act in acts {
        match *act {
            Act::Features(bits) => {
                if !running.contains(&true) {
                    let _ = device.ack_features(device.info.features & bits | 1 << 32);
                }
            }
            Act::Start { queue, ref left, relayed, outside } => {
                let index = u16::from(queue) % (QUEUES + 1);
                let base = 0x1000 * u64::from(index);
                let used = if outside % 8 == 7 { 1 << 40 } else { base + 0x200 };
                let ring = RingConfig { size: SIZE, desc: base, avail: base + 0x100, used };
                let mut parts = QueueParts::new(ring, Arc::clone(memory), event().unwrap());
                parts.left = left.iter().take(4).map(|head| u16::from(*head) % SIZE).collect();
                if relayed {
                    parts.call = Interrupt::Call(Arc::new(|| {}));
                }
                let there = usize::from(index) < device.info.queue_sizes.len();
                let started = device.start_queue(index, parts).is_ok();
                assert!(!started || there && !running[usize::from(index)]);
                if started {
                    running[usize::from(index)] = true;
                }
            }
            Act::Stop(queue) => {
                let index = u16::from(queue) % QUEUES;
                let was = std::mem::take(&mut running[usize::from(index)]);
                assert_eq!(device.drain(index).is_some(), was);
            }
            Act::Suspend(queues) => {
                let asked: Vec<u16> = (0..QUEUES).filter(|queue| queues >> queue & 1 == 1).collect();
                for (&index, end) in asked.iter().zip(device.suspend(&asked)) {
                    assert_eq!(end.is_some(), std::mem::take(&mut running[usize::from(index)]));
                    assert!(end.is_none_or(|end| end.left.iter().all(|&head| head < SIZE)));
                }
            }
            Act::WriteConfig { offset, ref data } => drop(device.write_config(offset.into(), data)),
            Act::ReadConfig { offset, len } => device.read_config(offset, &mut vec![0; len.into()]),
            Act::Reset => {
                device.reset();
                running.fill(false);
            }
            Act::Save => drop(device.save_state()),
            Act::Load(ref state) => drop(device.load_state(state)),
            Act::Wait => thread::yield_now(),
        }
    }
}

fn guest_memory() -> GuestMemory {
    let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 0x1_0000).unwrap();
    let ranges = [(GuestAddress(0), 0x1_0000, Some(FileOffset::new(file.into(), 0)))];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

fn connect(path: &Path, device_type: u32) -> Result<VhostUserDevice, ConnectError> {
    let wanted = Wanted::new(device_type, None, SIZE);
    VhostUserDevice::connect("fuzzed", Peer::Socket(path.to_owned().into()), &wanted)
}

/// Whatever a daemon answers, calls of the device end, and no descriptor of the daemon's stays open.
#[test]
fn fuzz_frontend() {
    // Other tests open and close at the same time, so this one has a table of descriptors of its own, and so have the
    // threads that it starts. It keeps none of the descriptors that it found: another thread may wait for them to be
    // closed.
    // SAFETY: descriptors of the other threads stay open in their table, and this thread has opened none yet.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::close_range(3, u32::MAX, 0) }, 0);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let memory = guest_memory();
    bolero::check!().with_type::<(Vec<Answer>, Vec<Act>, bool)>().for_each(|(script, acts, is_nic)| {
        let before = open_descriptors();
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (daemon, stopped) = (Daemon { script: script.clone().into_iter(), events: None }, Arc::clone(&stop));
        let daemon = thread::spawn(move || daemon.run(&listener, &stopped));
        if !script.is_empty()
            && let Ok(mut device) = connect(&path, if *is_nic { VIRTIO_ID_NET } else { VIRTIO_ID_BLOCK })
        {
            drive(&mut device, &memory, &acts[..acts.len().min(24)]);
        }
        stop.store(true, Ordering::Release);
        // The frontend may be waiting for a connection.
        let _ = UnixStream::connect(&path);
        daemon.join().unwrap();
        // Threads that watch the time end soon after the thing that they watched.
        let start = Instant::now();
        while open_descriptors() != before {
            assert!(start.elapsed() < PATIENCE, "{} descriptors have leaked", open_descriptors() - before);
            thread::yield_now();
        }
    });
}
