//! The transport as a driver sees it, with a device that only records its calls.

use std::collections::BTreeMap;

use std::time::Duration;

use bolero::TypeGenerator;
use crossbeam_channel::{Sender, bounded};
use ringvm_backends::device::{DeviceError, End, Ends, QueueParts, QueueState, RingConfig, Stopping, Suspended};
use ringvm_backends::host::event::{borrow, is_raised};
use ringvm_backends::stats::DeviceStats;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::pci::reg;
use crate::platform::fake::FakePlatform;

const BAR: u64 = 0x1_0000_0000;
const OFFERED: u64 = 1 << 32 | 1 << 29 | 1 << 5;
const VERSION_1: u64 = 1 << 32;
const QUEUES: u16 = 3;
const MAX_SIZE: u16 = 256;

const STATUS: u64 = 0x14;
const ALL: u8 = 1 | 2 | 8 | 4;

/// A busy machine takes longer than a vCPU would wait.
const PATIENCE: Duration = Duration::from_secs(60);

/// The calls that the device received.
#[derive(Default)]
struct Told {
    acked: Option<u64>,
    running: BTreeMap<u16, QueueParts>,
    rings: Vec<(u16, RingConfig, QueueState)>,
    resets: usize,
    /// The next start of this queue fails.
    refuse: Option<u16>,
    /// Queues that are told to stop do so when the test lets them.
    drains_for_ever: bool,
    draining: Option<Sender<Ends>>,
    config: [u8; 8],
    changed: Option<Interrupt>,
}

struct TestDevice {
    info: DeviceInfo,
    told: Arc<Mutex<Told>>,
}

impl Device for TestDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        let mut told = self.told.lock().unwrap();
        assert!(told.running.is_empty(), "features never change under a running queue");
        assert_eq!(features & !OFFERED, 0, "nothing is accepted that was not offered");
        if features & 1 << 5 != 0 && features & 1 << 29 == 0 {
            let device = self.info.name.clone();
            return Err(DeviceError::Features { device, features, reason: "5 needs 29" });
        }
        told.acked = Some(features);
        Ok(())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let config = self.told.lock().unwrap().config;
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let mut told = self.told.lock().unwrap();
        match told.config.get_mut(offset as usize..offset as usize + data.len()) {
            Some(bytes) => {
                bytes.copy_from_slice(data);
                Ok(())
            }
            None => Err(DeviceError::Config { device: self.info.name.clone(), offset, len: data.len() }),
        }
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        let mut told = self.told.lock().unwrap();
        assert!(told.acked.is_some(), "no queue starts before the features are accepted");
        if told.refuse == Some(index) {
            return Err(DeviceError::Queue { device: self.info.name.clone(), index, reason: "is refused" });
        }
        told.rings.push((index, parts.ring, parts.from));
        assert!(told.running.insert(index, parts).is_none(), "a queue is started once");
        Ok(())
    }

    fn stop(&mut self, queues: &[u16], _end: End) -> Stopping {
        let mut told = self.told.lock().unwrap();
        if told.drains_for_ever {
            let (end, stopping) = Stopping::pending(queues.len());
            told.draining = Some(end);
            return stopping;
        }
        let stopped = queues.iter().map(|index| {
            told.running.remove(index)?;
            let state = QueueState { next_avail: 7 + index, next_used: 7 + index };
            Some(Suspended { state, left: Vec::new() })
        });
        Stopping::done(stopped.collect())
    }

    fn reset(&mut self) {
        let mut told = self.told.lock().unwrap();
        assert!(told.running.is_empty(), "queues are stopped before a reset");
        told.acked = None;
        told.resets += 1;
    }

    fn on_config_change(&mut self, notify: Interrupt) {
        self.told.lock().unwrap().changed = Some(notify);
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        ringvm_backends::state::check_empty(&self.info.name, state)
    }

    fn stats(&self) -> DeviceStats {
        DeviceStats::default()
    }
}

/// A function on a bus of its own, with everything around it.
struct Bench {
    function: Arc<Mutex<VirtioPci>>,
    buses: Arc<Buses>,
    platform: Arc<FakePlatform>,
    told: Arc<Mutex<Told>>,
}

impl Bench {
    /// A function as software finds it.
    fn cold() -> Self {
        Self::with_patience(PATIENCE)
    }

