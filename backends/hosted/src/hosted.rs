//! A backend of the `vhost-user-backend` crate as a [`Device`].
//!
//! The device does with the backend what the crate's own server does: it makes the vrings, runs a thread for each set of
//! queues that the backend wants one for, calls the backend for kicks, and maps memory, features, configuration space
//! and positions. The data path is the same as in a daemon: the backend's own, with `virtio-queue`.
//!
//! The backend is not trusted to behave. All calls are made on its own threads, and nobody waits for them without a
//! limit. A call beyond it is not made any more, or is undone when it ends; until then other calls fail at once. A
//! queue stops without the buffers that its backend does not give back in time. A backend that panics, fails or does
//! not answer costs a line in the log; its driver is told that the device needs a reset. The reset helps, unless the
//! backend has panicked or never comes back.
//!
//! The crate has no way to note requests in flight for a successor, to give back requests half done, or to log
//! written pages. [`Device::recovers`] says so, and whoever asks for these things is refused.

mod contact;
mod event_loop;
mod memory;
mod thread;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use ringvm_backends::device::{Device, DeviceError, DeviceInfo, GuestMemory, QueueParts};
use ringvm_backends::io::reactor::OnPanic;
use ringvm_backends::state::check_empty;
use ringvm_backends::stats::{DeviceStats, QueueStats};
use ringvm_backends::virtqueue::End;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_backends::virtqueue::stopping::Stopping;
use thiserror::Error;
use tracing::warn;
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::mmap::NewBitmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::contact::{Contact, Panics};
use self::event_loop::{EventLoop, Ring};
use self::memory::{Lease, Shown};
pub(crate) use self::thread::PATIENCE;
use self::thread::{Ending, NoAnswer, Thread};
use crate::listeners::Listeners;

/// What threads of backends are called, before the name of their device.
pub const THREAD_PREFIX: &str = "host-";

/// Longest time that the backend may keep buffers of a queue that stops. The queue stops without them then.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Features that the backend may offer and that are not passed on: those of vhost-user itself, and rings and
/// addresses of kinds that no transport of ours has.
const NOT_OFFERED: u64 = 1 << 26 | 1 << 30 | 1 << VIRTIO_F_ACCESS_PLATFORM | 1 << VIRTIO_F_RING_PACKED;

/// Why a backend can't be a device.
#[derive(Debug, Error)]
pub enum HostedError {
    /// It describes itself in a way that no device can be.
    #[error("the backend of {device}: {what}")]
    Backend {
        /// Name of the device.
        device: String,
        /// What is wrong with it.
        what: String,
    },
    /// The host refuses something that it needs.
    #[error("{device}: {what}: {source}")]
    Host {
        /// Name of the device.
        device: String,
        /// The operation that failed.
        what: &'static str,
        /// The error that it returned.
        source: io::Error,
    },
}

/// Tells the driver that the configuration space has changed. For backends whose space changes by itself.
#[derive(Clone, Debug, Default)]
pub struct ConfigChange(Arc<std::sync::Mutex<Interrupt>>);

impl ConfigChange {
    /// Tells it, if somebody listens.
    pub fn tell(&self) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).raise();
    }

    fn set(&self, notify: Interrupt) {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = notify;
    }
}

/// A backend as a device.
pub struct Hosted<B: VhostUserBackend> {
    info: DeviceInfo,
    threads: Vec<Thread<B>>,
    /// Of each queue: its thread, and its place among the queues there. A backend may leave a queue to no thread.
    seats: Vec<Option<(usize, usize)>>,
    shown: Arc<Shown<B::Bitmap>>,
    changed: ConfigChange,
    panics: Arc<Panics>,
    kicks: Arc<[AtomicU64]>,
}

