//! All connections of a device: which packet belongs to which, whose turn it is to send, and who comes and goes.
//!
//! What is kept is bounded: the number of clients and of connections, the bytes of each (see `connection.rs`), and the
//! answers that wait for receive buffers. When too many of these wait, the guest's packets do too.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ringvm_backends::host::bound::connect_now;
use tracing::{debug, warn};
use vmm_sys_util::epoll::EventSet;

use super::connection::{BUF_ALLOC, Connection, Ports, Violation};
use super::handshake::{Handshake, Said};
use super::options::{OpenError, path_of_port};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use super::poll::{AGAIN, FIRST_CLIENT, LISTENER, Poll, TIMER};
use super::socket::Listener;

/// Ports of the host that connections to the guest come from. Programs of the guest that look for a service use others.
const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// How much the device puts up with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Connections, handshakes among them.
    pub(super) connections: usize,
    /// Clients that have not said where to go.
    pub(super) handshakes: usize,
    /// RSTs that wait for a receive buffer before no more packets are taken from the guest.
    pub(super) replies: usize,
    /// Time for a handshake, for the guest's answer to a request, and for its RST when both sides are done.
    pub(super) patience: Duration,
    /// Time for programs to take the rest of what a guest has sent that is reset since.
    pub(super) linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let (patience, linger) = (Duration::from_secs(10), Duration::from_secs(60));
        Self { connections: 1023, handshakes: 64, replies: 256, patience, linger }
    }
}

/// The connections between a guest and programs of the host.
pub(super) struct Muxer {
    guest_cid: u64,
    socket: PathBuf,
    limits: Limits,
    /// Whether stream sockets were negotiated.
    pub(super) streams: bool,
    poll: Poll,
    events: Vec<(u64, EventSet)>,
    listener: Listener,
    /// The host had no descriptor for a client. The listener is left alone until the timer ends.
    listener_rests: bool,
    next_key: u64,
    next_port: u32,
    /// By key, hence the oldest first.
    handshakes: BTreeMap<u64, Handshake>,
    connections: HashMap<u64, Connection>,
    /// Connections that the guest can name.
    keys: HashMap<Ports, u64>,
    /// RSTs for what is no connection (any more).
    replies: VecDeque<Header>,
    /// Keys of connections with control packets, and with data. Each is in a queue once at most.
    control: VecDeque<u64>,
    data: VecDeque<u64>,
    /// The data of the packet at hand.
    scratch: Vec<u8>,
}

