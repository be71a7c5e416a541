//! Hosted backends as a driver and a transport see them: one that works, and those that do not.

use std::os::fd::AsRawFd;
use std::sync::RwLock;
use std::sync::atomic::AtomicUsize;

use ringvm_backends::device::{QueueState, RingConfig, Suspended};
use ringvm_backends::testing::driver::Buffer;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::*;

#[allow(dead_code, reason = "the example's own daemon is not used here")]
#[path = "../examples/ramdisk.rs"]
mod ramdisk;

#[path = "hosted_tests/rig.rs"]
mod rig;

use ramdisk::RamDisk;
use rig::*;

const HEADER: u64 = 0x8_0000;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;

#[test]
fn a_disk_of_the_other_crate_is_a_device() {
    let disk = Arc::new(RwLock::new(RamDisk::new(64)));
    let mut rig = Rig::new(Hosted::new("disk0", 2, 60, disk).unwrap());
    let mut capacity = [0; 8];
    rig.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 64);
    rig.start(0, QueueState::default()).unwrap();
    let mut request = |kind: u32, sector: u64, data: &mut [u8]| {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        rig.mem.write_slice(&header, GuestAddress(HEADER)).unwrap();
        rig.mem.write_slice(data, GuestAddress(DATA)).unwrap();
        let queue = &mut rig.queues[0];
        let chain = [
            Buffer { addr: HEADER, len: 16, writable: false },
            Buffer { addr: DATA, len: data.len() as u32, writable: kind == T_IN },
            Buffer { addr: HEADER + 16, len: 1, writable: true },
        ];
        queue.driver.add(&chain).unwrap();
        queue.driver.want_interrupts(true);
        if queue.driver.publish() {
            queue.kick.write(1).unwrap();
        }
        rig.next_used(0);
        rig.mem.read_slice(data, GuestAddress(DATA)).unwrap();
        rig.mem.read_obj::<u8>(GuestAddress(HEADER + 16)).unwrap()
    };
    for round in 0..50u8 {
        let sector = u64::from(round) % 63;
        assert_eq!(request(T_OUT, sector, &mut [round + 1; 1024]), 0);
        let mut read = [0; 1024];
        assert_eq!(request(T_IN, sector, &mut read), 0);
        assert_eq!(read, [round + 1; 1024]);
    }
    assert_eq!(request(T_IN, 64, &mut [0; 512]), 1, "past the end");
    assert!(rig.queues[0].call.read().is_ok(), "the driver was interrupted");
    // A stop and another start at the same position.
    let ended = rig.device.drain(0).unwrap();
    assert_eq!((ended.next_avail, ended.next_used), (101, 101));
    rig.start(0, ended).unwrap();
    rig.offer(0);
    rig.next_used(0);
    rig.device.reset();
    rig.device.ack_features(rig.device.info().features).unwrap();
}

#[test]
fn each_queue_is_served_by_the_thread_that_its_backend_has_for_it() {
    let (_, mut rig) = odd(Manner::Works);
    for index in 0..3 {
        // What was offered before the start is looked at without a kick.
        rig.queues[index].driver.add(&[Buffer { addr: DATA, len: 64, writable: true }]).unwrap();
        rig.queues[index].driver.publish();
        rig.start(index as u16, QueueState::default()).unwrap();
        // The number of the queue on its thread.
        assert_eq!(rig.next_used(index).1, [0, 0, 1][index]);
        rig.offer(index);
        rig.next_used(index);
    }
    let ends = rig.device.suspend(&[2, 0, 1]);
    for end in ends {
        let end = end.expect("it ran");
        assert_eq!((end.state.next_avail, end.state.next_used, end.left), (2, 2, vec![]));
    }
    assert!(rig.device.suspend(&[0])[0].is_none(), "it does not run");
    assert_eq!(rig.device.stats().queues.len(), 3);
}

#[test]
fn a_backend_is_called_for_descriptors_of_its_own() {
    let (backend, rig) = odd(Manner::Works);
    let events = Arc::clone(&backend.read().unwrap().descriptor_events);
    let listeners = rig.device.listeners();
    assert_eq!(listeners.len(), 2);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    for data in [0, 3, 1 << 16] {
        let error = listeners[1].register_listener(event.as_raw_fd(), EventSet::IN, data).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{data}");
    }
    listeners[1].register_listener(event.as_raw_fd(), EventSet::IN, 4).unwrap();
    event.write(1).unwrap();
    wait("the backend is called", || events.load(Ordering::SeqCst) > 0);
    listeners[1].unregister_listener(event.as_raw_fd(), EventSet::IN, 4).unwrap();
}

