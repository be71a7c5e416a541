//! A frontend as the tests need it: every message by hand, right or wrong, with memory and rings that work.
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringvm_backends::device::GuestMemory;
use ringvm_backends::testing::driver::{Buffer, Driver};
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use vhost::vhost_user::message::FrontendReq;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{PATIENCE, wait};

pub(crate) const VERSION: u32 = 1;
pub(crate) const NEED_REPLY: u32 = 8;
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VERSION_1, INDIRECT_DESC, FLUSH and the vhost-user bit.
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 9 | PROTOCOL_FEATURES;
/// What is written to guest memory is marked in a log.
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const MEMORY: u64 = 4 << 20;
/// What the client says its addresses are: others than the guest's.
pub(crate) const USER: u64 = 0x7f00_0000_0000;
pub(crate) const GUEST: u64 = 0x10_0000;
pub(crate) const SIZE: u16 = 64;
const RING_SPACE: u64 = 0x1_0000;
pub(crate) const DATA: u64 = GUEST + 0x10_0000;
/// Protocol features: MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS,
/// DEVICE_STATE, GET_VRING_BASE_INFLIGHT, GET_VRING_BASE_SKIP_DRAIN.
pub(crate) const PROTOCOL: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16 | 1 << 19 | 1 << 20 | 1 << 23;
/// GET_VRING_BASE_SKIP_DRAIN.
pub(crate) const SKIP_DRAIN: u32 = 45;

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

pub(crate) fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// The same eventfd as the `vhost` crate wants it.
#[allow(unsafe_code, reason = "eventfds by number")]
pub(crate) fn event(fd: &OwnedFd) -> EventFd {
    let copy = fd.try_clone().unwrap();
    // SAFETY: the descriptor is open, and given away.
    unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) }
}

pub(crate) fn memfd(size: u64, flags: MemfdFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create("client", flags | MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, size).unwrap();
    file
}

/// One side of a connection.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    /// REPLY_ACK was negotiated.
    pub(crate) acks: bool,
}

/// A reply: its code, its payload, its descriptors.
pub(crate) type Reply = (u32, Vec<u8>, Vec<OwnedFd>);

impl Client {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("the daemon listens");
        Self::over(stream)
    }

    pub(crate) fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, acks: false }
    }

    /// Sends bytes as they are. Whether they arrive is not known: the other side may have gone.
    pub(crate) fn raw(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
        rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) == Ok(bytes.len())
    }

    pub(crate) fn header(request: u32, flags: u32, size: usize) -> Vec<u8> {
        words(&[request, flags, size as u32])
    }

    /// Sends a request of any number.
    pub(crate) fn send_code(&self, request: u32, flags: u32, body: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        let mut bytes = Self::header(request, VERSION | flags, body.len());
        bytes.extend(body);
        self.raw(&bytes, files)
    }

    pub(crate) fn send(&self, request: FrontendReq, body: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        self.send_code(request.into(), 0, body, files)
    }

    /// Receives a reply; `None` if the connection has ended.
    pub(crate) fn receive(&mut self) -> Option<Reply> {
        let mut files = Vec::new();
        let mut header = [0; 12];
        let mut filled = 0;
        while filled < header.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut room = [IoSliceMut::new(&mut header[filled..])];
            let received = rustix::net::recvmsg(&self.stream, &mut room, &mut control, RecvFlags::CMSG_CLOEXEC);
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(came) = message {
                    files.extend(came);
                }
            }
            match received {
                Ok(received) if received.bytes > 0 => filled += received.bytes,
                Err(rustix::io::Errno::AGAIN) => panic!("no answer within {PATIENCE:?}"),
                _ => return None,
            }
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4) & 7, 5, "a reply of version 1");
        let mut body = vec![0; word(8) as usize];
        self.stream.read_exact(&mut body).ok()?;
        Some((word(0), body, files))
    }

    /// Sends a request that has a reply, and returns that.
    pub(crate) fn ask(&mut self, request: FrontendReq, body: &[u8]) -> Vec<u8> {
        self.send(request, body, &[]);
        let (code, body, files) = self.receive().unwrap_or_else(|| panic!("{request:?} is answered"));
        assert_eq!((code, files.len()), (request.into(), 0));
        body
    }

    pub(crate) fn ask_number(&mut self, request: FrontendReq) -> u64 {
        u64::from_ne_bytes(self.ask(request, &[]).try_into().expect("eight bytes"))
    }

    /// Sends a request and returns whether it was met; needs REPLY_ACK.
    pub(crate) fn try_tell(&mut self, request: FrontendReq, body: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        assert!(self.acks);
        self.send_code(request.into(), NEED_REPLY, body, files);
        let (code, body, _) = self.receive().unwrap_or_else(|| panic!("{request:?} is answered"));
        assert_eq!(code, u32::from(request));
        u64::from_ne_bytes(body.try_into().expect("eight bytes")) == 0
    }

    pub(crate) fn tell(&mut self, request: FrontendReq, body: &[u8], files: &[BorrowedFd<'_>]) {
        assert!(self.try_tell(request, body, files), "{request:?} is met");
    }

    /// Everything until memory and rings come.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.send(FrontendReq::SET_OWNER, &[], &[]);
        assert_ne!(self.ask_number(FrontendReq::GET_FEATURES) & PROTOCOL_FEATURES, 0);
        assert_eq!(self.ask_number(FrontendReq::GET_PROTOCOL_FEATURES), PROTOCOL, "nothing that is not served");
        self.send(FrontendReq::SET_PROTOCOL_FEATURES, &longs(&[PROTOCOL]), &[]);
        self.acks = true;
        self.tell(FrontendReq::SET_FEATURES, &longs(&[features]), &[]);
    }

    /// Has what is written to guest memory marked in a log of a MiB, which is as much as a ring can reach here.
    pub(crate) fn log_writes(&mut self) -> OwnedFd {
        let log = memfd(1 << 20, MemfdFlags::ALLOW_SEALING);
        self.send(FrontendReq::SET_LOG_BASE, &longs(&[1 << 20, 0]), &[log.as_fd()]);
        assert!(self.receive().is_some(), "the log is taken");
        self.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]);
        log
    }

    /// Whether the other side has ended the connection, within some time.
    pub(crate) fn is_dropped(&mut self) -> bool {
        loop {
            match self.stream.read(&mut [0; 256]) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return true,
                Err(_) => return false,
            }
        }
    }
}

