//! The frontend against a daemon that the test plays, and that breaks the rules.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use ringvm_vhost_user::connection::{Connection, Limit};
use ringvm_vhost_user::message::{self, Message};
use tempfile::TempDir;
use vhost::vhost_user::message::BackendReq;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_GPU};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::sentinel::Sentinel;
use super::*;

/// Longer than any step here takes on the busiest machine, and shorter than a past bug took.
const LIMIT: Duration = Duration::from_secs(30);
/// Longest time that the frontend has nothing to say.
const IDLE: Duration = Duration::from_secs(600);
const RESET_OWNER: [u32; 2] = [4, 34];
const SET_FEATURES: u32 = 2;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const GET_VRING_BASE: u32 = 11;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const SKIP_DRAIN: u32 = 45;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// One that the daemon offers, and may refuse all the same.
const ODD_FEATURE: u64 = 1 << 5;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE.
const PLAIN: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13;
/// INFLIGHT_SHMFD, and the bits that SKIP_DRAIN needs.
const SUSPENDS: u64 = 1 << 12 | 1 << 20 | 1 << 23;

/// The daemon's reaction to a message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    Obey,
    /// Answers that it won't.
    Refuse,
    /// Takes it and never answers.
    Hang,
    /// Ends the connection.
    Leave,
}

type Script = dyn Fn(u32, &[u8]) -> Does + Send + Sync;

/// Observations of the daemon.
struct Stage {
    script: Box<Script>,
    protocol: u64,
    connections: AtomicUsize,
    /// How often each message came.
    heard: Mutex<Vec<u32>>,
    config: Mutex<Vec<u8>>,
    /// Where it may speak by itself.
    events: Mutex<Option<UnixStream>>,
}

impl Stage {
    fn count(&self, request: u32) -> usize {
        lock(&self.heard).iter().filter(|&&heard| heard == request).count()
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Serves one connection.
    fn serve(&self, stream: UnixStream) -> Option<()> {
        let mut wire = Connection::new(stream);
        loop {
            let Message { request, need_reply, body, files } = wire.receive_request(Limit::after(IDLE)).ok()??;
            lock(&self.heard).push(request);
            let does = (self.script)(request, &body);
            match does {
                Does::Hang => {
                    while let Ok(Some(_)) = wire.receive_request(Limit::after(IDLE)) {}
                    return None;
                }
                Does::Leave => return None,
                Does::Obey | Does::Refuse => {}
            }
            let number = |number: u64| Some(number.to_ne_bytes().to_vec());
            let (answer, file) = match request {
                1 => (number(VERSION_1 | ODD_FEATURE | 1 << 30), None),
                15 => (number(self.protocol), None),
                17 => (number(8), None),
                GET_CONFIG => {
                    let config = lock(&self.config).clone();
                    (Some([&body[..12], &config].concat()), None)
                }
                GET_VRING_BASE | SKIP_DRAIN => (Some([&body[..4], &[0; 4]].concat()), None),
                21 => {
                    *lock(&self.events) = files.ok()?.pop().map(UnixStream::from);
                    (None, None)
                }
                31 => {
                    let file = rustix::fs::memfd_create("table", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
                    rustix::fs::ftruncate(&file, 1 << 20).unwrap();
                    let about = [(1_u64 << 20).to_ne_bytes(), [0; 8]].concat();
                    (Some([about, body[16..].to_vec()].concat()), Some(file))
                }
                _ => (None, None),
            };
            let answer = answer.or_else(|| need_reply.then(|| number(u64::from(does == Does::Refuse)))?);
            let Some(answer) = answer else { continue };
            let file = file.as_ref().map(AsFd::as_fd);
            wire.send(&message::reply(request, &answer), file.as_slice(), Limit::after(IDLE)).ok()?;
        }
    }

    /// Says that the configuration space has changed.
    fn say_changed(&self) -> bool {
        let message = message::request(BackendReq::CONFIG_CHANGE_MSG, false, &[]);
        lock(&self.events).as_mut().is_some_and(|events| events.write_all(&message).is_ok())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A daemon that follows a script, and a device that it serves.
struct Play {
    stage: Arc<Stage>,
    device: VhostUserDevice,
    _folder: TempDir,
}

fn play(device_type: u32, protocol: u64, script: impl Fn(u32, &[u8]) -> Does + Send + Sync + 'static) -> Play {
    play_as(&Wanted::new(device_type, None, 16), protocol, script)
}

fn play_as(wanted: &Wanted, protocol: u64, script: impl Fn(u32, &[u8]) -> Does + Send + Sync + 'static) -> Play {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let config = vec![0; offer::config_len(wanted.device_type) as usize];
    let stage = Arc::new(Stage {
        script: Box::new(script),
        protocol,
        connections: AtomicUsize::new(0),
        heard: Mutex::default(),
        config: Mutex::new(config),
        events: Mutex::default(),
    });
    let actor = Arc::clone(&stage);
    // It ends with the test's process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            actor.connections.fetch_add(1, Ordering::SeqCst);
            let actor = Arc::clone(&actor);
            thread::spawn(move || actor.serve(stream));
        }
    });
    let device = VhostUserDevice::connect("disk0", Peer::at(path), wanted).unwrap();
    Play { stage, device, _folder: folder }
}

/// Guest memory that can be shared.
fn memory() -> GuestMemory {
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    let range = (GuestAddress(0), 1 << 20, Some(FileOffset::new(file, 0)));
    Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap())
}

