//! Sessions with a hostile frontend: messages of any kind in any order, with descriptors of any kind.
#![allow(unsafe_code, reason = "a table of descriptors of its own")]

use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bolero::TypeGenerator;
use ringvm_backends::block::{BlockDevice, BlockOptions, StorageKind};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::net::{NetDevice, NetOptions};
use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, SealFlags};

use super::*;

/// Guest memory lies here, and the frontend sees it there.
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7f00_0000_0000;
const LEN: u64 = 0x1_0000;
/// Each ring has so much of it, in which a queue of 16 descriptors lies as `Driver` would lay it out.
const RING_SPACE: u64 = 0x1000;
const RING_SIZE: u32 = 16;

/// The descriptors that come with a message.
#[derive(Clone, Copy, Debug, TypeGenerator)]
enum Descriptor {
    /// The memory of the guest, the same each time.
    Guest,
    Memfd {
        sealed: bool,
        pages: u8,
    },
    Event {
        counter: u8,
        full: bool,
        blocking: bool,
    },
    /// With something to read in it and no writer.
    Pipe(u8),
    /// A reader takes the bytes written to it.
    Into,
    Socket,
    Datagrams,
    Image,
    Null,
    Directory,
}

/// A message, or several that belong together.
#[derive(Clone, Debug, TypeGenerator)]
enum Said {
    /// The steps of a friendly frontend: everything up to a running ring.
    Start {
        ring: u8,
        inflight: bool,
        features: u64,
        base: u16,
    },
    /// A driver's action on a ring: a request for `sector`, or anything.
    Offer {
        ring: u8,
        heads: Vec<u8>,
        descriptors: [(u8, u16, u16, u8, u8); 4],
        index: u16,
    },
    /// Numbers of the ring's own messages, which are two words.
    Ring {
        kind: u8,
        index: u32,
        number: u32,
        need_reply: bool,
    },
    /// A ring and a descriptor.
    Line {
        kind: u8,
        ring: u16,
        with: Option<Descriptor>,
        need_reply: bool,
    },
    Features {
        kind: u8,
        bits: u64,
        need_reply: bool,
    },
    Addresses {
        ring: u8,
        flags: u32,
        at: [u64; 3],
        log: u64,
    },
    Region {
        add: bool,
        guest: u64,
        size: u64,
        user: u64,
        offset: u64,
        with: Option<Descriptor>,
    },
    Table {
        regions: Vec<(u64, u64, u64, u64, Descriptor)>,
        claimed: u32,
    },
    Area {
        kind: u8,
        size: u64,
        offset: u64,
        queues: u16,
        queue_size: u16,
        with: Option<Descriptor>,
    },
    Config {
        set: bool,
        offset: u32,
        size: u32,
        bytes: Vec<u8>,
    },
    State {
        direction: u32,
        phase: u32,
        with: Option<Descriptor>,
    },
    Any {
        kind: u32,
        flags: u32,
        size: Option<u32>,
        body: Vec<u8>,
        with: Vec<Descriptor>,
    },
}

/// A client's end: its messages wait in the socket until the session reads them.
struct Client {
    wire: Connection,
    guest: File,
    image: OwnedFd,
    /// Other ends of the descriptors passed.
    kept: Vec<OwnedFd>,
}

fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("fuzzed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

impl Client {
    fn new(stream: UnixStream, image: &OwnedFd) -> Self {
        let image = image.try_clone().unwrap();
        Self { wire: Connection::new(stream), guest: memfd(LEN).into(), image, kept: Vec::new() }
    }

    fn make(&mut self, descriptor: Descriptor) -> OwnedFd {
        match descriptor {
            Descriptor::Guest => self.guest.as_fd().try_clone_to_owned().unwrap(),
            Descriptor::Memfd { sealed, pages } => {
                let fd = memfd(u64::from(pages) * 512);
                if sealed {
                    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
                }
                fd
            }
            Descriptor::Event { counter, full, blocking } => {
                let flags = if blocking { EventfdFlags::empty() } else { EventfdFlags::NONBLOCK };
                let fd = rustix::event::eventfd(counter.into(), flags | EventfdFlags::CLOEXEC).unwrap();
                if full {
                    let room = u64::MAX - 1 - u64::from(counter);
                    rustix::io::write(&fd, &room.to_ne_bytes()).unwrap();
                }
                fd
            }
            Descriptor::Pipe(len) => {
                let (out, mut into) = std::io::pipe().unwrap();
                into.write_all(&vec![len; len.into()]).unwrap();
                out.into()
            }
            Descriptor::Into => {
                let (out, into) = std::io::pipe().unwrap();
                self.kept.push(out.into());
                into.into()
            }
            Descriptor::Socket => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                self.kept.push(ours.into());
                theirs.into()
            }
            Descriptor::Datagrams => {
                let (ours, theirs) = UnixDatagram::pair().unwrap();
                self.kept.push(ours.into());
                theirs.into()
            }
            Descriptor::Image => self.image.try_clone().unwrap(),
            Descriptor::Null => File::open("/dev/null").unwrap().into(),
            Descriptor::Directory => File::open("/").unwrap().into(),
        }
    }

    /// Writes a message if there is room for it.
    fn raw(&mut self, kind: u32, flags: u32, size: u32, body: &[u8], with: &[Descriptor]) {
        let files: Vec<OwnedFd> = with.iter().map(|&descriptor| self.make(descriptor)).collect();
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let bytes = [words(&[kind, flags, size]), body.to_vec()].concat();
        // Where there is no room the session ends in the middle of a message.
        let _ = self.wire.send(&bytes, &files, Limit::now());
    }

    fn send(&mut self, kind: u32, need_reply: bool, body: &[u8], with: &[Descriptor]) {
        self.raw(kind, 1 | u32::from(need_reply) << 3, body.len() as u32, body, with);
    }

    fn say(&mut self, said: &Said) {
        let code = |kind: FrontendReq| u32::from(kind);
        match *said {
            Said::Start { ring, inflight, features, base } => {
                let index = u32::from(ring % 4);
                let at = USER + u64::from(index) * RING_SPACE;
                let sound = 1 << 32 | 1 << 30;
                let features = if features % 4 == 3 { features } else { sound | features & 0x3_3fff_ffff };
                self.send(code(FrontendReq::SET_PROTOCOL_FEATURES), false, &longs(&[PROTOCOL]), &[]);
                self.send(code(FrontendReq::SET_FEATURES), true, &longs(&[features]), &[]);
                let mut table = words(&[1, 0]);
                table.extend(longs(&[GUEST, LEN, USER, 0]));
                self.send(code(FrontendReq::SET_MEM_TABLE), true, &table, &[Descriptor::Guest]);
                if inflight {
                    let area = [longs(&[0x1000, 0]), words(&[4 | RING_SIZE << 16, 0])].concat();
                    let table = Descriptor::Memfd { sealed: true, pages: 8 };
                    self.send(code(FrontendReq::SET_INFLIGHT_FD), true, &area, &[table]);
                }
                self.send(code(FrontendReq::SET_VRING_NUM), true, &words(&[index, RING_SIZE]), &[]);
                let mut body = words(&[index, 0]);
                body.extend(longs(&[at, at + 0x200, at + 0x100, 0]));
                self.send(code(FrontendReq::SET_VRING_ADDR), true, &body, &[]);
                self.send(code(FrontendReq::SET_VRING_BASE), true, &words(&[index, base.into()]), &[]);
                let event = Descriptor::Event { counter: 1, full: false, blocking: false };
                for line in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR, FrontendReq::SET_VRING_KICK] {
                    self.send(code(line), true, &longs(&[index.into()]), &[event]);
                }
                self.send(code(FrontendReq::SET_VRING_ENABLE), true, &words(&[index, 1]), &[]);
            }
            Said::Offer { ring, ref heads, ref descriptors, index } => {
                let at = u64::from(ring % 4) * RING_SPACE;
                let write = |bytes: &[u8], offset| self.guest.write_all_at(bytes, at + offset).unwrap();
                for &(place, addr, len, flags, next) in descriptors {
                    let mut desc = longs(&[GUEST + u64::from(addr)]);
                    desc.extend(words(&[len.into(), u32::from(flags & 7) | u32::from(next % 17) << 16]));
                    write(&desc, u64::from(place % 16) * 16);
                }
                for (i, head) in heads.iter().take(16).enumerate() {
                    write(&u16::from(head % 17).to_le_bytes(), 0x104 + 2 * i as u64);
                }
                write(&(index % 20).to_le_bytes(), 0x102);
            }
            Said::Ring { kind, index, number, need_reply } => {
                const KINDS: [u32; 6] = [8, 10, 11, 18, SKIP_DRAIN, SKIP_DRAIN];
                let index = if index % 8 == 7 { index } else { index % 4 };
                let number = if number % 4 == 3 { number } else { number % 65 };
                let kind = KINDS[usize::from(kind) % KINDS.len()];
                self.send(kind, need_reply, &words(&[index, number]), &[]);
            }
            Said::Line { kind, ring, with, need_reply } => {
                let kind = 12 + u32::from(kind % 3);
                let ring = if ring % 8 == 7 { ring } else { ring % 4 };
                let said = u64::from(ring) | if with.is_none() { 1 << 8 } else { 0 };
                self.send(kind, need_reply, &longs(&[said]), with.as_slice());
            }
            Said::Features { kind, bits, need_reply } => {
                let (kind, bits) = match kind % 8 {
                    0 => (code(FrontendReq::SET_PROTOCOL_FEATURES), bits),
                    1 => (code(FrontendReq::SET_PROTOCOL_FEATURES), bits & PROTOCOL),
                    2 => (code(FrontendReq::SET_STATUS), bits),
                    3 => (code(FrontendReq::SET_STATUS), 0),
                    4 => (code(FrontendReq::SET_FEATURES), bits),
                    _ => (code(FrontendReq::SET_FEATURES), bits & 0x3_3fff_ffff | 1 << 32 | bits & 1 << 26),
                };
                self.send(kind, need_reply, &longs(&[bits]), &[]);
            }
            Said::Addresses { ring, flags, at, log } => {
                let mut body = words(&[u32::from(ring % 8), flags & 3]);
                body.extend(longs(&at.map(|at| if at % 8 == 7 { at } else { USER + at % LEN })));
                body.extend(longs(&[if log % 8 == 7 { log } else { GUEST + log % LEN }]));
                self.send(code(FrontendReq::SET_VRING_ADDR), true, &body, &[]);
            }
            Said::Region { add, guest, size, user, offset, with } => {
                let kind = if add { FrontendReq::ADD_MEM_REG } else { FrontendReq::REM_MEM_REG };
                let body = longs(&[&[0][..], &region(guest, size, user, offset)].concat());
                self.send(code(kind), true, &body, with.as_slice());
            }
            Said::Table { ref regions, claimed } => {
                let count = if claimed % 8 == 7 { claimed } else { regions.len() as u32 };
                let mut body = words(&[count, 0]);
                let mut with = Vec::new();
                for &(guest, size, user, offset, descriptor) in regions.iter().take(12) {
                    body.extend(longs(&region(guest, size, user, offset)));
                    with.push(descriptor);
                }
                self.send(code(FrontendReq::SET_MEM_TABLE), true, &body, &with);
            }
            Said::Area { kind, size, offset, queues, queue_size, with } => {
                let near = |value: u64| if value % 8 == 7 { value } else { value % 0x4000 };
                let mut body = longs(&[near(size), near(offset)]);
                let kind = match kind % 3 {
                    0 => FrontendReq::GET_INFLIGHT_FD,
                    1 => FrontendReq::SET_INFLIGHT_FD,
                    _ => FrontendReq::SET_LOG_BASE,
                };
                if kind != FrontendReq::SET_LOG_BASE {
                    let queues = if queues % 8 == 7 { queues } else { queues % 5 };
                    let queue_size = if queue_size % 8 == 7 { queue_size } else { queue_size % 65 };
                    body.extend(words(&[u32::from(queues) | u32::from(queue_size) << 16]));
                }
                self.send(code(kind), true, &body, with.as_slice());
            }
            Said::Config { set, offset, size, ref bytes } => {
                let kind = if set { FrontendReq::SET_CONFIG } else { FrontendReq::GET_CONFIG };
                let offset = if offset % 8 == 7 { offset } else { offset % 80 };
                // Whole large messages would fill the socket, which has no reader.
                let size = if size % 8 == 7 { size.max(4097) } else { size % 80 };
                let body = [words(&[offset, size, 0]), bytes.clone()].concat();
                self.send(code(kind), true, &body, &[]);
            }
            Said::State { direction, phase, with } => {
                let body = words(&[direction % 3, if phase % 8 == 7 { phase } else { 0 }]);
                self.send(code(FrontendReq::SET_DEVICE_STATE_FD), true, &body, with.as_slice());
                self.send(code(FrontendReq::CHECK_DEVICE_STATE), true, &[], &[]);
            }
            Said::Any { kind, flags, size, ref body, ref with } => {
                let kind = if kind % 8 == 7 { kind } else { kind % 50 };
                let flags = if flags % 4 == 3 { flags } else { 1 | flags & 8 };
                let with = &with[..with.len().min(if flags % 32 == 31 { 40 } else { 3 })];
                self.raw(kind, flags, size.filter(|size| size % 8 == 7).unwrap_or(body.len() as u32), body, with);
            }
        }
    }
}

