//! The console as a device, on a thread of its own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use ringvm_backends::device::{QueueParts, QueueState};
use ringvm_backends::virtqueue::End as StopEnd;

use super::*;

struct Machine {
    device: Box<dyn Device>,
    mem: Arc<GuestMemoryMmap>,
    drivers: [Driver; QUEUES],
    kicks: [EventFd; QUEUES],
    calls: [Arc<EventFd>; QUEUES],
    faults: Arc<AtomicUsize>,
}

impl Machine {
    fn new(mut device: Box<dyn Device>) -> Self {
        let mem: Arc<GuestMemoryMmap> =
            Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
        device.ack_features(device.info().features).unwrap();
        let driver = |base| Driver::new(Arc::clone(&mem), base, SIZE, FEATURES);
        let drivers = [driver(RX_RING), driver(TX_RING)];
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (kicks, calls) = ([event(), event()], [Arc::new(event()), Arc::new(event())]);
        Self { device, mem, drivers, kicks, calls, faults: Arc::default() }
    }

    fn start(&mut self, index: usize, from: QueueState) {
        let faults = Arc::clone(&self.faults);
        let kick = self.kicks[index].try_clone().unwrap();
        let parts = QueueParts {
            call: Interrupt::Event(Arc::clone(&self.calls[index])),
            fault: Interrupt::Call(Arc::new(move || {
                faults.fetch_add(1, Ordering::SeqCst);
            })),
            from,
            ..QueueParts::new(self.drivers[index].ring(), Arc::clone(&self.mem), kick)
        };
        self.device.start_queue(index as u16, parts).unwrap();
    }

    fn offer(&mut self, index: usize, buffer: Buffer) {
        self.drivers[index].add(&[buffer]).unwrap();
        self.drivers[index].want_interrupts(true);
        if self.drivers[index].publish() {
            self.kicks[index].write(1).unwrap();
        }
    }

    /// Waits for the interrupt and takes the buffer.
    fn used(&mut self, index: usize) -> u32 {
        let mut written = None;
        wait(|| {
            written = self.calls[index].read().ok().and_then(|_| self.drivers[index].next_used());
            written.is_some()
        });
        written.unwrap().1
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
fn a_console_is_a_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let (device, console) = ConsoleBackend::host("console0", socket_at(&path)).unwrap();
    assert_eq!((device.info().device_type, device.info().config_len), (3, 12));
    let mut machine = Machine::new(Box::new(device));
    for index in 0..QUEUES {
        machine.start(index, QueueState::default());
    }
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut position = QueueState::default();
    for round in 0..20_u8 {
        machine.mem.write_slice(&[round; 100], GuestAddress(TX_DATA)).unwrap();
        machine.offer(TRANSMITQ, Buffer { addr: TX_DATA, len: 100, writable: false });
        let mut got = [0; 100];
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, [round; 100]);
        assert_eq!(machine.used(TRANSMITQ), 0);
        machine.offer(RECEIVEQ, Buffer { addr: RX_DATA, len: 100, writable: true });
        client.write_all(&[round; 50]).unwrap();
        let written = machine.used(RECEIVEQ) as usize;
        machine.mem.read_slice(&mut got, GuestAddress(RX_DATA)).unwrap();
        assert_eq!(got[..written], [round; 50][..written]);
        // The queues stop and go on at the same position.
        let ends = machine.device.stop(&[0, 1], StopEnd::Suspended).wait();
        for (index, end) in ends.into_iter().enumerate() {
            position = end.unwrap().state;
            machine.start(index, position);
        }
    }
    assert_eq!(position, QueueState { next_avail: 20, next_used: 20 });

    // A change of the size is told and read.
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    machine.device.on_config_change(Interrupt::Call(Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    })));
    console.resize(100, 40);
    assert_eq!(told.load(Ordering::SeqCst), 1);
    let mut size = [0; 4];
    machine.device.read_config(0, &mut size);
    assert_eq!(size, [100, 0, 40, 0]);
    machine.device.write_config(8, &[1, 0, 0, 0]).unwrap_err();

    // A driver that breaks its ring is told, and may start again.
    for breaks in [
        |driver: &Driver| driver.write_avail_index(5000),
        |driver: &Driver| {
            (0..SIZE).for_each(|entry| driver.write_avail_entry(entry, 5000));
            driver.write_avail_index(driver.used_index().wrapping_add(1));
        },
    ] {
        breaks(&machine.drivers[TRANSMITQ]);
        machine.kicks[TRANSMITQ].write(1).unwrap();
        wait(|| machine.faults.load(Ordering::SeqCst) > 0);
        let ends = machine.device.stop(&[0, 1], StopEnd::Suspended).wait();
        assert!(ends.iter().all(Option::is_some), "{ends:?}");
        machine.device.reset();
        machine = Machine::new(machine.device);
        for index in 0..QUEUES {
            machine.start(index, QueueState::default());
        }
        machine.mem.write_slice(b"again", GuestAddress(TX_DATA)).unwrap();
        machine.offer(TRANSMITQ, Buffer { addr: TX_DATA, len: 5, writable: false });
        assert_eq!(machine.used(TRANSMITQ), 0);
        let mut got = [0; 5];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"again");
    }
    // The end of the device is the end of the console.
    drop((machine, console));
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert!(!path.exists());
}