    fn with_patience(patience: Duration) -> Self {
        let told = Arc::new(Mutex::new(Told { config: *b"ringvm!!", ..Default::default() }));
        let info = DeviceInfo {
            device_type: 2,
            name: "test0".into(),
            features: OFFERED,
            queue_sizes: vec![MAX_SIZE; usize::from(QUEUES)],
            config_len: 8,
        };
        let device = Box::new(TestDevice { info, told: Arc::clone(&told) });
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
        let buses = Arc::new(Buses::default());
        let platform = Arc::new(FakePlatform::default());
        let window = BarWindow::new(std::slice::from_ref(&(BAR..BAR + 0x1000_0000)));
        let place = Place { slot: 1, bar: BAR, window, patience };
        let as_platform: Arc<dyn Platform> = Arc::clone(&platform) as _;
        let function = VirtioPci::new(device, memory, place, &buses, &as_platform).unwrap();
        Self { function, buses, platform, told }
    }

    /// A function with its BAR decoded, bus mastering on and MSI-X as wanted.
    fn warm(msix: bool) -> Self {
        let bench = Self::cold();
        bench.config_write(reg::COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
        if msix {
            let control = bench.capability(0x11, None) + 2;
            bench.config_write(control, &0x8000_u16.to_le_bytes());
        }
        bench
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.function).write_config(offset, data);
    }