impl Muxer {
    pub(super) fn new(name: &str, cid: u32, socket: PathBuf, limits: Limits) -> Result<Self, OpenError> {
        let device = || name.to_owned();
        let failed = |source| OpenError::Host { device: device(), what: "making an epoll", source };
        let listener = Listener::bind(&socket).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => OpenError::InUse { device: device(), path: socket.clone() },
            _ => OpenError::Socket { device: device(), path: socket.clone(), source },
        })?;
        let muxer = Self {
            guest_cid: u64::from(cid),
            socket,
            limits,
            streams: true,
            poll: Poll::new().map_err(failed)?,
            events: Vec::new(),
            listener,
            listener_rests: false,
            next_key: FIRST_CLIENT,
            next_port: HOST_PORTS.start,
            handshakes: BTreeMap::new(),
            connections: HashMap::new(),
            keys: HashMap::new(),
            replies: VecDeque::new(),
            control: VecDeque::new(),
            data: VecDeque::new(),
            scratch: vec![0; BUF_ALLOC as usize],
        };
        muxer.listen().map_err(failed)?;
        Ok(muxer)
    }

    fn listen(&self) -> io::Result<()> {
        self.poll.add(self.listener.socket.as_raw_fd(), EventSet::IN, LISTENER)
    }

    /// The descriptors of the device.
    pub(super) fn poll(&self) -> &Poll {
        &self.poll
    }

    /// Forgets all clients and connections. Those that the guest had closed stay until their programs have everything that
    /// it sent: it did so before the reset.
    pub(super) fn reset(&mut self) {
        self.handshakes.clear();
        self.connections.retain(|_, connection| connection.is_lingering());
        self.keys.clear();
        self.replies.clear();
        self.control.clear();
        self.data.clear();
        // Programs that do not take the rest keep no room from the connections to come.
        let deadline = Instant::now() + self.limits.linger;
        for connection in self.connections.values_mut() {
            (connection.in_control, connection.in_data) = (false, false);
            connection.deadline.get_or_insert(deadline);
        }
        if !self.connections.is_empty() {
            self.watch_time();
        }
    }

    // Programs of the host.

    /// Serves the descriptors that have events.
    pub(super) fn on_events(&mut self) -> io::Result<()> {
        let mut events = std::mem::take(&mut self.events);
        self.poll.take(&mut events)?;
        for &(key, set) in &events {
            match key {
                LISTENER => self.accept(),
                TIMER => self.on_time(Instant::now()),
                AGAIN => {}
                key if self.handshakes.contains_key(&key) => self.on_handshake(key),
                key => {
                    // It may have been dropped since the event.
                    let Some(connection) = self.connections.get_mut(&key) else { continue };
                    connection.on_events(set);
                    self.settle(key);
                }
            }
        }
        self.events = events;
        Ok(())
    }

    fn count(&self) -> usize {
        self.handshakes.len() + self.connections.len()
    }

    fn accept(&mut self) {
        // As many as are dropped at most: others have their turn in between.
        for _ in 0..self.limits.handshakes {
            let stream = match self.listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => {
                    warn!("{}: accepting a client: {error}; trying again in a moment", self.socket.display());
                    self.poll.remove(self.listener.socket.as_raw_fd());
                    self.listener_rests = true;
                    self.watch_time();
                    return;
                }
            };
            if self.handshakes.len() >= self.limits.handshakes {
                debug!("the oldest of {} clients without a request makes room for another", self.handshakes.len());
                self.handshakes.pop_first();
            }
            if self.count() >= self.limits.connections {
                warn!("{}: a client is refused, there are {} connections", self.socket.display(), self.count());
                continue;
            }
            let key = self.next_key();
            if let Err(error) = self.poll.add_client(stream.as_raw_fd(), key) {
                warn!("{}: listening to a client: {error}", self.socket.display());
                continue;
            }
            self.handshakes.insert(key, Handshake::new(stream, Instant::now() + self.limits.patience));
            self.watch_time();
            self.on_handshake(key);
        }
    }

    fn next_key(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key - 1
    }

    fn on_handshake(&mut self, key: u64) {
        let Some(handshake) = self.handshakes.get_mut(&key) else { return };
        let said = handshake.read();
        if said == Said::Nothing {
            return;
        }
        let Some(handshake) = self.handshakes.remove(&key) else { return };
        let Said::Port(guest) = said else {
            debug!("a client has said nothing like CONNECT and a port");
            return;
        };
        let ports = self.free_ports(guest);
        let deadline = Instant::now() + self.limits.patience;
        let connection = Connection::requested(self.guest_cid, ports, handshake.into_stream(), deadline);
        self.insert(key, connection);
    }

    /// A port of the host that no connection with this port of the guest has.
    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            // Ends: there are fewer connections than ports.
            let ports = Ports { host: self.next_port, guest };
            self.next_port = if self.next_port + 1 < HOST_PORTS.end { self.next_port + 1 } else { HOST_PORTS.start };
            if !self.keys.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn insert(&mut self, key: u64, connection: Connection) {
        debug!(ports = ?connection.ports, "a connection");
        self.keys.insert(connection.ports, key);
        self.connections.insert(key, connection);
        self.settle(key);
    }

    fn watch_time(&mut self) {
        // A limit is met within a tenth of it.
        self.poll.come_after(self.limits.patience / 10);
    }

    fn on_time(&mut self, now: Instant) {
        if std::mem::take(&mut self.listener_rests)
            && let Err(error) = self.listen()
        {
            warn!("{}: listening: {error}; trying again in a moment", self.socket.display());
            self.listener_rests = true;
        }
        self.handshakes.retain(|_, handshake| handshake.deadline > now);
        let late =
            self.connections.iter().filter(|(_, connection)| connection.deadline.is_some_and(|time| time <= now));
        let late: Vec<u64> = late.map(|(&key, _)| key).collect();
        for key in late {
            debug!("a connection has not been answered in time");
            self.end(key);
        }
        let waiting = self.connections.values().any(|connection| connection.deadline.is_some());
        if waiting || self.listener_rests || !self.handshakes.is_empty() {
            self.watch_time();
        }
    }

    // Packets of the guest.

    /// Whether too many answers wait to take another packet of the guest.
    pub(super) fn must_wait(&self) -> bool {
        self.replies.len() >= self.limits.replies
    }

    /// Takes a packet of the guest.
    pub(super) fn take(&mut self, header: &Header, payload: &mut impl Read) {
        // As vhost does: it is not the guest's own, or for somebody else. There is no one to answer in whose name.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            debug!(?header, "a packet between strangers is dropped");
            return;
        }
        if header.kind != TYPE_STREAM || !self.streams {
            return self.refuse(header, "its type is unknown");
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let Some(&key) = self.keys.get(&ports) else {
            return match header.op {
                op::REQUEST => self.request(header, ports),
                _ => self.refuse(header, "there is no such connection"),
            };
        };
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.take_credit(header);
        let done = match header.op {
            op::RW => connection.receive(header.len, payload, &mut self.scratch),
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                connection.ask();
                Ok(())
            }
            op::RESPONSE => connection.respond(),
            op::SHUTDOWN => connection.shut_by_guest(header.flags),
            op::RST => {
                self.forget(key);
                return;
            }
            op::REQUEST => Err(Violation("a REQUEST for an open connection")),
            _ => Err(Violation("an unknown operation")),
        };
        match done {
            Ok(()) => self.settle(key),
            Err(violation) => {
                debug!(?header, "the guest sends {}", violation.0);
                self.end(key);
            }
        }
    }

    fn refuse(&mut self, header: &Header, why: &str) {
        if header.op != op::RST {
            debug!(?header, "a packet is answered with RST: {why}");
            self.replies.push_back(header.reset());
        }
    }

    /// The guest connects to a program of the host.
    fn request(&mut self, header: &Header, ports: Ports) {
        if self.count() >= self.limits.connections {
            warn!("{}: a connection of the guest is refused, there are {}", self.socket.display(), self.count());
            return self.refuse(header, "there are too many");
        }
        let path = path_of_port(&self.socket, ports.host);
        let key = self.next_key();
        let connected = connect_now(&path).and_then(|stream| {
            self.poll.add_client(stream.as_raw_fd(), key)?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => self.insert(key, Connection::accepted(header, ports, stream)),
            Err(error) => {
                debug!("the guest connects to {}: {error}", path.display());
                self.refuse(header, "no program takes it");
            }
        }
    }

    // The state of connections.

    /// Puts a connection in the queues that it has something for, or ends it.
    fn settle(&mut self, key: u64) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.is_closed_by_guest() {
            self.replies.push_back(connection.reset());
            self.keys.remove(&connection.ports);
            connection.linger();
        }
        if connection.is_over() {
            return self.end(key);
        }
        if connection.wants_control() && !connection.in_control {
            connection.in_control = true;
            self.control.push_back(key);
        }
        if connection.wants_data() && !connection.in_data {
            connection.in_data = true;
            self.data.push_back(key);
        }
        if connection.deadline.is_some() {
            self.watch_time();
        }
    }

    /// Ends a connection. The guest gets RST if it has it.
    fn end(&mut self, key: u64) {
        if let Some(connection) = self.connections.get_mut(&key)
            && connection.is_known_to_guest()
        {
            self.replies.push_back(connection.reset());
        }
        self.forget(key);
    }

    /// Ends a connection that the guest does not know (any more).
    fn forget(&mut self, key: u64) {
        let Some(connection) = self.connections.remove(&key) else { return };
        debug!(ports = ?connection.ports, "a connection has ended");
        // The guest may have a new one with the same ports by now.
        if self.keys.get(&connection.ports) == Some(&key) {
            self.keys.remove(&connection.ports);
        }
        for (is_in, queue) in [(connection.in_control, &mut self.control), (connection.in_data, &mut self.data)] {
            if is_in {
                queue.retain(|&other| other != key);
            }
        }
    }

    // Packets to the guest.

    /// Whether [`Self::next`] may have a packet.
    pub(super) fn has_packets(&self) -> bool {
        self.has_control() || !self.data.is_empty()
    }

    /// Whether a packet without data waits.
    pub(super) fn has_control(&self) -> bool {
        !self.replies.is_empty() || !self.control.is_empty()
    }

    /// The next packet with at most `room` bytes of data, which are in [`Self::payload`]. Packets without data come first,
    /// then each connection in its turn.
    pub(super) fn next(&mut self, room: usize) -> Option<Header> {
        let room = room.min(self.scratch.len());
        loop {
            if let Some(header) = self.next_control() {
                return Some(header);
            }
            if room == 0 {
                return None;
            }
            let key = self.data.pop_front()?;
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.in_data = false;
            let header = connection.data(&mut self.scratch[..room]);
            // The end of the data makes a control packet.
            self.settle(key);
            if header.is_some() {
                return header;
            }
        }
    }

    fn next_control(&mut self) -> Option<Header> {
        if let Some(header) = self.replies.pop_front() {
            return Some(header);
        }
        let deadline = Instant::now() + self.limits.patience;
        while let Some(key) = self.control.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.in_control = false;
            let header = connection.control(deadline);
            self.settle(key);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// The data of the packet that [`Self::next`] gave.
    pub(super) fn payload(&self, header: &Header) -> &[u8] {
        &self.scratch[..header.len as usize]
    }

    /// Connections, clients without one, and bytes kept for programs.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize, usize) {
        let kept = self.connections.values().map(Connection::kept).sum();
        (self.connections.len(), self.handshakes.len(), kept)
    }

    /// Packets that wait for receive buffers.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.replies.len() + self.control.len() + self.data.len()
    }
}
