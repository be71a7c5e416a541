//! A backend that can be odd, and the driver of a hosted device.

use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, RwLock};

use ringvm_backends::device::QueueState;
use ringvm_backends::testing::driver::{Buffer, Driver};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VringRwLock};
use virtio_queue::QueueOwnedT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::super::*;

/// Bytes of the guest's memory.
pub(super) const MEMORY: u64 = 1 << 20;
pub(super) const LIMIT: Duration = Duration::from_secs(20);
pub(super) const DATA: u64 = 0x9_0000;

/// How a backend behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// Gives every buffer back.
    Works,
    Panics,
    Fails,
    /// Does not return from a call as long as the test does not let it.
    Blocks,
    /// Takes buffers and keeps them.
    Keeps,
}

pub(super) struct Odd {
    pub(super) manner: Manner,
    pub(super) memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Released when the test is over.
    pub(super) block: Arc<Mutex<()>>,
    pub(super) descriptor_events: Arc<AtomicUsize>,
    pub(super) features: u64,
    pub(super) masks: Vec<u64>,
    pub(super) resets: usize,
    /// Heads that it keeps, until it is called for a descriptor of its own.
    pub(super) kept: Vec<u16>,
    /// Whether what it gave back last went into the ring.
    pub(super) gave_back: Arc<Mutex<Option<bool>>>,
}

impl Odd {
    pub(super) fn new(manner: Manner) -> Self {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let features = 1 << VIRTIO_F_VERSION_1 | 1 << 30;
        let masks = vec![0b001, 0b110];
        Self {
            manner,
            memory,
            block: Arc::default(),
            descriptor_events: Arc::default(),
            features,
            masks,
            resets: 0,
            kept: Vec::new(),
            gave_back: Arc::default(),
        }
    }
}

impl VhostUserBackendMut for Odd {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        3
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn reset_device(&mut self) {
        self.resets += 1;
    }

    fn get_config(&self, _: u32, size: u32) -> Vec<u8> {
        // Far more than was asked for.
        vec![7; size as usize * 3 + 100]
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        self.masks.clone()
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], thread: usize) -> io::Result<()> {
        if usize::from(event) >= 3 {
            for head in self.kept.drain(..) {
                *self.gave_back.lock().unwrap() = Some(vrings[0].add_used(head, 0).is_ok());
            }
            self.descriptor_events.fetch_add(1, Ordering::SeqCst);
            return Ok(());
        }
        assert_eq!(vrings.len(), [1, 2][thread], "only the thread's own queues");
        match self.manner {
            Manner::Panics => panic!("a bug, as this test has it"),
            Manner::Fails => return Err(io::Error::other("broken, as this test has it")),
            Manner::Blocks => drop(self.block.lock()),
            Manner::Works | Manner::Keeps => {}
        }
        let vring = &vrings[usize::from(event)];
        let memory = self.memory.memory();
        loop {
            let chain = vring.get_mut().get_queue_mut().iter(memory.clone()).map_err(io::Error::other)?.next();
            let Some(chain) = chain else { return Ok(()) };
            if self.manner != Manner::Keeps {
                vring.add_used(chain.head_index(), u32::from(event)).map_err(io::Error::other)?;
                vring.signal_used_queue()?;
            } else {
                self.kept.push(chain.head_index());
            }
        }
    }
}

pub(super) type OddDevice = Hosted<Arc<RwLock<Odd>>>;

pub(super) struct Queue {
    pub(super) driver: Driver,
    pub(super) kick: EventFd,
    pub(super) call: Arc<EventFd>,
    pub(super) faults: Arc<AtomicUsize>,
}

pub(super) struct Rig<B: VhostUserBackend> {
    pub(super) device: Hosted<B>,
    pub(super) mem: GuestMemory,
    pub(super) queues: Vec<Queue>,
}

impl<B> Rig<B>
where
    B: VhostUserBackend + Clone + 'static,
    B::Vring: Clone + Send + Sync + 'static,
    B::Bitmap: NewBitmap + Clone + Send + Sync + 'static,
{
    pub(super) fn new(mut device: Hosted<B>) -> Self {
        let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
        let features = device.info().features;
        device.ack_features(features).unwrap();
        let queue = |(index, &size): (usize, &u16)| Queue {
            driver: Driver::new(Arc::clone(&mem), index as u64 * 0x1_0000, size, features),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            faults: Arc::default(),
        };
        let queues = device.info().queue_sizes.iter().enumerate().map(queue).collect();
        Self { device, mem, queues }
    }

    pub(super) fn start(&mut self, index: u16, from: QueueState) -> Result<(), DeviceError> {
        let call = Interrupt::Event(Arc::clone(&self.queues[usize::from(index)].call));
        self.start_with(index, from, call)
    }

    pub(super) fn start_with(&mut self, index: u16, from: QueueState, call: Interrupt) -> Result<(), DeviceError> {
        let queue = &self.queues[usize::from(index)];
        let faults = Arc::clone(&queue.faults);
        let parts = QueueParts {
            call,
            fault: Interrupt::Call(Arc::new(move || {
                faults.fetch_add(1, Ordering::SeqCst);
            })),
            from,
            ..QueueParts::new(queue.driver.ring(), Arc::clone(&self.mem), queue.kick.try_clone().unwrap())
        };
        self.device.start_queue(index, parts)
    }

    /// Offers one buffer, and rings.
    pub(super) fn offer(&mut self, index: usize) {
        let queue = &mut self.queues[index];
        queue.driver.add(&[Buffer { addr: DATA, len: 64, writable: true }]).unwrap();
        queue.driver.want_interrupts(true);
        if queue.driver.publish() {
            queue.kick.write(1).unwrap();
        }
    }

    pub(super) fn next_used(&mut self, index: usize) -> (u16, u32) {
        let mut used = None;
        wait("the buffer comes back", || {
            used = self.queues[index].driver.next_used();
            used.is_some()
        });
        used.unwrap()
    }

    /// The driver starts anew.
    pub(super) fn renew(&mut self, index: usize) {
        let queue = &mut self.queues[index];
        let ring = queue.driver.ring();
        queue.driver = Driver::new(Arc::clone(&self.mem), ring.desc, ring.size, self.device.info().features);
        queue.faults.store(0, Ordering::SeqCst);
    }

    /// Resets the device, and has it agree on features again.
    pub(super) fn reset(&mut self) {
        self.device.reset();
        self.device.ack_features(self.device.info().features).unwrap();
    }

    /// How many maps of the guest's memory there are besides the test's own.
    pub(super) fn holders(&self) -> usize {
        let (_, region) = self.mem.remove_region(GuestAddress(0), MEMORY).unwrap();
        // The test's own, and this one.
        Arc::strong_count(&region) - 2
    }

    pub(super) fn wait_for_fault(&self, index: usize) {
        wait("a fault is raised", || self.queues[index].faults.load(Ordering::SeqCst) > 0);
    }
}

pub(super) fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !until() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::yield_now();
    }
}

pub(super) fn odd(manner: Manner) -> (Arc<RwLock<Odd>>, Rig<Arc<RwLock<Odd>>>) {
    let backend = Arc::new(RwLock::new(Odd::new(manner)));
    let device: OddDevice = Hosted::new("odd0", 4, 4, Arc::clone(&backend)).unwrap();
    (backend, Rig::new(device))
}