fn parts(memory: &GuestMemory) -> QueueParts {
    let ring = RingConfig { size: 16, desc: 0, avail: 0x1000, used: 0x2000 };
    QueueParts::new(ring, Arc::clone(memory), event().unwrap())
}

/// Waits until `come` is true.
fn eventually(what: &str, come: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !come() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn features_that_a_daemon_refuses_are_not_its_death() {
    let refuses = |request, body: &[u8]| {
        let odd = request == SET_FEATURES && u64::from_ne_bytes(body.try_into().unwrap()) & ODD_FEATURE != 0;
        if odd { Does::Refuse } else { Does::Obey }
    };
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_BLOCK, PLAIN, refuses);
    for _ in 0..100 {
        assert!(matches!(device.ack_features(VERSION_1 | ODD_FEATURE), Err(DeviceError::Features { .. })));
        device.reset();
    }
    device.ack_features(VERSION_1).unwrap();
    assert_eq!((stage.connections(), device.is_connected()), (1, true));
}

/// Daemons for file systems leave the tag to the VMM, and those that have one of their own are not asked.
#[test]
fn a_configuration_space_that_is_given_is_not_the_daemons() {
    let space: Vec<u8> = (1..=40).collect();
    let wanted = Wanted { config: Some(space.clone()), ..Wanted::new(VIRTIO_ID_FS, None, 16) };
    for protocol in [PLAIN & !(1 << 9), PLAIN] {
        let Play { stage, mut device, _folder } = play_as(&wanted, protocol, |_, _| Does::Obey);
        assert_eq!(device.info().config_len, 40);
        let mut read = [0; 44];
        device.read_config(0, &mut read);
        assert_eq!((&read[..40], &read[40..]), (&space[..], &[0; 4][..]));
        assert!(matches!(device.write_config(0, &[9]), Err(DeviceError::Config { .. })));
        let asked = lock(&stage.heard).contains(&GET_CONFIG);
        assert!(!asked, "{protocol:#x}");
    }
}

#[test]
fn a_ring_outside_memory_is_nothing_to_try_a_daemon_with() {
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_BLOCK, PLAIN, |_, _| Does::Obey);
    let memory = memory();
    for _ in 0..10 {
        device.ack_features(VERSION_1).unwrap();
        for place in 0..3 {
            let mut parts = parts(&memory);
            // The end of memory lies in the area.
            let at = (1 << 20) - 16;
            match place {
                0 => parts.ring.desc = at,
                1 => parts.ring.avail = at,
                _ => parts.ring.used = at,
            }
            assert!(matches!(device.start_queue(0, parts), Err(DeviceError::Ring { .. })));
        }
        device.reset();
    }
    assert_eq!((stage.count(SET_VRING_NUM), stage.connections()), (0, 1));
}

#[test]
fn a_ring_that_a_daemon_refuses_is_not_its_death() {
    let refuses = |request, _: &[u8]| if request == SET_VRING_ADDR { Does::Refuse } else { Does::Obey };
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_BLOCK, PLAIN, refuses);
    let memory = memory();
    for _ in 0..20 {
        device.ack_features(VERSION_1).unwrap();
        device.start_queue(0, parts(&memory)).unwrap_err();
        assert_eq!(device.drain(0), None);
        device.reset();
    }
    assert_eq!(stage.connections(), 1);
}