/// Memory of a frontend.
pub(crate) struct Memory {
    pub(crate) file: OwnedFd,
    pub(crate) mem: GuestMemory,
}

impl Memory {
    pub(crate) fn new(flags: MemfdFlags) -> Self {
        let file = memfd(MEMORY, flags);
        let mapped = FileOffset::new(file.try_clone().unwrap().into(), 0);
        let mem = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(GUEST), MEMORY as usize, Some(mapped))]);
        Self { file, mem: Arc::new(mem.unwrap()) }
    }

    /// The payload of ADD_MEM_REG.
    pub(crate) fn region(&self) -> Vec<u8> {
        longs(&[0, GUEST, MEMORY, USER, 0])
    }

    /// The payload of SET_MEM_TABLE.
    pub(crate) fn table(&self) -> Vec<u8> {
        [words(&[1, 0]), longs(&[GUEST, MEMORY, USER, 0])].concat()
    }
}

/// The driver of one ring, and requests of a disk.
pub(crate) struct Ring {
    pub(crate) driver: Driver,
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    pub(crate) index: u32,
    /// Whether requests take one descriptor of the ring.
    pub(crate) indirect: bool,
    mem: GuestMemory,
}

impl Ring {
    pub(crate) fn new(memory: &Memory, index: u32) -> Self {
        let base = GUEST + RING_SPACE * u64::from(index);
        let driver = Driver::new(Arc::clone(&memory.mem), base, SIZE, 0);
        Self { driver, kick: eventfd(), call: eventfd(), index, indirect: false, mem: Arc::clone(&memory.mem) }
    }

    /// The messages that tell of the ring, in an order that QEMU uses, with the ring's descriptors.
    pub(crate) fn messages(&self) -> Vec<(FrontendReq, Vec<u8>, Option<BorrowedFd<'_>>)> {
        let ring = self.driver.ring();
        let user = |guest: u64| guest - GUEST + USER;
        let mut addresses = words(&[self.index, 0]);
        addresses.extend(longs(&[user(ring.desc), user(ring.used), user(ring.avail), 0]));
        let index = u64::from(self.index);
        vec![
            (FrontendReq::SET_VRING_NUM, words(&[self.index, ring.size.into()]), None),
            (FrontendReq::SET_VRING_BASE, words(&[self.index, 0]), None),
            (FrontendReq::SET_VRING_ADDR, addresses, None),
            (FrontendReq::SET_VRING_KICK, longs(&[index]), Some(self.kick.as_fd())),
            (FrontendReq::SET_VRING_CALL, longs(&[index]), Some(self.call.as_fd())),
            (FrontendReq::SET_VRING_ENABLE, words(&[self.index, 1]), None),
        ]
    }