    fn config_read<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        lock(&self.function).read_config(offset, &mut data);
        data
    }

    /// The capability with this ID, and for virtio ones this type.
    fn capability(&self, id: u8, kind: Option<u8>) -> u16 {
        let mut at = u16::from(self.config_read::<1>(reg::CAPABILITIES)[0]);
        while at != 0 {
            let head: [u8; 4] = self.config_read(at);
            if head[0] == id && kind.is_none_or(|kind| head[3] == kind) {
                return at;
            }
            at = u16::from(head[1]);
        }
        panic!("no capability {id:#x} {kind:?}");
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.buses.mmio.write(BAR + offset, data);
    }

    fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.buses.mmio.read(BAR + offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn status(&self) -> u8 {
        self.read(STATUS, 1) as u8
    }

    fn set_status(&self, value: u8) {
        self.write(STATUS, &[value]);
    }

    fn set_features(&self, features: u64) {
        for half in 0..2_u32 {
            self.write(0x08, &half.to_le_bytes());
            self.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
    }

    /// Goes through initialisation up to FEATURES_OK.
    fn negotiate(&self, features: u64) {
        self.set_status(0);
        self.set_status(1);
        self.set_status(1 | 2);
        self.set_features(features);
        self.set_status(1 | 2 | 8);
    }

    fn set_queue(&self, index: u16, vector: u16) {
        self.write(0x16, &index.to_le_bytes());
        self.write(0x18, &128_u16.to_le_bytes());
        self.write(0x1a, &vector.to_le_bytes());
        for (register, address) in [(0x20, 0x1000_u64), (0x28, 0x2000), (0x30, 0x1_0000_3000)] {
            self.write(register, &(address as u32).to_le_bytes());
            self.write(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(0x1c, &1_u16.to_le_bytes());
    }

    /// A driver that is up with these queues.
    fn drive(&self, queues: &[u16]) {
        self.negotiate(VERSION_1);
        for &index in queues {
            self.set_queue(index, index + 1);
        }
        self.set_status(ALL);
        assert_eq!(self.status(), ALL);
    }

    /// Waits until the device is where its registers want it.
    fn settle(&self) {
        assert!(lock(&self.function).transport.owner().wait(PATIENCE));
    }

    fn take_device(&self) -> Box<dyn Device> {
        let mut function = lock(&self.function);
        function.unplug();
        let taken = function.questions().take();
        drop(function);
        taken.recv().unwrap().device
    }

    fn running(&self) -> Vec<u16> {
        self.told.lock().unwrap().running.keys().copied().collect()
    }
}

#[test]
fn pitfall_16_a_driver_that_follows_the_specification_gets_its_queues_gaps_and_all() {
    let bench = Bench::warm(true);
    bench.drive(&[0, 2]);
    let told = bench.told.lock().unwrap();
    assert_eq!(told.acked, Some(VERSION_1));
    let ring = RingConfig { size: 128, desc: 0x1000, avail: 0x2000, used: 0x1_0000_3000 };
    // Queue 2 stays queue 2 although there is no queue 1, and has its own vector.
    assert_eq!(told.rings, [(2, ring, QueueState::default()), (0, ring, QueueState::default())]);
    told.running[&2].call.raise();
    drop(told);
    let event = lock(&bench.function).msix.event(3).unwrap();
    assert!(is_raised(borrow(&event)));
    assert_eq!(bench.read(0x12, 2), u64::from(QUEUES));
    assert_eq!(bench.read(DEVICE, 8), u64::from_le_bytes(*b"ringvm!!"));
}

#[test]
fn pitfall_18_a_change_of_configuration_is_told_once_and_only_to_a_driver() {
    const GENERATION: u64 = 0x15;
    let bench = Bench::warm(true);
    let changed = bench.told.lock().unwrap().changed.clone().unwrap();
    let event = lock(&bench.function).msix.event(0).unwrap();
    let generation = bench.read(GENERATION, 1);
    changed.raise();
    bench.settle();
    assert_eq!(bench.read(GENERATION, 1), generation + 1);
    assert!(!is_raised(borrow(&event)), "no driver is there to be interrupted");
    bench.negotiate(VERSION_1);
    bench.write(0x10, &0_u16.to_le_bytes());
    bench.set_queue(0, 1);
    bench.set_status(ALL);
    assert!(!is_raised(borrow(&event)), "nothing has changed since");
    assert_eq!(bench.read(GENERATION, 1), generation + 1, "reading and starting change nothing");
    changed.raise();
    bench.settle();
    assert!(is_raised(borrow(&event)));
    assert_eq!(bench.read(GENERATION, 1), generation + 2);
    // The queues' interrupts are others.
    assert!(!is_raised(borrow(&lock(&bench.function).msix.event(1).unwrap())));
}

#[test]
fn a_device_that_drains_for_ever_keeps_nobody_waiting() {
    let bench = Bench::with_patience(Duration::from_millis(1));
    bench.config_write(reg::COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
    bench.negotiate(VERSION_1);
    bench.set_queue(0, 1);
    bench.set_status(ALL);
    bench.settle();
    assert_eq!(bench.running(), [0]);
    bench.told.lock().unwrap().drains_for_ever = true;
    bench.set_status(0);
    assert_eq!(bench.status(), ALL, "the reset is not complete");
    bench.set_status(1);
    assert_eq!(bench.status(), ALL, "a driver is to wait for that");
    assert_eq!(bench.read(DEVICE, 8), u64::from_le_bytes(*b"ringvm!!"));
    let questions = lock(&bench.function).questions();
    let (reply, answer) = bounded(1);
    questions.stats(reply);
    answer.recv_timeout(PATIENCE).expect("questions are answered while it drains");
    assert_eq!(bench.told.lock().unwrap().resets, 0, "before it was driven there was nothing to reset");

    let end = {
        let mut told = bench.told.lock().unwrap();
        told.running.clear();
        told.draining.take().unwrap()
    };
    end.send(vec![Some(Suspended::default())]).unwrap();
    bench.settle();
    assert_eq!((bench.status(), bench.told.lock().unwrap().resets), (0, 1));
    bench.told.lock().unwrap().drains_for_ever = false;
    bench.negotiate(VERSION_1);
    bench.settle();
    assert_eq!(bench.status(), 11);
}

#[test]
fn a_driver_that_resets_an_unused_device_goes_on_at_once() {
    let bench = Bench::with_patience(Duration::ZERO);
    bench.config_write(reg::COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
    // The test holds the lock that the device would need for a reset.
    let told = bench.told.lock().unwrap();
    for _ in 0..2 {
        bench.set_status(0);
        assert_eq!(bench.status(), 0);
        bench.set_status(1);
        bench.set_status(1 | 2);
        assert_eq!(bench.status(), 3, "what follows a status of 0 counts");
    }
    drop(told);
    bench.settle();
    assert_eq!(bench.status(), 3, "and is not undone later");
}

#[test]
fn features_that_a_slow_device_refuses_need_a_reset() {
    let bench = Bench::with_patience(Duration::ZERO);
    bench.config_write(reg::COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
    bench.settle();
    // The test holds the lock that the device needs to answer.
    let told = bench.told.lock().unwrap();
    bench.set_status(1);
    bench.set_status(1 | 2);
    bench.set_features(VERSION_1 | 1 << 5);
    bench.set_status(1 | 2 | 8);
    assert_eq!(bench.status(), 11, "a driver looks once");
    drop(told);
    bench.settle();
    assert_eq!(bench.status(), 11 | 0x40);
    bench.set_status(0);
    bench.settle();
    assert_eq!(bench.status(), 0);
}

#[test]
fn pitfall_17_status_bits_count_only_in_their_order() {
    let bench = Bench::warm(true);
    for early in [2, 4, 8, 2 | 8 | 4] {
        bench.set_status(early);
        assert_eq!(bench.status(), 0, "{early:#x} before ACKNOWLEDGE");
    }
    bench.set_status(1);
    bench.set_status(1 | 4);
    assert_eq!(bench.status(), 1, "DRIVER_OK before DRIVER");
    bench.set_status(1 | 2);
    bench.set_queue(0, 1);
    bench.set_status(1 | 2 | 4);
    assert_eq!(bench.status(), 3, "DRIVER_OK before FEATURES_OK");
    assert!(bench.running().is_empty());
    bench.set_status(1 | 2 | 8);
    assert_eq!(bench.status(), 3, "FEATURES_OK without VERSION_1");
    bench.set_features(VERSION_1 | 1 << 40);
    bench.set_status(1 | 2 | 8);
    assert_eq!(bench.status(), 3, "FEATURES_OK with features never offered");
    bench.set_features(VERSION_1 | 1 << 5);
    bench.set_status(1 | 2 | 8);
    assert_eq!(bench.status(), 3, "FEATURES_OK against the device's word");
    bench.set_features(VERSION_1 | 1 << 5 | 1 << 29);
    bench.set_status(1 | 2 | 8);
    assert_eq!(bench.status(), 11);
    bench.set_features(VERSION_1);
    bench.write(0x08, &0_u32.to_le_bytes());
    assert_eq!(bench.read(0x0c, 4), 1 << 5 | 1 << 29, "features are frozen once accepted");
    bench.set_status(1);
    assert_eq!(bench.status(), 11, "bits are never taken back but by a reset");
    bench.set_status(ALL);
    assert_eq!(bench.running(), [0]);
    bench.set_status(0x80 | ALL);
    assert_eq!(bench.status(), 0x80 | ALL);
}

#[test]
fn pitfall_1_a_live_queue_is_frozen_until_reset() {
    let bench = Bench::warm(true);
    bench.drive(&[0]);
    let before: Vec<u64> = [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)]
        .map(|(offset, len)| bench.read(offset, len))
        .to_vec();
    for queue in 0..QUEUES {
        bench.write(0x16, &queue.to_le_bytes());
        bench.write(0x18, &2_u16.to_le_bytes());
        bench.write(0x1a, &0_u16.to_le_bytes());
        bench.write(0x1c, &1_u16.to_le_bytes());
        for register in [0x20, 0x24, 0x28, 0x2c, 0x30, 0x34] {
            bench.write(register, &0xdead_beef_u32.to_le_bytes());
        }
        bench.write(0x20, &u64::MAX.to_le_bytes());
    }
    bench.write(0x16, &0_u16.to_le_bytes());
    let after: Vec<u64> = [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)]
        .map(|(offset, len)| bench.read(offset, len))
        .to_vec();
    assert_eq!(before, after);
    assert_eq!(bench.running(), [0], "no queue was started late");

    let resets = bench.told.lock().unwrap().resets;
    bench.set_status(0);
    assert_eq!(bench.status(), 0);
    assert!(bench.running().is_empty());
    assert_eq!(bench.read(0x18, 2), u64::from(MAX_SIZE));
    assert_eq!(bench.read(0x20, 8), 0);
    assert_eq!(bench.read(0x1a, 2), 0xffff);
    assert_eq!(bench.told.lock().unwrap().resets, resets + 1);
    bench.drive(&[0]);
    assert_eq!(bench.told.lock().unwrap().rings.last().unwrap().2, QueueState::default(), "from the beginning again");
}

#[test]
fn pitfall_15_what_is_out_of_range_is_harmless() {
    let bench = Bench::warm(true);
    bench.negotiate(VERSION_1);
    for queue in [QUEUES, 0x7fff, 0xffff] {
        bench.write(0x16, &queue.to_le_bytes());
        assert_eq!(bench.read(0x18, 2), 0, "a queue that does not exist has size 0");
        bench.set_queue(queue, 1);
        assert_eq!((bench.read(0x18, 2), bench.read(0x1c, 2), bench.read(0x20, 8)), (0, 0, 0));
    }
    bench.write(0x16, &0_u16.to_le_bytes());
    for vector in [QUEUES + 1, 0x7ff, 0xfffe] {
        bench.write(0x1a, &vector.to_le_bytes());
        assert_eq!(bench.read(0x1a, 2), 0xffff, "vector {vector}");
        bench.write(0x10, &vector.to_le_bytes());
        assert_eq!(bench.read(0x10, 2), 0xffff, "vector {vector}");
    }
    for size in [0_u16, 3, MAX_SIZE * 2, 0x8000, 0xffff] {
        bench.write(0x18, &size.to_le_bytes());
        assert_eq!(bench.read(0x18, 2), u64::from(MAX_SIZE), "size {size}");
    }
    for select in [2_u32, 64, u32::MAX] {
        bench.write(0, &select.to_le_bytes());
        assert_eq!(bench.read(4, 4), 0);
        bench.write(8, &select.to_le_bytes());
        bench.write(0xc, &u32::MAX.to_le_bytes());
        assert_eq!(bench.read(0xc, 4), 0);
    }
    for index in [0, u64::from(QUEUES), 0x1000] {
        bench.write(NOTIFY + index * 4, &0_u16.to_le_bytes());
    }
    bench.write(DEVICE + 0x800, &[1; 4]);
    assert_eq!(bench.read(DEVICE + 0x800, 4), 0);
    // Sizes no field has.
    bench.write(STATUS, &[0; 4]);
    assert_eq!(bench.status(), 11);
    bench.write(0x16, &[1]);
    assert_eq!(bench.read(0x16, 2), 0);
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_the_others_go_on() {
    let bench = Bench::warm(true);
    bench.negotiate(VERSION_1);
    bench.write(0x10, &0_u16.to_le_bytes());
    bench.set_queue(0, 1);
    bench.set_queue(1, 2);
    bench.told.lock().unwrap().refuse = Some(1);
    bench.set_status(ALL);
    assert_eq!(bench.status(), ALL | 0x40, "a queue that can't start");
    assert_eq!(bench.running(), [0]);
    let event = lock(&bench.function).msix.event(0).unwrap();
    assert!(is_raised(borrow(&event)), "a configuration change is signalled");

    bench.told.lock().unwrap().refuse = None;
    bench.set_status(0);
    assert!(!is_raised(borrow(&event)), "nothing is pending after a reset");
    bench.drive(&[0, 1]);
    bench.told.lock().unwrap().running[&1].fault.raise();
    assert_eq!(bench.status(), ALL | 0x40, "a queue that broke later");
    assert_eq!(bench.running(), [0, 1]);
    bench.set_status(0);
    assert_eq!(bench.status(), 0);
}

#[test]
fn without_msix_interrupts_come_by_line_and_isr() {
    let bench = Bench::warm(false);
    bench.drive(&[0]);
    let line = || bench.platform.line.0.load(std::sync::atomic::Ordering::SeqCst);
    bench.told.lock().unwrap().running[&0].call.raise();
    assert!(line());
    let status: [u8; 2] = bench.config_read(reg::STATUS);
    assert_eq!(status[0] & 8, 8);
    assert_eq!(bench.read(ISR, 1), 1);
    assert!(!line(), "reading the ISR acknowledges");
    assert_eq!(bench.read(ISR, 1), 0);
    bench.told.lock().unwrap().running[&0].fault.raise();
    assert!(line());
    bench.config_write(reg::COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE).to_le_bytes());
    assert!(!line(), "INTx is disabled");
    assert_eq!(bench.read(ISR, 1), 2);
}

#[test]
fn queues_follow_bus_mastering_and_msix_without_losing_their_place() {
    let bench = Bench::warm(true);
    bench.drive(&[0, 1]);
    bench.config_write(reg::COMMAND, &COMMAND_MEMORY.to_le_bytes());
    assert!(bench.running().is_empty(), "no access to memory without bus mastering");
    bench.config_write(reg::COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
    assert_eq!(bench.running(), [0, 1]);
    let from = |at: usize| bench.told.lock().unwrap().rings[at].2;
    assert_eq!((from(2).next_avail, from(3).next_avail), (8, 7), "the last queue starts first");
    assert!(matches!(bench.told.lock().unwrap().running[&0].call, Interrupt::Event(_)));
    let control = bench.capability(0x11, None) + 2;
    bench.config_write(control, &[0, 0]);
    assert!(matches!(bench.told.lock().unwrap().running[&0].call, Interrupt::Call(_)));
    assert_eq!(bench.status(), ALL);
}

#[test]
fn doorbells_move_with_the_bar() {
    let bench = Bench::cold();
    assert!(bench.platform.doorbells.lock().unwrap().is_empty());
    bench.config_write(reg::COMMAND, &COMMAND_MEMORY.to_le_bytes());
    let at = |base: u64| (0..u64::from(QUEUES)).map(|queue| base + NOTIFY + queue * 4).collect::<Vec<_>>();
    let attached = || bench.platform.doorbells.lock().unwrap().keys().copied().collect::<Vec<_>>();
    assert_eq!(attached(), at(BAR));
    bench.config_write(reg::BAR0, &((BAR + 0x10_0000) as u32).to_le_bytes());
    assert_eq!(attached(), at(BAR + 0x10_0000));
    assert_eq!(bench.read(0x12, 2), u64::MAX >> 48, "nobody is at the old place");
    bench.config_write(reg::BAR0, &[0xff; 4]);
    assert!(attached().is_empty(), "sizing leads nowhere");
    bench.config_write(reg::BAR0, &(BAR as u32).to_le_bytes());
    assert_eq!(attached(), at(BAR));
    bench.config_write(reg::COMMAND, &[0, 0]);
    assert!(attached().is_empty());
    bench.config_write(reg::COMMAND, &COMMAND_MEMORY.to_le_bytes());
    let device = bench.take_device();
    assert!(attached().is_empty());
    assert_eq!(device.info().name, "test0");
    assert_eq!(bench.read(0x12, 2), u64::MAX >> 48);
}

/// The window of 4.1.4.9, for software that can't reach the BAR.
#[test]
fn configuration_space_has_a_window_to_the_bar() {
    let bench = Bench::warm(true);
    let cap = bench.capability(9, Some(CFG_PCI));
    let aim = |offset: u32, length: u32| {
        bench.config_write(cap + WINDOW_OFFSET, &offset.to_le_bytes());
        bench.config_write(cap + WINDOW_LENGTH, &length.to_le_bytes());
    };
    aim(0x14, 1);
    bench.config_write(cap + WINDOW_DATA, &[1, 0, 0, 0]);
    assert_eq!(bench.status(), 1);
    assert_eq!(bench.config_read::<4>(cap + WINDOW_DATA), [1, 0, 0, 0]);
    aim(0x12, 2);
    assert_eq!(bench.config_read::<2>(cap + WINDOW_DATA), QUEUES.to_le_bytes());
    for (offset, length) in
        [(0x14, 3), (0x12, 3), (0, 8), (0x15, 2), (0x14, 0), (0, 0), (u32::MAX, 4), (BAR_SIZE as u32, 4), (0, u32::MAX)]
    {
        aim(offset, length);
        bench.config_write(cap + WINDOW_DATA, &[0xff; 4]);
        bench.config_read::<4>(cap + WINDOW_DATA);
    }
    aim(0x14, 1);
    bench.config_write(cap + WINDOW_BAR, &[1]);
    bench.config_write(cap + WINDOW_DATA, &[0; 4]);
    assert_eq!(bench.status(), 1, "there is no BAR 1");
}

/// One access of a hostile guest.
#[derive(Clone, Debug, TypeGenerator)]
enum Access {
    ConfigRead {
        offset: u16,
        len: u8,
    },
    ConfigWrite {
        offset: u16,
        len: u8,
        value: u32,
    },
    /// Within the common configuration, where most of the state is.
    Common {
        offset: u8,
        len: u8,
        value: u64,
    },
    CommonRead {
        offset: u8,
        len: u8,
    },
    Read {
        offset: u32,
        len: u8,
    },
    Write {
        offset: u32,
        len: u8,
        value: u64,
    },
    /// A step of a driver, so that the deeper states are reached.
    Drive {
        features: u8,
        queues: u8,
    },
    Command {
        value: u8,
    },
    Fault {
        queue: u16,
    },
    Call {
        queue: u16,
    },
}

/// The rules hold, whatever a guest does.
fn check_rules(bench: &Bench) {
    let status = lock(&bench.function).signals.status();
    let told = bench.told.lock().unwrap();
    assert!(status & 2 == 0 || status & 1 != 0, "DRIVER only with ACKNOWLEDGE");
    assert!(status & 8 == 0 || status & 2 != 0, "FEATURES_OK only with DRIVER");
    assert!(status & 4 == 0 || status & 8 != 0, "DRIVER_OK only with FEATURES_OK");
    assert_eq!(told.acked.is_some(), status & 8 != 0, "the device knows its features exactly under FEATURES_OK");
    assert!(told.acked.is_none_or(|features| features & VERSION_1 != 0));
    if !told.running.is_empty() {
        assert_ne!(status & 4, 0, "queues run only under DRIVER_OK");
    }
    for parts in told.running.values() {
        assert!(parts.ring.size.is_power_of_two() && parts.ring.size <= MAX_SIZE);
    }
    drop(told);
    let function = lock(&bench.function);
    let command = function.space.command();
    assert!(command & COMMAND_BUS_MASTER != 0 || bench.running().is_empty());
    let doorbells = bench.platform.doorbells.lock().unwrap().keys().copied().collect::<Vec<_>>();
    let expected = function
        .mapped
        .map(|base| (0..u64::from(QUEUES)).map(|queue| base + NOTIFY + queue * 4).collect::<Vec<_>>())
        .unwrap_or_default();
    assert_eq!(doorbells, expected);
    assert!(function.mapped.is_none_or(|base| (BAR..BAR + 0x1000_0000).contains(&base)));
}

/// The fuzz target of PCI configuration space and the transport; `cargo bolero test virtio_pci::tests::fuzz` runs it
/// for hours.
#[test]
fn fuzz_a_guest_can_do_anything_and_the_rules_hold() {
    bolero::check!().with_type::<Vec<Access>>().for_each(|accesses| {
        let bench = Bench::warm(true);
        for access in accesses.iter().take(64) {
            let mut data = [0; 8];
            // Buses carry accesses of 1, 2, 4 or 8 bytes; configuration cycles stay within a dword.
            let natural = |len: u8| 1_usize << (len % 4);
            let within = |offset: u16, len: u8| (1_usize << (len % 3)).min(4 - usize::from(offset % 4));
            match *access {
                Access::ConfigRead { offset, len } => {
                    let (offset, len) = (offset % 4096, within(offset, len));
                    lock(&bench.function).read_config(offset, &mut data[..len]);
                }
                Access::ConfigWrite { offset, len, value } => {
                    let (offset, len) = (offset % 256, within(offset, len));
                    lock(&bench.function).write_config(offset, &value.to_le_bytes()[..len]);
                }
                Access::Common { offset, len, value } => {
                    bench.write(u64::from(offset % 0x40), &value.to_le_bytes()[..natural(len)]);
                }
                Access::CommonRead { offset, len } => drop(bench.read(u64::from(offset % 0x40), natural(len))),
                Access::Read { offset, len } => drop(bench.read(u64::from(offset) % BAR_SIZE, natural(len))),
                Access::Write { offset, len, value } => {
                    bench.write(u64::from(offset) % BAR_SIZE, &value.to_le_bytes()[..natural(len)]);
                }
                Access::Drive { features, queues } => {
                    bench.negotiate(VERSION_1 | u64::from(features & 1) << 5 | u64::from(features >> 1 & 1) << 29);
                    for queue in (0..QUEUES).filter(|queue| queues >> queue & 1 != 0) {
                        bench.set_queue(queue, queue);
                    }
                    bench.set_status(ALL);
                }
                Access::Command { value } => bench.config_write(reg::COMMAND, &[value, 0]),
                Access::Fault { queue } | Access::Call { queue } => {
                    let told = bench.told.lock().unwrap();
                    let Some(parts) = told.running.get(&(queue % QUEUES)) else { continue };
                    let (fault, call) = (parts.fault.clone(), parts.call.clone());
                    drop(told);
                    if matches!(access, Access::Fault { .. }) { fault.raise() } else { call.raise() }
                }
            }
            check_rules(&bench);
        }
        bench.set_status(0);
        drop(bench.take_device());
        assert!(bench.running().is_empty() && bench.platform.doorbells.lock().unwrap().is_empty());
    });
}