#[test]
fn a_ring_that_the_next_daemon_refuses_needs_a_reset() {
    let again = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&again);
    let script = move |request, _: &[u8]| match request {
        SET_VRING_ADDR if told.load(Ordering::SeqCst) => Does::Refuse,
        SET_CONFIG => Does::Leave,
        _ => Does::Obey,
    };
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_GPU, PLAIN, script);
    device.ack_features(VERSION_1).unwrap();
    let faults = Arc::new(AtomicUsize::new(0));
    let raised = Arc::clone(&faults);
    let fault = Interrupt::Call(Arc::new(move || {
        raised.fetch_add(1, Ordering::SeqCst);
    }));
    device.start_queue(0, QueueParts { fault, ..parts(&memory()) }).unwrap();
    again.store(true, Ordering::SeqCst);
    // It leaves, and comes again.
    device.write_config(0, &[1]).unwrap_err();
    eventually("the ring is broken", || faults.load(Ordering::SeqCst) == 1);
    eventually("the connection lasts", || device.is_connected());
    assert_eq!(stage.connections(), 2);
    device.reset();
    assert_eq!(stage.connections(), 2);
}

#[test]
fn a_write_to_configuration_space_that_is_refused_is_not_the_daemons_death() {
    let refuses = |request, _: &[u8]| if request == SET_CONFIG { Does::Refuse } else { Does::Obey };
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_GPU, PLAIN, refuses);
    for offset in (0..300).chain([u32::MAX]) {
        let refused = device.write_config(offset, &[1]);
        assert!(matches!(refused, Err(DeviceError::Config { .. })));
    }
    assert!(stage.count(SET_CONFIG) > 0);
    assert_eq!((stage.connections(), device.is_connected()), (1, true));
    // The frontend knows which fields of a disk are read-only.
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_BLOCK, PLAIN, refuses);
    (0..60).filter(|&offset| offset != 32).for_each(|offset| drop(device.write_config(offset, &[1]).unwrap_err()));
    assert_eq!(stage.count(SET_CONFIG), 0);
}

#[test]
fn the_configuration_is_read_while_a_daemon_hangs() {
    let hangs = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&hangs);
    let script = move |request, _: &[u8]| match request {
        SET_CONFIG => Does::Leave,
        // From the second connection on.
        3 if told.swap(true, Ordering::SeqCst) => Does::Hang,
        _ => Does::Obey,
    };
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_GPU, PLAIN, script);
    device.ack_features(VERSION_1).unwrap();
    device.write_config(0, &[1]).unwrap_err();
    eventually("it comes again", || stage.connections() == 2);
    for _ in 0..1000 {
        device.read_config(0, &mut [0; 8]);
    }
    // Calls that don't need the daemon now don't wait for it either.
    device.ack_features(VERSION_1).unwrap();
    device.start_queue(0, parts(&memory())).unwrap();
    assert_eq!(stage.connections(), 2, "the same one still hangs");
}

#[test]
fn all_rings_of_a_hung_daemon_are_stopped_within_one_limit() {
    for protocol in [PLAIN, PLAIN | SUSPENDS] {
        let hangs = |request, _: &[u8]| match request {
            GET_VRING_BASE | SKIP_DRAIN => Does::Hang,
            _ => Does::Obey,
        };
        let Play { stage, mut device, _folder } = play(VIRTIO_ID_GPU, protocol, hangs);
        let memory = memory();
        device.ack_features(VERSION_1).unwrap();
        for index in 0..8 {
            device.start_queue(index, parts(&memory)).unwrap();
        }
        let start = Instant::now();
        for index in 0..8 {
            assert_eq!(device.drain(index), Some(QueueState::default()));
        }
        drop(device);
        assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
        assert!(stage.count(GET_VRING_BASE) + stage.count(SKIP_DRAIN) >= 1);
    }
}

#[test]
fn a_daemon_that_hangs_at_a_reset_is_not_waited_for() {
    let hangs = |request, _: &[u8]| if RESET_OWNER.contains(&request) { Does::Hang } else { Does::Obey };
    let Play { device: mut hung, _folder, .. } = play(VIRTIO_ID_GPU, PLAIN, hangs);
    let start = Instant::now();
    hung.ack_features(VERSION_1).unwrap();
    hung.reset();
    drop(hung);
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
}