/// A region near the truth for the most part.
fn region(guest: u64, size: u64, user: u64, offset: u64) -> [u64; 4] {
    let page = |value: u64, sound: u64| if value % 8 == 7 { value } else { sound + value % 16 * 0x1000 };
    [page(guest, GUEST), page(size, 0), page(user, USER), if offset % 4 == 3 { offset } else { offset % 4 * 0x1000 }]
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// All protocol features that are offered but the one by which GET_VRING_BASE alone suspends.
const PROTOCOL: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16 | 1 << 19 | 1 << 20 | 1 << 23;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/thread-self/fd").unwrap().count()
}

/// Whether this process maps any of the memory that clients have passed.
fn maps_memfds() -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains("/memfd:fuzzed")
}

/// An I/O thread may have a queue's memory mapped for a moment after the queue was stopped.
fn soon(else_what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "{else_what}");
        std::thread::yield_now();
    }
}

/// Whatever a frontend sends, the session ends, and leaves no descriptor and no mapping.
#[test]
fn fuzz_session() {
    // Other tests open and close at the same time, so this one has a table of descriptors of its own, and so have the
    // threads that it starts. It keeps none of the descriptors that it found: another thread may wait for them to be
    // closed.
    // SAFETY: descriptors of the other threads stay open in their table, and this thread has opened none yet.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::close_range(3, u32::MAX, 0) }, 0);

    let pool = ReactorPool::new(&ReactorOptions { count: 1, ..ReactorOptions::default() }).unwrap();
    let null = BlockOptions { storage: StorageKind::Null, size: Some(1 << 20), queues: 2, ..BlockOptions::default() };
    let loopback = NetOptions { loopback: true, queues: 1, ..NetOptions::default() };
    let disk: Box<dyn Device> = Box::new(BlockDevice::open("disk", &null, &pool).unwrap());
    let nic: Box<dyn Device> = Box::new(NetDevice::open("nic", &loopback, &pool).unwrap());
    let devices = Mutex::new([disk, nic]);
    let mailbox = Mailbox::new().unwrap();
    let image: OwnedFd = tempfile::tempfile().unwrap().into();
    rustix::fs::ftruncate(&image, 1 << 20).unwrap();

    bolero::check!().with_type::<(bool, Vec<Said>)>().for_each(|(is_nic, messages)| {
        let mut devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
        let device = devices[usize::from(*is_nic)].as_mut();
        let before = open_descriptors();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut client = Client::new(theirs, &image);
        messages.iter().take(48).for_each(|said| client.say(said));
        rustix::net::shutdown(&client.wire, rustix::net::Shutdown::Write).unwrap();
        let mut session = Session::new(device, Connection::new(ours), &mailbox).unwrap();
        // How it ends is up to the messages.
        let _ = session.run();
        drop(session);
        drop(client);
        soon("memory is still mapped", || !maps_memfds());
        soon("descriptors have leaked", || open_descriptors() == before);
    });
}
