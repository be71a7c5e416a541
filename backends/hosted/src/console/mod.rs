//! The console device (virtio 1.3, section 5.3), with one port: a terminal of the guest's at an end on the host.
//!
//! It is a backend of the `vhost-user-backend` crate. One thread calls it, for kicks of the two queues and for the one
//! descriptor of its own, the epoll instance of the host's end. Each call does what can be done now, whatever it was
//! called for, and sets what to wait for.
//!
//! No reader makes it wait. Output goes through a bounded buffer (`backlog`): while a reader is connected, the guest's
//! chains stay in the queue until there is room; without one, the newest output is kept for the next. A reader that is
//! connected and reads nothing for a tenth of a second (`stall`) does not stop the guest: what comes then is dropped and
//! counted until half of the buffer is free. Input is read while the guest has buffers for it.

mod backlog;
mod chain;
mod device;
mod end;
mod host;
mod options;
mod pty;
mod queues;
mod socket;
mod stall;
mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tracing::warn;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::hosted::ConfigChange;
use crate::listeners::Listeners;
use crate::serving::{Broken, Turn};
use host::{Host, Input};
use queues::Transmit;

pub use end::{End, OpenError};
pub use options::{ConsoleOptions, Kind};

/// Port 0's receiveq and transmitq.
const RECEIVEQ: usize = 0;
const TRANSMITQ: usize = 1;
const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 256;
/// The event of the host's end. The number of queues itself is the server's.
const HOST_EVENT: u16 = QUEUES as u16 + 1;

/// VIRTIO_CONSOLE_F_SIZE: the size of the terminal is in configuration space. Offered only with a terminal: the driver would
/// take a size of zero for one.
const F_SIZE: u32 = 0;
/// Length of `struct virtio_console_config`: columns and rows, 16 bits each, and two fields of features not offered.
const CONFIG_LEN: usize = 12;

/// Bursts of a direction in one call.
const BURSTS: usize = 16;

/// A console.
pub struct ConsoleBackend {
    name: String,
    slave: Option<PathBuf>,
    /// Whether its end is a terminal, which has a size.
    is_terminal: bool,
    /// Columns in the low half, rows in the high one.
    size: AtomicU32,
    /// Tells the driver of a change of the size, once there is a device.
    changed: OnceLock<ConfigChange>,
    mem: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
    /// How often each queue was stopped: what is noted about it is of another life then.
    stops: [AtomicU32; QUEUES],
    work: Mutex<Work>,
}

/// State of the thread that is called for events.
struct Work {
    host: Host,
    transmit: Transmit,
    lives: [Life; QUEUES],
}

/// A queue between its start and its stop.
#[derive(Clone, Copy, Debug, Default)]
struct Life {
    stops: u32,
    /// The driver broke the ring: it is not looked at any more.
    is_broken: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ConsoleBackend {
    /// A console with this end on the host. `name` stands in front of messages.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(name: &str, end: End) -> io::Result<Self> {
        let slave = end.slave().map(Path::to_owned);
        let is_terminal = end.is_terminal();
        let host = Host::new(name, end)?;
        let console = Self {
            name: name.to_owned(),
            slave,
            is_terminal,
            size: AtomicU32::new(0),
            changed: OnceLock::new(),
            mem: Mutex::default(),
            stops: Default::default(),
            work: Mutex::new(Work { host, transmit: Transmit::default(), lives: Default::default() }),
        };
        console.update_size();
        Ok(console)
    }

    /// Path of the pseudoterminal that programs open, if its end is one.
    #[must_use]
    pub fn slave(&self) -> Option<&Path> {
        self.slave.as_deref()
    }

    /// Tells the console who calls it for events of its end.
    ///
    /// # Errors
    /// As [`Listeners::register_listener`].
    pub fn listen(&self, listeners: Arc<dyn Listeners>) -> io::Result<()> {
        let descriptor = lock(&self.work).host.descriptor();
        listeners.register_listener(descriptor, EventSet::IN, HOST_EVENT.into())
    }

    /// Sets the size of the terminal, and tells the driver if that is news.
    fn resize(&self, columns: u16, rows: u16) {
        let size = u32::from(columns) | u32::from(rows) << 16;
        if self.size.swap(size, Ordering::AcqRel) != size
            && let Some(changed) = self.changed.get()
        {
            changed.tell();
        }
    }