#[test]
fn a_daemon_that_leaves_off_in_an_event_is_given_up_with_the_first_wait() {
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_GPU, PLAIN, |_, _| Does::Obey);
    device.ack_features(VERSION_1).unwrap();
    assert!(lock(&stage.events).as_mut().unwrap().write_all(&[2, 0, 0, 0, 1]).is_ok());
    // The keeper already waits for the rest of it, or will before long.
    let start = Instant::now();
    while stage.connections() == 1 {
        let asked = Instant::now();
        device.reset();
        assert!(asked.elapsed() < ANSWER + NOTICE, "{:?}", asked.elapsed());
        assert!(start.elapsed() < LIMIT, "it is not given up");
    }
}

#[test]
fn a_daemon_without_events_may_close_their_channel() {
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_GPU, PLAIN, |_, _| Does::Obey);
    drop(lock(&stage.events).take());
    thread::sleep(Duration::from_millis(300));
    device.ack_features(VERSION_1).unwrap();
    assert_eq!((stage.connections(), device.is_connected()), (1, true));
}

#[test]
fn pitfall_54_answers_to_events_that_are_never_read_end_the_connection() {
    let Play { stage, device, _folder } = play(VIRTIO_ID_GPU, PLAIN, |_, _| Does::Obey);
    let events = lock(&stage.events).take().unwrap();
    let flood = thread::spawn(move || {
        // It fails when the frontend has closed its end.
        let event = message::request(BackendReq::CONFIG_CHANGE_MSG, true, &[]);
        while (&events).write_all(&event).is_ok() {}
    });
    eventually("it comes again", || stage.connections() > 1);
    flood.join().unwrap();
    eventually("it is served again", || device.is_connected());
}

#[test]
fn a_reset_is_answered_when_nothing_of_a_dead_daemon_is_in_flight() {
    let Play { mut device, _folder, .. } = play(VIRTIO_ID_GPU, PLAIN, |_, _| Does::Obey);
    device.ack_features(VERSION_1).unwrap();
    device.start_queue(0, parts(&memory())).unwrap();
    // As if a daemon of ours had died.
    let (sentinel, in_flight) = Sentinel::pair().unwrap();
    device.shared.view().afterlife = Some(Arc::new(sentinel));
    assert!(!device.is_quiet());
    let (done, answered) = mpsc::channel();
    let waiting = thread::spawn(move || {
        device.reset();
        let _ = done.send(());
        device
    });
    assert_eq!(answered.recv_timeout(Duration::from_millis(200)), Err(RecvTimeoutError::Timeout));
    drop(in_flight);
    answered.recv_timeout(LIMIT).unwrap();
    let mut device = waiting.join().unwrap();
    assert!(device.is_quiet());

    // Where rings go on elsewhere, the frontend finds out soon that they can't.
    device.ack_features(VERSION_1).unwrap();
    device.start_queue(0, parts(&memory())).unwrap();
    let (sentinel, in_flight) = Sentinel::pair().unwrap();
    device.shared.view().afterlife = Some(Arc::new(sentinel));
    assert!(device.suspend(&[0])[0].is_some());
    assert!(!device.is_quiet());
    drop(in_flight);
    assert!(device.is_quiet());
}

#[test]
fn a_flood_of_configuration_changes_is_heard_now_and_then_and_the_last_for_sure() {
    let Play { stage, mut device, _folder } = play(VIRTIO_ID_GPU, PLAIN, |_, _| Does::Obey);
    let interrupts = Arc::new(AtomicUsize::new(0));
    let raised = Arc::clone(&interrupts);
    device.on_config_change(Interrupt::Call(Arc::new(move || {
        raised.fetch_add(1, Ordering::SeqCst);
    })));
    let start = Instant::now();
    let before = stage.count(GET_CONFIG);
    while start.elapsed() < Duration::from_secs(1) {
        assert!(stage.say_changed());
    }
    lock(&stage.config)[5] = 77;
    assert!(stage.say_changed());
    eventually("the last change is heard", || {
        let mut byte = [0];
        device.read_config(5, &mut byte);
        byte == [77]
    });
    let most = start.elapsed().as_millis() as usize / 100 + 2;
    let (read, raised) = (stage.count(GET_CONFIG) - before, interrupts.load(Ordering::SeqCst));
    assert!((1..=most).contains(&read) && raised <= most, "{read} reads and {raised} interrupts, at most {most}");
}