#[test]
fn pitfall_54_a_backend_that_panics_or_fails_needs_a_reset_and_nobody_waits_for_it() {
    for manner in [Manner::Panics, Manner::Fails] {
        let (_, mut rig) = odd(manner);
        rig.start(1, QueueState::default()).ok();
        rig.wait_for_fault(1);
        assert!(rig.queues[1].driver.next_used().is_none());
        // The end of a queue whose thread has died is the end.
        let ends = rig.device.suspend(&[1]);
        assert_eq!(ends[0].is_some(), manner == Manner::Fails, "{manner:?}");
        rig.device.reset();
        if manner == Manner::Panics {
            let error = rig.start(1, QueueState::default()).unwrap_err().to_string();
            assert!(error.contains("its backend has panicked"), "{error}");
        }
    }
}

#[test]
fn pitfall_54_a_backend_that_blocks_is_given_up_in_time() {
    let (backend, mut rig) = odd(Manner::Blocks);
    let block = Arc::clone(&backend.read().unwrap().block);
    let blocked = block.lock().unwrap();
    let error = rig.start(0, QueueState::default()).unwrap_err().to_string();
    let reason = format!("not answered within {} s", PATIENCE.as_secs());
    assert!(error.contains(&reason), "{error}");
    // From now on nobody waits.
    let begun = Instant::now();
    assert_eq!(rig.device.suspend(&[0]), [None]);
    for _ in 0..5 {
        let error = rig.start(0, QueueState::default()).unwrap_err().to_string();
        assert!(error.contains("yet to answer an earlier call"), "{error}");
    }
    drop(rig);
    // Each of these would have waited.
    assert!(begun.elapsed() < 5 * PATIENCE, "{:?}", begun.elapsed());
    drop(blocked);
    wait("the thread that was left behind ends", || Arc::strong_count(&backend) == 1);
}

#[test]
fn a_reset_that_a_backend_has_not_heard_of_is_made_up_for() {
    let (backend, mut rig) = odd(Manner::Blocks);
    let block = Arc::clone(&backend.read().unwrap().block);
    let blocked = block.lock().unwrap();
    rig.start(0, QueueState::default()).unwrap_err();
    rig.device.reset();
    drop(blocked);
    wait("the backend is reset", || backend.read().unwrap().resets == 1);
    rig.reset();
    assert_eq!(backend.read().unwrap().resets, 2);
}

#[test]
fn a_start_that_ends_late_is_undone() {
    let (backend, mut rig) = odd(Manner::Blocks);
    let block = Arc::clone(&backend.read().unwrap().block);
    let blocked = block.lock().unwrap();
    rig.start(0, QueueState::default()).unwrap_err();
    drop(blocked);
    wait("the queue starts again", || rig.start(0, QueueState::default()).is_ok());
    rig.offer(0);
    rig.next_used(0);
    assert_eq!(rig.device.drain(0).unwrap().next_used, 1);
    assert_eq!(rig.holders(), 0);
}

#[test]
fn what_was_given_up_does_not_happen_later_and_stops_do() {
    let (backend, mut rig) = odd(Manner::Works);
    rig.start(1, QueueState::default()).unwrap();
    let handles = Arc::strong_count(&rig.mem);
    backend.write().unwrap().manner = Manner::Blocks;
    let block = Arc::clone(&backend.read().unwrap().block);
    let blocked = block.lock().unwrap();
    // The thread hangs in a call for queue 1.
    rig.offer(1);
    wait("it hangs", || backend.try_read().is_err());
    rig.queues[2].driver.add(&[Buffer { addr: DATA, len: 64, writable: true }]).unwrap();
    rig.queues[2].driver.publish();
    let error = rig.start(2, QueueState::default()).unwrap_err().to_string();
    assert!(error.contains("not answered within"), "{error}");
    assert_eq!(Arc::strong_count(&rig.mem), handles, "what was given up holds nothing");
    assert_eq!(rig.device.suspend(&[1, 2]), [None, None]);
    drop(blocked);
    // Nobody has waited for the stop of queue 1: it has given back what it had, and stops.
    rig.next_used(1);
    wait("the queue has stopped", || rig.holders() == 0);
    assert!(rig.queues[2].driver.next_used().is_none(), "it has not started");
    for index in [1, 2] {
        rig.renew(index);
        wait("the queue starts again", || rig.start(index as u16, QueueState::default()).is_ok());
        rig.offer(index);
        rig.next_used(index);
    }
}