impl<B> Hosted<B>
where
    B: VhostUserBackend + Clone + 'static,
    B::Vring: Clone + Send + Sync + 'static,
    B::Bitmap: NewBitmap + Clone + Send + Sync + 'static,
{
    /// Makes a device of this virtio ID over a backend. The backend's configuration space has `config_len` bytes, which
    /// the crate has no question for.
    ///
    /// # Errors
    /// When the backend's answers make no device, or the host refuses a thread or a descriptor.
    pub fn new(name: &str, device_type: u32, config_len: u32, backend: B) -> Result<Self, HostedError> {
        let wrong = |what: String| HostedError::Backend { device: name.to_owned(), what };
        let host = |what| move |source| HostedError::Host { device: name.to_owned(), what, source };
        let (queues, most) = (backend.num_queues(), backend.max_queue_size());
        if !(1..=256).contains(&queues) || !(1..=1 << 15).contains(&most) {
            return Err(wrong(format!("it says that it has {queues} queues of {most} descriptors")));
        }
        let features = backend.features() & !NOT_OFFERED;
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(wrong("it does not offer VIRTIO_F_VERSION_1, and legacy drivers are not served".to_owned()));
        }
        let queue_size = 1 << most.ilog2();
        let shown = Arc::new(Shown::new());
        let vring = |_| B::Vring::new(shown.atomic(), queue_size);
        let vrings = (0..queues).map(vring).collect::<Result<Vec<_>, _>>();
        let vrings = vrings.map_err(|error| wrong(format!("making its vrings: {error}")))?;
        let kicks: Arc<[AtomicU64]> = (0..queues).map(|_| AtomicU64::new(0)).collect();
        let of_mask = |mask: u64| (0..queues.min(64)).filter(|queue| mask >> queue & 1 != 0).collect();
        let per_thread: Vec<Vec<usize>> = backend.queues_per_thread().into_iter().map(of_mask).collect();
        if per_thread.is_empty() {
            return Err(wrong("it wants no thread".to_owned()));
        }
        let seat = |queue: usize| {
            let place_on = |numbers: &Vec<usize>| numbers.iter().position(|&number| number == queue);
            per_thread.iter().enumerate().find_map(|(thread, numbers)| Some((thread, place_on(numbers)?)))
        };
        let seats = (0..queues).map(seat).collect();
        let panics = Arc::<Panics>::default();
        let mut threads = Vec::new();
        for (thread, on_thread) in per_thread.into_iter().enumerate() {
            let rings = on_thread.iter().map(|&queue| vrings[queue].clone()).collect();
            let (calls, inbox) = unbounded();
            let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("making an event"))?;
            let contact = Arc::new(Contact::new(wake, on_thread.len()));
            let event_loop = EventLoop::new(
                (name.to_owned(), thread),
                (backend.clone(), queues, rings),
                (inbox, Arc::clone(&contact)),
                (on_thread, Arc::clone(&kicks)),
            );
            let event_loop = event_loop.map_err(host("listening to events"))?;
            let listeners = event_loop.listeners();
            let theirs = Arc::clone(&panics);
            let handle = std::thread::Builder::new().name(format!("{THREAD_PREFIX}{name}"));
            let handle = handle.spawn(move || event_loop.run(&theirs)).map_err(host("starting a thread"))?;
            threads.push(Thread { calls: Some(calls), contact, listeners, handle: Some(handle) });
        }
        Ok(Self {
            seats,
            info: DeviceInfo {
                device_type,
                name: name.to_owned(),
                features,
                queue_sizes: vec![queue_size; queues],
                config_len,
            },
            threads,
            shown,
            changed: ConfigChange::default(),
            panics,
            kicks,
        })
    }

    /// The backend's threads, to which it may give descriptors of its own: as `VhostUserDaemon::get_epoll_handlers`.
    #[must_use]
    pub fn listeners(&self) -> Vec<Arc<dyn Listeners>> {
        self.threads.iter().map(|thread| Arc::clone(&thread.listeners)).collect()
    }

    /// The way to tell the driver of a change to the configuration space that the backend makes by itself.
    #[must_use]
    pub fn config_change(&self) -> ConfigChange {
        self.changed.clone()
    }

    /// Has `on_panic` called when a thread of the backend has panicked, also if it has already: its queues are not served
    /// again before the process starts anew.
    pub fn on_panic(&mut self, on_panic: OnPanic) {
        self.panics.set(&self.info.name, on_panic);
    }

    /// Makes a call on a thread of the backend, and waits for its end.
    fn call<T: Send + 'static>(
        &self,
        thread: usize,
        what: &'static str,
        call: impl FnOnce(&mut EventLoop<B>) -> T + Send + 'static,
    ) -> Result<T, DeviceError> {
        self.call_or_undo(thread, what, call, |_, _| {})
    }

    /// Makes a call that must not last if nobody has waited for its end.
    fn call_or_undo<T: Send + 'static>(
        &self,
        thread: usize,
        what: &'static str,
        call: impl FnOnce(&mut EventLoop<B>) -> T + Send + 'static,
        undo: impl FnOnce(&mut EventLoop<B>, T) + Send + 'static,
    ) -> Result<T, DeviceError> {
        self.threads[thread].call(call, undo).map_err(|no_answer| {
            let late = |text| io::Error::new(io::ErrorKind::TimedOut, text);
            let source = match no_answer {
                NoAnswer::Late => late(format!("its backend has not answered within {} s", PATIENCE.as_secs())),
                NoAnswer::Hung => late("its backend has yet to answer an earlier call".to_owned()),
                NoAnswer::Dead => io::Error::other("its backend has panicked"),
            };
            self.threads.iter().for_each(|thread| thread.contact.faults.raise());
            DeviceError::Host { device: self.info.name.clone(), what, source }
        })
    }

    /// Shows the backend the guest's memory, for a queue that is to start.
    fn show(&self, mem: &GuestMemory) -> Result<Lease<B::Bitmap>, DeviceError> {
        let what = "showing the guest's memory to its backend";
        let failed = |source| DeviceError::Host { device: self.info.name.clone(), what, source };
        let lease = self.shown.enter(mem).map_err(failed)?;
        if lease.is_news() {
            let atomic = self.shown.atomic();
            self.call(0, what, move |event_loop| event_loop.backend().update_memory(atomic))?.map_err(failed)?;
            lease.told();
        }
        Ok(lease)
    }

    fn refuse(&self, index: u16, reason: &'static str) -> DeviceError {
        DeviceError::Queue { device: self.info.name.clone(), index, reason }
    }
}