    pub(crate) fn start(&self, client: &mut Client) {
        for (request, body, file) in self.messages() {
            client.tell(request, &body, file.as_slice());
        }
    }

    pub(crate) fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Whether the call was raised since this was asked last, within `patience`.
    pub(crate) fn called(call: &OwnedFd, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while rustix::io::read(call, &mut [0; 8]).is_err() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    fn slot(&self, slot: u64) -> u64 {
        DATA + (u64::from(self.index) * u64::from(SIZE) + slot) * 8192
    }

    /// Adds a write or read of 4 KiB; not published.
    pub(crate) fn add(&mut self, slot: u64, sector: u64, write: Option<u8>) -> u16 {
        let at = self.slot(slot);
        let mut header = words(&[u32::from(write.is_some()), 0]);
        header.extend(longs(&[sector]));
        self.mem.write_slice(&header, GuestAddress(at)).unwrap();
        self.mem.write_slice(&[0xee], GuestAddress(at + 16)).unwrap();
        self.mem.write_slice(&[write.unwrap_or(0xa5); 4096], GuestAddress(at + 4096)).unwrap();
        let buffers = [
            Buffer { addr: at, len: 16, writable: false },
            Buffer { addr: at + 4096, len: 4096, writable: write.is_none() },
            Buffer { addr: at + 16, len: 1, writable: true },
        ];
        let head = if self.indirect { self.driver.add_indirect(at + 64, &buffers) } else { self.driver.add(&buffers) };
        head.expect("there is room in the ring")
    }

    /// Fills the ring with reads of as many bytes as their pieces can have; their buffers are one and the same. Not published.
    /// Returns how many there are.
    pub(crate) fn add_longest_reads(&mut self, memory: &Memory) -> usize {
        let (pieces, table) = (1000, DATA);
        let (header, status) = (DATA - 64, DATA - 16);
        memory.mem.write_slice(&[0; 16], GuestAddress(header)).unwrap();
        let data = Buffer { addr: DATA + 0x1_0000, len: 16 << 10, writable: true };
        let mut buffers = vec![Buffer { addr: header, len: 16, writable: false }];
        buffers.extend(vec![data; pieces]);
        buffers.push(Buffer { addr: status, len: 1, writable: true });
        (0..usize::from(SIZE)).take_while(|_| self.driver.add_indirect(table, &buffers).is_some()).count()
    }

    /// Fills the ring with one request over and over, and waits until all of them have come back. Its buffers are indirect or not.
    pub(crate) fn serve_full(&mut self, mut add: impl FnMut(&mut Driver) -> Option<u16>) {
        let count = (0..SIZE).take_while(|_| add(&mut self.driver).is_some()).count();
        assert!(count > 0);
        self.driver.publish();
        self.kick();
        for _ in 0..count {
            self.used();
        }
    }

    /// The status byte of a request.
    pub(crate) fn status(&self, slot: u64) -> u8 {
        self.mem.read_obj(GuestAddress(self.slot(slot) + 16)).unwrap()
    }

    /// The first byte of a request's data.
    pub(crate) fn data(&self, slot: u64) -> u8 {
        self.mem.read_obj(GuestAddress(self.slot(slot) + 4096)).unwrap()
    }

    pub(crate) fn used(&mut self) -> u16 {
        let mut head = None;
        wait("a used buffer", || {
            head = self.driver.next_used();
            head.is_some()
        });
        head.unwrap().0
    }

    /// Writes a byte all over a block, reads it back, and compares.
    pub(crate) fn works(&mut self, value: u8) {
        for write in [Some(value), None] {
            self.add(0, 8, write);
            self.driver.publish();
            self.kick();
            self.used();
            assert_eq!(self.status(0), 0);
        }
        assert_eq!(self.data(0), value);
    }
}

/// A client that is through with everything, with a ring that runs.
pub(crate) fn running(socket: &Path) -> (Client, Memory, Ring) {
    let mut client = Client::connect(socket);
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
    let ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    (client, memory, ring)
}