#[test]
fn pitfall_54_a_backend_that_keeps_buffers_is_not_waited_for_for_ever() {
    let (backend, mut rig) = odd(Manner::Keeps);
    for index in 0..3 {
        rig.start(index, QueueState::default()).unwrap();
    }
    rig.offer(0);
    wait("the buffer is taken", || backend.read().unwrap().kept.len() == 1);
    let begun = Instant::now();
    let ends = rig.device.suspend(&[0, 2]);
    assert!(begun.elapsed() >= STOP_PATIENCE);
    assert!(ends[0].is_none() && ends[1].is_some(), "the other queue has nothing to keep");
    rig.wait_for_fault(0);
    // A late answer, while queue 1 still has the guest's memory shown.
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    rig.device.listeners()[0].register_listener(event.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, 4).unwrap();
    event.write(1).unwrap();
    let gave_back = Arc::clone(&backend.read().unwrap().gave_back);
    wait("the buffer comes late", || gave_back.lock().unwrap().is_some());
    assert_eq!(*gave_back.lock().unwrap(), Some(false));
    assert_eq!(rig.queues[0].driver.used_index(), 0, "it goes nowhere");
    // The queue is free for another life.
    backend.write().unwrap().manner = Manner::Works;
    rig.renew(0);
    rig.start(0, QueueState::default()).unwrap();
    rig.offer(0);
    rig.next_used(0);
    assert_eq!(rig.device.drain(0).unwrap().next_used, 1);
    rig.device.drain(1).unwrap();
    assert_eq!(rig.holders(), 0);
}

#[test]
fn the_thread_itself_keeps_to_the_limit_of_a_stop() {
    let (backend, mut rig) = odd(Manner::Keeps);
    rig.start(1, QueueState::default()).unwrap();
    rig.start(2, QueueState::default()).unwrap();
    rig.offer(1);
    wait("the buffer is taken", || backend.read().unwrap().kept.len() == 1);
    assert_eq!(rig.device.suspend(&[1]), [None]);
    // A thread that did not answer would be given up with all its queues.
    assert_eq!([1, 2].map(|index: usize| rig.queues[index].faults.load(Ordering::SeqCst)), [1, 0]);
}

#[test]
fn a_stop_joins_the_one_before() {
    let (backend, mut rig) = odd(Manner::Keeps);
    rig.start(0, QueueState::default()).unwrap();
    rig.offer(0);
    wait("the buffer is taken", || backend.read().unwrap().kept.len() == 1);
    let drained = rig.device.stop(&[0], End::Drained);
    let suspended = rig.device.stop(&[0], End::Suspended);
    let error = rig.start(0, QueueState::default()).unwrap_err().to_string();
    assert!(error.contains("is about to stop"), "{error}");
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    rig.device.listeners()[0].register_listener(event.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, 4).unwrap();
    event.write(1).unwrap();
    let position = QueueState { next_avail: 1, next_used: 1 };
    let end = Suspended { state: position, left: Vec::new() };
    assert_eq!(suspended.wait(), [Some(end.clone())]);
    assert_eq!(drained.wait(), [Some(end)], "both are told");
    rig.start(0, position).unwrap();
}

