//! The device as a device of ours, on a thread of its own.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringvm_backends::device::{Device, QueueParts, QueueState};
use ringvm_backends::options::Checked;
use ringvm_backends::testing::driver::{Buffer, Driver};
use ringvm_backends::virtqueue::End;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::rig::{CID, Guest};
use crate::vsock::options::{VsockOptions, path_of_port};
use crate::vsock::packet::{HEADER_LEN, Header, op};
use crate::vsock::{RX, TX, open};

const RX_DATA: u64 = 0x1_0000;
const TX_DATA: u64 = 0x2_0000;
const PATIENCE: Duration = Duration::from_secs(10);

struct Machine {
    device: Box<dyn Device>,
    mem: Arc<GuestMemoryMmap>,
    region: Arc<GuestRegionMmap>,
    drivers: [Driver; 2],
    kicks: [EventFd; 2],
    faults: Arc<AtomicUsize>,
}

impl Machine {
    fn new(mut device: Box<dyn Device>) -> Self {
        let region = MmapRegion::new(1 << 20).unwrap();
        let region = Arc::new(GuestRegionMmap::new(region, GuestAddress(0)).unwrap());
        let mem = Arc::new(GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&region)]).unwrap());
        device.ack_features(device.info().features).unwrap();
        let driver = |base| Driver::new(Arc::clone(&mem), base, 16, 1 << VIRTIO_RING_F_EVENT_IDX);
        let (drivers, kicks) = ([driver(0), driver(0x1000)], [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap()));
        Self { device, mem, region, drivers, kicks, faults: Arc::default() }
    }

    fn start(&mut self, froms: [QueueState; 2]) {
        for (index, from) in froms.into_iter().enumerate() {
            let faults = Arc::clone(&self.faults);
            let kick = self.kicks[index].try_clone().unwrap();
            let parts = QueueParts {
                fault: Interrupt::Call(Arc::new(move || {
                    faults.fetch_add(1, Ordering::SeqCst);
                })),
                from,
                ..QueueParts::new(self.drivers[index].ring(), Arc::clone(&self.mem), kick)
            };
            self.device.start_queue(index as u16, parts).unwrap();
        }
    }

    fn stop(&mut self) -> [QueueState; 2] {
        let ends = self.device.stop(&[RX, TX], End::Suspended).wait().into_iter();
        let ends: Vec<_> = ends.map(|end| end.unwrap().state).collect();
        [ends[0], ends[1]]
    }

    fn offer(&mut self, queue: u16, buffer: Buffer) {
        let index = usize::from(queue);
        self.drivers[index].add(&[buffer]).unwrap();
        if self.drivers[index].publish() {
            self.kicks[index].write(1).unwrap();
        }
    }

    fn used(&mut self, queue: u16) -> u32 {
        let mut used = None;
        wait(|| {
            used = self.drivers[usize::from(queue)].next_used();
            used.is_some()
        });
        used.unwrap().1
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..header };
        let bytes = [&header.bytes()[..], data].concat();
        self.mem.write_slice(&bytes, GuestAddress(TX_DATA)).unwrap();
        self.offer(TX, Buffer { addr: TX_DATA, len: bytes.len() as u32, writable: false });
        assert_eq!(self.used(TX), 0);
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        self.offer(RX, Buffer { addr: RX_DATA, len: 4096, writable: true });
        let mut bytes = vec![0; self.used(RX) as usize];
        self.mem.read_slice(&mut bytes, GuestAddress(RX_DATA)).unwrap();
        (Header::read(&mut &bytes[..]).unwrap(), bytes.split_off(HEADER_LEN))
    }
}

fn wait(mut until: impl FnMut() -> bool) {
    let start = Instant::now();
    while !until() {
        assert!(start.elapsed() < PATIENCE, "it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_vsock_device_is_a_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let options = Checked::new(VsockOptions { cid: CID as u32, socket: path.clone() }).unwrap();
    let device = open("vsock0", &options).unwrap();
    assert_eq!((device.info().device_type, device.info().config_len), (19, 8));
    let mut machine = Machine::new(Box::new(device));
    let mut cid = [0; 8];
    machine.device.read_config(0, &mut cid);
    assert_eq!(cid, CID.to_le_bytes());
    machine.start(Default::default());

    let listener = UnixListener::bind(path_of_port(&path, 52)).unwrap();
    let mut guest = Guest::new(52, 1024);
    machine.send(guest.header(op::REQUEST), &[]);
    let (mut program, _) = listener.accept().unwrap();
    program.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(machine.next().0.op, op::RESPONSE);
    for round in 0..20_u8 {
        machine.send(guest.header(op::RW), &[round; 100]);
        let mut got = [0; 100];
        program.read_exact(&mut got).unwrap();
        assert_eq!(got, [round; 100]);
        program.write_all(&[round; 50]).unwrap();
        let (header, data) = machine.next();
        assert_eq!((header.op, data), (op::RW, vec![round; 50]));
        // The queues stop and go on at the same position, and the connection lives.
        let froms = machine.stop();
        // Nobody else has the memory then: who owns it may unmap it.
        assert_eq!(Arc::strong_count(&machine.region), 2);
        machine.start(froms);
    }
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    let (header, _) = machine.next();
    assert_eq!((header.op, header.dst_port), (op::REQUEST, 7));

    // A driver that breaks its ring is told. The sockets do not keep the thread busy meanwhile.
    machine.drivers[usize::from(TX)].write_avail_index(5000);
    machine.kicks[usize::from(TX)].write(1).unwrap();
    wait(|| machine.faults.load(Ordering::SeqCst) > 0);
    program.write_all(b"for nobody").unwrap();
    let _more = UnixStream::connect(&path).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let before = busy();
    std::thread::sleep(Duration::from_millis(300));
    assert!(busy() - before < 15, "the device's thread is busy");
    machine.stop();
    machine.device.reset();
    assert_eq!(program.read(&mut [0; 1]).unwrap_or(0), 0);

    // So does a driver that names a descriptor that there is not.
    for queue in [TX, RX] {
        machine = Machine::new(machine.device);
        machine.start(Default::default());
        machine.send(Guest::new(52, 1024).header(op::REQUEST), &[]);
        listener.accept().unwrap();
        assert_eq!(machine.next().0.op, op::RESPONSE);
        if queue == RX {
            // Something to give, so that the ring is looked at.
            machine.send(Guest::new(53, 1024).header(op::RW), &[]);
        }
        let driver = &machine.drivers[usize::from(queue)];
        let position = driver.used_index();
        driver.write_avail_entry(position, 5000);
        driver.write_avail_index(position.wrapping_add(1));
        machine.kicks[usize::from(queue)].write(1).unwrap();
        wait(|| machine.faults.load(Ordering::SeqCst) > 0);
        machine.stop();
        machine.device.reset();
    }

    let Machine { device, .. } = machine;
    let mut machine = Machine::new(device);
    machine.start(Default::default());
    machine.send(Guest::new(52, 1024).header(op::REQUEST), &[]);
    listener.accept().unwrap();
    assert_eq!(machine.next().0.op, op::RESPONSE);
    drop(machine);
    assert!(!path.exists());
}

/// Processor time of the device's thread, in hundredths of a second.
fn busy() -> u64 {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let stats = threads.filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("stat")).ok());
    let ours = stats.filter(|stat| stat.contains("(host-vsock0)"));
    ours.map(|stat| {
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    })
    .sum()
}
