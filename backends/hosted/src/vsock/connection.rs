//! One connection: a Unix socket of the host on one side, packets of the guest on the other, and the credit that both
//! sides give each other (virtio 1.3, section 5.10.6.3).
//!
//! Credit bounds what is kept here. The guest may have [`BUF_ALLOC`] bytes under way to the host's program, and only what
//! the program's socket does not take is kept. Nothing is read from the program before the guest has room for it.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, SendFlags, Shutdown};
use vmm_sys_util::epoll::EventSet;

use super::packet::{HOST_CID, Header, TYPE_STREAM, op, shut};

/// Most bytes that are kept for the host's program, which the guest is told.
pub(super) const BUF_ALLOC: u32 = 64 << 10;

/// The guest is told of room when this much has become free since it was last told. More often would cost a packet for each
/// of the guest's; less often would let it run dry.
const UPDATE_AFTER: u32 = BUF_ALLOC / 4;

/// Where a connection is addressed to: there is one for each pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A program of the host wants it. `sent` is whether the guest has been asked.
    Requested { sent: bool },
    /// The guest wants it and the program is there. The guest has not been told.
    Accepted,
    /// Both sides have it.
    Open,
    /// The guest has closed it and forgotten about it. The program has not taken everything yet.
    Lingering,
}

/// The guest broke the protocol. The connection ends with RST.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation(pub(super) &'static str);

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    guest_cid: u64,
    stream: UnixStream,
    phase: Phase,
    /// Bytes from the guest that the program's socket has not taken.
    buffer: VecDeque<u8>,
    /// Bytes that the guest has sent, bytes of these that are not kept any more, and how many of those the guest knows of.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes that the guest was sent, and its credit as it has last told it.
    sent: Wrapping<u32>,
    peer_alloc: u32,
    peer_forwarded: Wrapping<u32>,
    /// SHUTDOWN flags of the guest, those of the program, and those of the program that the guest knows of.
    guest_shut: u32,
    host_shut: u32,
    told_shut: u32,
    /// What was passed on of the guest's flags.
    passed_shut: u32,
    /// The socket may have bytes. Its events come once only, so this stays until a read finds nothing.
    readable: bool,
    hung_up: bool,
    /// The guest has asked for our credit.
    asked: bool,
    /// We have asked for the guest's. Once, until it gives some: a guest without room answers too.
    credit: CreditRequest,
    /// Waits for its turn to send control packets, and data.
    pub(super) in_control: bool,
    pub(super) in_data: bool,
    /// When the connection ends unless something happens.
    pub(super) deadline: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CreditRequest {
    No,
    Wanted,
    Sent,
}

impl Connection {
    /// A connection that a program of the host asks for. It must be answered by `deadline`.
    pub(super) fn requested(guest_cid: u64, ports: Ports, stream: UnixStream, deadline: Instant) -> Self {
        let phase = Phase::Requested { sent: false };
        Self { deadline: Some(deadline), ..Self::new(guest_cid, ports, stream, phase) }
    }

    /// A connection that the guest asks for, with the credit of its packet.
    pub(super) fn accepted(header: &Header, ports: Ports, stream: UnixStream) -> Self {
        let mut connection = Self::new(header.src_cid, ports, stream, Phase::Accepted);
        connection.take_credit(header);
        connection
    }

    fn new(guest_cid: u64, ports: Ports, stream: UnixStream, phase: Phase) -> Self {
        Self {
            ports,
            guest_cid,
            stream,
            phase,
            buffer: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            peer_alloc: 0,
            peer_forwarded: Wrapping(0),
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            passed_shut: 0,
            // The program may have sent something before its socket was listened to.
            readable: true,
            hung_up: false,
            asked: false,
            credit: CreditRequest::No,
            in_control: false,
            in_data: false,
            deadline: None,
        }
    }

    /// Whether the guest has heard of this connection, and has not ended it.
    pub(super) fn is_known_to_guest(&self) -> bool {
        !matches!(self.phase, Phase::Requested { sent: false } | Phase::Lingering)
    }

    /// Whether the guest is done with it.
    pub(super) fn is_closed_by_guest(&self) -> bool {
        self.guest_shut == shut::BOTH && self.phase != Phase::Lingering
    }

    /// Whether neither side needs it any more.
    pub(super) fn is_over(&self) -> bool {
        match self.phase {
            Phase::Requested { .. } => self.hung_up,
            Phase::Lingering => self.buffer.is_empty(),
            Phase::Accepted | Phase::Open => false,
        }
    }

    /// Keeps the connection without the guest, for what the program has not taken yet.
    pub(super) fn linger(&mut self) {
        self.phase = Phase::Lingering;
        self.deadline = None;
    }