#[test]
fn a_second_stop_does_not_prolong_the_first() {
    let (backend, mut rig) = odd(Manner::Keeps);
    rig.start(0, QueueState::default()).unwrap();
    rig.offer(0);
    wait("the buffer is taken", || backend.read().unwrap().kept.len() == 1);
    let begun = Instant::now();
    let drained = rig.device.stop(&[0], End::Drained);
    let Err(drained) = drained.wait_until(begun + STOP_PATIENCE / 2) else { panic!("its buffer is kept") };
    assert_eq!(rig.device.suspend(&[0]), [None]);
    assert!((STOP_PATIENCE..STOP_PATIENCE * 3 / 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!(drained.wait(), [None]);
}

#[test]
fn pitfall_54_a_backend_that_has_lost_count_stops_at_once_and_starts_again_after_a_reset() {
    let disk = Arc::new(RwLock::new(RamDisk::new(64)));
    let mut rig = Rig::new(Hosted::new("disk0", 2, 60, disk).unwrap());
    rig.start(0, QueueState::default()).unwrap();
    // The backend steps over the entry, which is of no descriptor, and fails.
    rig.queues[0].driver.write_avail_entry(0, u16::MAX);
    rig.queues[0].driver.write_avail_index(1);
    rig.queues[0].kick.write(1).unwrap();
    rig.wait_for_fault(0);
    let begun = Instant::now();
    assert_eq!(rig.device.suspend(&[0]), [None]);
    assert!(begun.elapsed() < STOP_PATIENCE, "{:?}", begun.elapsed());
    assert_eq!(rig.holders(), 0);
    rig.reset();
    rig.renew(0);
    rig.start(0, QueueState::default()).unwrap();
    rig.offer(0);
    rig.next_used(0);
    assert_eq!(rig.queues[0].faults.load(Ordering::SeqCst), 0);
}

#[test]
fn what_a_backend_can_not_do_is_refused_by_name() {
    let (_, mut rig) = odd(Manner::Works);
    let parts = QueueParts {
        left: vec![1],
        ..QueueParts::new(rig.queues[0].driver.ring(), Arc::clone(&rig.mem), EventFd::new(EFD_NONBLOCK).unwrap())
    };
    let error = rig.device.start_queue(0, parts).unwrap_err().to_string();
    assert!(error.contains("no table of those in flight"), "{error}");
    let error = rig.device.save_state().unwrap_err().to_string();
    assert!(error.contains("hands no state over"), "{error}");
    assert!(!rig.device.recovers());
    // A ring outside of memory, and one of a size that is too large.
    for change in [|ring: &mut RingConfig| ring.used = 1 << 30, |ring: &mut RingConfig| ring.size = 128] {
        let mut ring = rig.queues[0].driver.ring();
        change(&mut ring);
        let parts = QueueParts::new(ring, Arc::clone(&rig.mem), EventFd::new(EFD_NONBLOCK).unwrap());
        assert!(matches!(rig.device.start_queue(0, parts), Err(DeviceError::Queue { index: 0, .. })));
    }
    let parts = QueueParts::new(rig.queues[0].driver.ring(), Arc::clone(&rig.mem), EventFd::new(EFD_NONBLOCK).unwrap());
    assert!(matches!(rig.device.start_queue(7, parts), Err(DeviceError::Queue { index: 7, .. })));
    rig.start(0, QueueState::default()).unwrap();
    assert!(matches!(rig.start(0, QueueState::default()), Err(DeviceError::Queue { index: 0, .. })));
    // More bytes of configuration space than there was room for.
    let mut space = [0; 6];
    rig.device.read_config(0, &mut space);
    assert_eq!(space, [7; 6]);
}

#[test]
fn a_backend_that_makes_no_device_is_refused() {
    let mut legacy = Odd::new(Manner::Works);
    legacy.features = 1 << 30;
    let error = Hosted::new("odd0", 4, 4, Arc::new(RwLock::new(legacy))).err().unwrap().to_string();
    assert!(error.contains("the backend of odd0") && error.contains("VIRTIO_F_VERSION_1"), "{error}");
    let mut wide = Odd::new(Manner::Works);
    wide.features |= 1 << VIRTIO_F_RING_PACKED | 1 << 26 | 1 << VIRTIO_F_ACCESS_PLATFORM;
    let device = Hosted::new("odd0", 4, 4, Arc::new(RwLock::new(wide))).unwrap();
    assert_eq!(device.info().features, 1 << VIRTIO_F_VERSION_1, "what no transport of ours has is not offered");
}

#[test]
fn a_queue_without_a_thread_does_not_start() {
    let mut partial = Odd::new(Manner::Works);
    partial.masks = vec![0b001];
    let mut rig = Rig::new(Hosted::new("odd0", 4, 4, Arc::new(RwLock::new(partial))).unwrap());
    let error = rig.start(1, QueueState::default()).unwrap_err().to_string();
    assert!(error.contains("odd0") && error.contains("no thread"), "{error}");
    rig.start(0, QueueState::default()).unwrap();
    rig.device.reset();
}

#[test]
fn a_backend_without_threads_is_no_device() {
    let mut none = Odd::new(Manner::Works);
    none.masks = Vec::new();
    let error = Hosted::new("odd0", 4, 4, Arc::new(RwLock::new(none))).err().unwrap().to_string();
    assert!(error.contains("wants no thread"), "{error}");
}

#[test]
fn a_thread_ends_with_its_handle() {
    let (backend, rig) = odd(Manner::Works);
    let mut device = rig.device;
    // As a device that fails to start drops them: nobody waits for their ends.
    drop(std::mem::take(&mut device.threads));
    wait("the threads end", || Arc::strong_count(&backend) == 1);
}

#[test]
fn nothing_of_ours_holds_memory_after_a_stop_a_refused_start_or_a_panic() {
    let (backend, mut rig) = odd(Manner::Works);
    let handles = Arc::strong_count(&rig.mem);
    rig.start(0, QueueState::default()).unwrap();
    rig.start(1, QueueState::default()).unwrap();
    assert_eq!(rig.holders(), 1, "the backend's");
    let mut ring = rig.queues[2].driver.ring();
    ring.used = 1 << 30;
    let parts = QueueParts::new(ring, Arc::clone(&rig.mem), EventFd::new(EFD_NONBLOCK).unwrap());
    rig.device.start_queue(2, parts).unwrap_err();
    rig.device.drain(1).unwrap();
    assert_eq!(rig.holders(), 1, "one queue runs");
    rig.device.drain(0).unwrap();
    assert_eq!((rig.holders(), Arc::strong_count(&rig.mem)), (0, handles));
    rig.start(1, QueueState::default()).unwrap();
    backend.write().unwrap().manner = Manner::Panics;
    rig.offer(1);
    rig.wait_for_fault(1);
    assert_eq!((rig.holders(), Arc::strong_count(&rig.mem)), (0, handles));
    assert!(rig.start(1, QueueState::default()).is_err());
    assert_eq!((rig.holders(), Arc::strong_count(&rig.mem)), (0, handles));
}

#[test]
fn a_call_to_a_driver_without_an_event_is_neither_lost_nor_made_up() {
    let (_, mut rig) = odd(Manner::Works);
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    let call = Interrupt::Call(Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    }));
    // The call may be under way when the queue stops. It comes before the end.
    rig.offer(0);
    rig.start_with(0, QueueState::default(), call.clone()).unwrap();
    let end = rig.device.drain(0).unwrap();
    assert_eq!((end.next_used, calls.load(Ordering::SeqCst)), (1, 1));
    // Nothing to tell.
    rig.start_with(0, end, call).unwrap();
    assert_eq!(rig.device.drain(0), Some(end));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert_eq!(Arc::strong_count(&calls), 1, "nothing of the call is left");
}