impl<B> Device for Hosted<B>
where
    B: VhostUserBackend + Clone + 'static,
    B::Vring: Clone + Send + Sync + 'static,
    B::Bitmap: NewBitmap + Clone + Send + Sync + 'static,
{
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn recovers(&self) -> bool {
        false
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.info.check_features(features)?;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for thread in 0..self.threads.len() {
            self.call(thread, "accepting features", move |event_loop| {
                event_loop.set_event_idx(event_idx);
                if thread == 0 {
                    event_loop.backend().set_event_idx(event_idx);
                    event_loop.backend().acked_features(features);
                }
            })?;
        }
        Ok(())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        let len = data.len() as u32;
        let read = self
            .call(0, "reading the configuration space", move |event_loop| event_loop.backend().get_config(offset, len));
        match read {
            Ok(bytes) => {
                // Backends answer with fewer bytes than were asked for, or with none, where they have no more.
                let count = bytes.len().min(data.len());
                data[..count].copy_from_slice(&bytes[..count]);
            }
            Err(error) => warn!(%error, "the driver reads zeroes"),
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let bytes = data.to_vec();
        let written = self.call(0, "writing the configuration space", move |event_loop| {
            event_loop.backend().set_config(offset, &bytes)
        })?;
        written.map_err(|_| DeviceError::Config { device: self.info.name.clone(), offset, len: data.len() })
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        let seat = *self.seats.get(usize::from(index)).ok_or_else(|| self.refuse(index, "does not exist"))?;
        let (thread, place) = seat.ok_or_else(|| self.refuse(index, "is served by no thread of its backend"))?;
        if parts.inflight.is_some() || !parts.left.is_empty() {
            return Err(self.refuse(index, "can't take requests over: its backend knows no table of those in flight"));
        }
        if parts.log.is_some() {
            return Err(self.refuse(index, "can't log the pages that it writes: its backend knows no log"));
        }
        let lease = self.show(&parts.mem)?;
        let QueueParts { ring, mem, from, kick, call, fault, .. } = parts;
        let ring = Ring { ring, mem, lease, from, kick, call, fault };
        let start = move |event_loop: &mut EventLoop<B>| event_loop.start(place, ring);
        let started = self.call_or_undo(thread, "starting a queue", start, move |event_loop, started| {
            if started.is_ok() {
                event_loop.stop(place, Instant::now() + STOP_PATIENCE, None);
            }
        });
        started.and_then(|done| done.map_err(|error| error.into_device_error(&self.info.name, index)))
    }

    fn stop(&mut self, queues: &[u16], _: End) -> Stopping {
        // The backend's threads keep to it. One that does not come back from a call of the backend can't.
        let deadline = Instant::now() + STOP_PATIENCE;
        let stop = |&index: &u16| {
            let (thread, place) = (*self.seats.get(usize::from(index))?)?;
            Some(self.threads[thread].stop(place, deadline))
        };
        // All threads are told before the first is waited for.
        let endings: Vec<Option<Ending>> = queues.iter().map(stop).collect();
        let (name, indices) = (self.info.name.clone(), queues.to_vec());
        Stopping::by(queues.len(), move || {
            let end = |(queue, ending): (u16, Option<Ending>)| {
                ending?.wait(deadline + PATIENCE).unwrap_or_else(|_| {
                    let seconds = (STOP_PATIENCE + PATIENCE).as_secs();
                    warn!(device = name, queue, seconds, "the backend does not answer, its queue is given up");
                    None
                })
            };
            indices.into_iter().zip(endings).map(end).collect()
        })
    }

    fn reset(&mut self) {
        let indices: Vec<u16> = (0..self.seats.len() as u16).collect();
        drop(self.stop(&indices, End::Drained).wait());
        let reset = self.call(0, "a reset", |event_loop| event_loop.backend().reset_device());
        if let Err(error) = reset {
            warn!(%error, "the device is not reset before its backend is back");
            self.threads[0].contact.want_reset();
        }
    }

    fn on_config_change(&mut self, notify: Interrupt) {
        self.changed.set(notify);
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        let reason = "its backend hands no state over".to_owned();
        Err(DeviceError::Save { device: self.info.name.clone(), reason })
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        check_empty(&self.info.name, state)
    }

    fn stats(&self) -> DeviceStats {
        let queue = |(index, kicks): (u16, &AtomicU64)| {
            let mut stats = QueueStats::new(&[]);
            stats.kicks = kicks.load(Ordering::Relaxed);
            (stats.kicks > 0).then_some((index, stats))
        };
        DeviceStats { name: self.info.name.clone(), queues: (0..).zip(self.kicks.iter()).filter_map(queue).collect() }
    }
}

impl<B: VhostUserBackend> Drop for Hosted<B> {
    /// Ends the threads. One in a call of the backend that never returns is left behind, and said so.
    fn drop(&mut self) {
        self.threads.iter_mut().for_each(Thread::end);
        let deadline = Instant::now() + PATIENCE;
        for thread in &mut self.threads {
            let Some(handle) = thread.handle.take() else { continue };
            while !handle.is_finished() && !thread.contact.is_hung() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if handle.is_finished() {
                // A panic was told of when it happened.
                drop(handle.join());
            } else {
                warn!(device = self.info.name, "the backend does not end; its thread is left behind");
            }
        }
    }
}

#[cfg(test)]
#[path = "hosted_tests.rs"]
mod tests;