    /// Whether only the program has something to do with it.
    pub(super) fn is_lingering(&self) -> bool {
        self.phase == Phase::Lingering
    }

    /// Bytes kept.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.buffer.len()
    }

    // What the guest sends.

    /// Takes the credit that is in every packet.
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
        if self.peer_credit() > 0 {
            self.credit = CreditRequest::No;
        }
    }

    /// Bytes that the guest has room for. A guest that says nonsense has room for none.
    fn peer_credit(&self) -> u32 {
        self.peer_alloc.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// The guest accepts the connection that the program has asked for.
    pub(super) fn respond(&mut self) -> Result<(), Violation> {
        if self.phase != (Phase::Requested { sent: true }) {
            return Err(Violation("a RESPONSE to no request"));
        }
        self.phase = Phase::Open;
        self.deadline = None;
        let answer = format!("OK {}\n", self.ports.host);
        // Nothing was written to this socket before, so there is room for all of it unless the program has gone.
        match rustix::net::send(&self.stream, answer.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) if sent == answer.len() => Ok(()),
            _ => Err(Violation("the program has gone before the guest's RESPONSE")),
        }
    }

    /// The guest sends `len` bytes. They go by way of `scratch`.
    pub(super) fn receive(&mut self, len: u32, payload: &mut impl Read, scratch: &mut [u8]) -> Result<(), Violation> {
        if !matches!(self.phase, Phase::Open | Phase::Accepted) {
            return Err(Violation("data before the connection is open"));
        }
        if self.guest_shut & shut::SEND != 0 {
            return Err(Violation("data after the end of data"));
        }
        // What counts is what the guest knows: it can't use room that it was not told of.
        let used = (self.received - self.told).0;
        if len > BUF_ALLOC.saturating_sub(used) {
            return Err(Violation("data beyond the credit"));
        }
        let Some(bytes) = scratch.get_mut(..len as usize) else { return Err(Violation("data beyond the credit")) };
        payload.read_exact(bytes).map_err(|_| Violation("a packet shorter than its header says"))?;
        self.received += len;
        let mut bytes = &*bytes;
        if self.buffer.is_empty() && self.host_shut & shut::RECEIVE == 0 {
            let taken = self.write(bytes);
            self.forwarded += taken as u32;
            bytes = &bytes[taken..];
        }
        if self.host_shut & shut::RECEIVE != 0 {
            // The program does not read any more. The guest gets to know it by SHUTDOWN.
            self.forwarded += bytes.len() as u32;
        } else {
            self.buffer.extend(bytes);
        }
        Ok(())
    }

    /// The guest says what it will not do any more.
    pub(super) fn shut_by_guest(&mut self, flags: u32) -> Result<(), Violation> {
        if !matches!(self.phase, Phase::Open | Phase::Accepted) {
            return Err(Violation("SHUTDOWN before the connection is open"));
        }
        self.guest_shut |= flags & shut::BOTH;
        if self.guest_shut & shut::RECEIVE != 0 {
            // The program gets EPIPE when it writes. What it has written already is for nobody.
            self.shut_socket(shut::RECEIVE, Shutdown::Read);
            self.readable = false;
        }
        self.pass_end_of_data();
        Ok(())
    }

    /// The guest asks for our credit.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    // What the program does.

    /// The program's socket has events.
    pub(super) fn on_events(&mut self, events: EventSet) {
        let ended = EventSet::HANG_UP | EventSet::ERROR;
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | ended) {
            self.readable = self.guest_shut & shut::RECEIVE == 0;
        }
        if events.intersects(ended) {
            self.hung_up = true;
            // Nobody reads the socket any more, or its end was seen already: there is no other word of the program's going.
            if self.guest_shut & shut::RECEIVE != 0 || self.host_shut & shut::SEND != 0 {
                self.host_shut = shut::BOTH;
            }
        }
        if events.intersects(EventSet::OUT | ended) {
            self.flush();
        }
    }

    /// Gives the program what is kept, as far as it takes it.
    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let buffer = std::mem::take(&mut self.buffer);
            let taken = self.write(buffer.as_slices().0);
            self.buffer = buffer;
            self.buffer.drain(..taken);
            self.forwarded += taken as u32;
            if self.host_shut & shut::RECEIVE != 0 {
                self.forwarded += self.buffer.len() as u32;
                self.buffer.clear();
            } else if taken == 0 {
                return;
            }
        }
        // Memory for connections that have something to keep only.
        self.buffer = VecDeque::new();
        self.pass_end_of_data();
    }

    /// Tells the program that the guest sends no more, after everything that the guest has sent.
    fn pass_end_of_data(&mut self) {
        if self.guest_shut & shut::SEND != 0 && self.buffer.is_empty() {
            self.shut_socket(shut::SEND, Shutdown::Write);
        }
    }

    fn shut_socket(&mut self, flag: u32, how: Shutdown) {
        // Once: it is an event of the socket, too, and would cause itself again and again.
        if self.passed_shut & flag == 0 {
            self.passed_shut |= flag;
            // A program that has gone has nothing to be told.
            let _ = rustix::net::shutdown(&self.stream, how);
        }
    }

    /// Writes what the socket takes now. A program that does not read any more is noted.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while taken < bytes.len() {
            match rustix::net::send(&self.stream, &bytes[taken..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => taken += sent,
                Err(error) if error == rustix::io::Errno::INTR => {}
                Err(error) if error == rustix::io::Errno::AGAIN => break,
                Err(_) => {
                    self.host_shut |= shut::RECEIVE;
                    break;
                }
            }
        }
        taken
    }

    // What the guest is sent.

    /// A packet to the guest. Each tells the credit.
    fn header(&mut self, op: u16, flags: u32, len: u32) -> Header {
        self.told = self.forwarded;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded.0,
        }
    }

    /// The packet that ends the connection.
    pub(super) fn reset(&mut self) -> Header {
        self.header(op::RST, 0, 0)
    }

    /// Whether [`Self::control`] has a packet. Asks for credit when there is something to send and no room for it.
    pub(super) fn wants_control(&mut self) -> bool {
        if self.phase == Phase::Open
            && self.is_readable()
            && self.peer_credit() == 0
            && self.credit == CreditRequest::No
        {
            self.credit = CreditRequest::Wanted;
        }
        match self.phase {
            Phase::Requested { sent } => !sent,
            Phase::Accepted => true,
            Phase::Lingering => false,
            Phase::Open => self.must_tell_shutdown() || self.must_tell_credit() || self.credit == CreditRequest::Wanted,
        }
    }

    fn must_tell_shutdown(&self) -> bool {
        self.host_shut & !self.told_shut != 0
    }

    fn must_tell_credit(&self) -> bool {
        let has_use = self.guest_shut & shut::SEND == 0;
        self.asked || has_use && (self.forwarded - self.told).0 >= UPDATE_AFTER
    }

    /// The next control packet. A SHUTDOWN that ends the connection is to be answered by `deadline`.
    pub(super) fn control(&mut self, deadline: Instant) -> Option<Header> {
        match self.phase {
            Phase::Requested { sent: true } | Phase::Lingering => None,
            Phase::Requested { sent: false } => {
                self.phase = Phase::Requested { sent: true };
                Some(self.header(op::REQUEST, 0, 0))
            }
            Phase::Accepted => {
                self.phase = Phase::Open;
                Some(self.header(op::RESPONSE, 0, 0))
            }
            Phase::Open if self.must_tell_shutdown() => {
                self.told_shut = self.host_shut;
                if self.told_shut == shut::BOTH {
                    self.deadline = Some(deadline);
                }
                Some(self.header(op::SHUTDOWN, self.told_shut, 0))
            }
            Phase::Open if self.must_tell_credit() => {
                self.asked = false;
                Some(self.header(op::CREDIT_UPDATE, 0, 0))
            }
            Phase::Open if self.credit == CreditRequest::Wanted => {
                self.credit = CreditRequest::Sent;
                Some(self.header(op::CREDIT_REQUEST, 0, 0))
            }
            Phase::Open => None,
        }
    }

    fn is_readable(&self) -> bool {
        self.readable && self.host_shut & shut::SEND == 0
    }

    /// Whether [`Self::data`] may have a packet.
    pub(super) fn wants_data(&self) -> bool {
        self.phase == Phase::Open && self.is_readable() && self.peer_credit() > 0
    }

    /// Reads what fits `room` and the guest's credit, and makes the header of its packet.
    pub(super) fn data(&mut self, room: &mut [u8]) -> Option<Header> {
        if !self.wants_data() {
            return None;
        }
        let most = room.len().min(self.peer_credit() as usize);
        match recv(&self.stream, &mut room[..most]) {
            Ok(0) => {
                self.host_shut |= if self.hung_up { shut::BOTH } else { shut::SEND };
                None
            }
            Ok(len) => {
                let len = len as u32;
                self.sent += len;
                Some(self.header(op::RW, 0, len))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            // The program has closed the socket without reading everything.
            Err(_) => {
                self.host_shut = shut::BOTH;
                None
            }
        }
    }
}

/// Reads what is there now.
fn recv(stream: &UnixStream, room: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::net::recv(stream, &mut *room, RecvFlags::DONTWAIT) {
            Err(error) if error == rustix::io::Errno::INTR => {}
            Err(error) => return Err(error.into()),
            Ok((len, _)) => return Ok(len),
        }
    }
}