#[test]
fn a_start_that_fails_leaves_nothing_behind() {
    let (_, mut rig) = odd(Manner::Works);
    // A pipe tells when the last reader has closed it.
    let (read, mut write) = io::pipe().unwrap();
    let listeners = rig.device.listeners();
    listeners[0].register_listener(read.as_raw_fd(), EventSet::HANG_UP, 4).unwrap();
    let told = Arc::new(());
    let theirs = Arc::clone(&told);
    let parts = QueueParts {
        call: Interrupt::Call(Arc::new(move || drop(Arc::clone(&theirs)))),
        ..QueueParts::new(rig.queues[0].driver.ring(), Arc::clone(&rig.mem), event_of(read))
    };
    let error = rig.device.start_queue(0, parts).unwrap_err();
    let is_taken = |source: &io::Error| source.kind() == io::ErrorKind::AlreadyExists;
    assert!(matches!(&error, DeviceError::Host { source, .. } if is_taken(source)), "{error}");
    assert_eq!(Arc::strong_count(&told), 1, "the driver's interrupt");
    assert_eq!(io::Write::write(&mut write, &[0]).unwrap_err().kind(), io::ErrorKind::BrokenPipe, "the kick");
    assert_eq!(rig.holders(), 0, "the guest's memory");
    rig.start(0, QueueState::default()).unwrap();
    rig.offer(0);
    rig.next_used(0);
}

#[allow(unsafe_code, reason = "an eventfd is made of another descriptor")]
fn event_of(fd: impl Into<std::os::fd::OwnedFd>) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is taken out of its owner.
    unsafe { EventFd::from_raw_fd(fd.into().into_raw_fd()) }
}

#[test]
fn a_panic_of_the_backend_is_told_before_and_after_somebody_asks() {
    let (_, mut rig) = odd(Manner::Panics);
    let (tell, told) = std::sync::mpsc::channel();
    let on_panic = |tell: &std::sync::mpsc::Sender<String>| {
        let tell = tell.clone();
        OnPanic::new(move |who| tell.send(who.to_owned()).expect("the test listens"))
    };
    rig.device.on_panic(on_panic(&tell));
    rig.start(1, QueueState::default()).ok();
    assert_eq!(told.recv_timeout(LIMIT).as_deref(), Ok("the backend of odd0"));
    assert_eq!(rig.queues[1].faults.load(Ordering::SeqCst), 1, "the driver is told first");
    rig.device.on_panic(on_panic(&tell));
    assert_eq!(told.recv_timeout(LIMIT).as_deref(), Ok("the backend of odd0"));
    assert!(told.try_recv().is_err(), "once each");
}