    /// Reads the size from the terminal that output goes to, if it is one, and tells the driver if that is news: after
    /// SIGWINCH. Callable from any thread.
    pub fn update_size(&self) {
        let size = lock(&self.work).host.terminal_size();
        if let Some((columns, rows)) = size {
            self.resize(columns, rows);
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        config[..4].copy_from_slice(&self.size.load(Ordering::Acquire).to_le_bytes());
        config
    }
}

impl Work {
    /// Forgets what was noted about queues that were stopped since.
    fn begin_lives(&mut self, stops: &[AtomicU32; QUEUES]) {
        for (index, stops) in stops.iter().enumerate() {
            let stops = stops.load(Ordering::Acquire);
            if self.lives[index].stops != stops {
                self.lives[index] = Life { stops, is_broken: false };
                if index == TRANSMITQ {
                    self.transmit.reset();
                }
            }
        }
    }

    /// Does what can be done now.
    fn turn(&mut self, vrings: &[VringRwLock; QUEUES], mem: Option<&GuestMemoryMmap>) -> [Result<(), Broken>; QUEUES] {
        self.host.look();
        let Some(mem) = mem else {
            // Without a frontend, clients come and go.
            self.host.write();
            self.host.listen(false);
            return [Ok(()), Ok(())];
        };
        let transmitted = self.transmit(&vrings[TRANSMITQ], mem);
        let (wants_input, received) = match self.receive(&vrings[RECEIVEQ], mem) {
            Ok(wants_input) => (wants_input, Ok(())),
            Err(broken) => (false, Err(broken)),
        };
        self.host.listen(wants_input);
        [received, transmitted]
    }

    fn transmit(&mut self, vring: &VringRwLock, mem: &GuestMemoryMmap) -> Result<(), Broken> {
        for _ in 0..BURSTS {
            let turn = if self.lives[TRANSMITQ].is_broken {
                Turn::Stopped
            } else {
                self.transmit.serve(vring, mem, &mut self.host)?
            };
            let progress = self.host.write();
            match turn {
                Turn::More => {}
                Turn::Waiting if progress || self.host.gives_up() => {}
                Turn::Waiting => return Ok(()),
                Turn::Empty | Turn::Stopped => {
                    self.host.goes_on();
                    return Ok(());
                }
            }
        }
        self.host.call_again();
        Ok(())
    }

    /// Returns whether the guest has buffers for more input than there is.
    fn receive(&mut self, vring: &VringRwLock, mem: &GuestMemoryMmap) -> Result<bool, Broken> {
        if self.lives[RECEIVEQ].is_broken {
            return Ok(false);
        }
        for _ in 0..BURSTS {
            match queues::receive(vring, mem, &mut self.host.pending)? {
                Turn::Waiting if self.host.read() == Input::Some => {}
                Turn::Waiting => return Ok(true),
                Turn::More => {}
                Turn::Empty | Turn::Stopped => return Ok(false),
            }
        }
        self.host.call_again();
        Ok(true)
    }
}

impl VhostUserBackend for ConsoleBackend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | u64::from(self.is_terminal) << F_SIZE
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    /// The queues themselves are told.
    fn set_event_idx(&self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.config();
        let from = (offset as usize).min(CONFIG_LEN);
        config[from..from.saturating_add(size as usize).min(CONFIG_LEN)].to_vec()
    }

    /// The one field that a driver may write, `emerg_wr`, is of a feature that is not offered.
    fn set_config(&self, _: u32, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn update_memory(&self, mem: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        *lock(&self.mem) = Some(mem);
        Ok(())
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        // Without the lock of the thread that serves the queues, which may be about to wait for the queue's.
        if let Some(stops) = self.stops.get(index as usize) {
            stops.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    fn reset_device(&self) {
        for stops in &self.stops {
            stops.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// An error says that the driver broke a queue, which needs a reset then; it is said once.
    fn handle_event(&self, _: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        let Ok(vrings) = <&[VringRwLock; QUEUES]>::try_from(vrings) else {
            return Err(io::Error::other(format!("a console has {QUEUES} queues, not {}", vrings.len())));
        };
        let mem = lock(&self.mem).as_ref().map(GuestAddressSpace::memory);
        let mut work = lock(&self.work);
        work.begin_lives(&self.stops);
        let results = work.turn(vrings, mem.as_deref());
        let mut result = Ok(());
        for (index, broken) in results.into_iter().enumerate() {
            let Err(broken) = broken else { continue };
            work.lives[index].is_broken = true;
            warn!("{}: queue {index}: {broken}; it is not served any more, the device needs a reset", self.name);
            result = Err(io::Error::other(format!("queue {index}: {broken}")));
        }
        drop(work);
        // There is no other word of a change of a pseudoterminal's size.
        if self.slave.is_some() {
            self.update_size();
        }
        result
    }
}
