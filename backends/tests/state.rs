//! The state of a device on its way to another: nothing of what a driver has said is lost, and bytes from anywhere change
//! nothing unless all of them make sense.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ringvm_backends::block::{BlockDevice, BlockOptions, StorageKind};
use ringvm_backends::device::{Device, DeviceError, GuestMemory, QueueParts};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::net::{NetDevice, NetOptions};
use ringvm_backends::state::MAX_STATE;
use ringvm_backends::testing::driver::{Buffer, Driver};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const F_CONFIG_WCE: u64 = 1 << 11;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_ECN: u64 = 1 << 9;
const F_MQ: u64 = 1 << 22;
const PATIENCE: Duration = Duration::from_secs(20);

fn pool() -> ReactorPool {
    ReactorPool::new(&ReactorOptions::default()).unwrap()
}

fn disk(readonly: bool) -> BlockDevice {
    let options = BlockOptions { storage: StorageKind::Null, size: Some(1 << 20), readonly, ..BlockOptions::default() };
    BlockDevice::open("disk0", &options, &pool()).unwrap()
}

fn nic(pairs: u16) -> NetDevice {
    NetDevice::open("net0", &NetOptions { loopback: true, queues: pairs, ..NetOptions::default() }, &pool()).unwrap()
}

fn config<const N: usize>(device: &dyn Device, offset: u32) -> [u8; N] {
    let mut bytes = [0; N];
    device.read_config(offset, &mut bytes);
    bytes
}

/// Sends commands through the control queue of a NIC of two pairs and returns the answers.
fn command(nic: &mut NetDevice, commands: &[Vec<u8>]) -> Vec<u8> {
    let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let mut driver = Driver::new(Arc::clone(&mem), 0, 64, 0);
    let parts = QueueParts::new(driver.ring(), Arc::clone(&mem), EventFd::new(EFD_NONBLOCK).unwrap());
    let at = |index: usize| 0x1_0000 + index as u64 * 0x1_0000;
    for (index, command) in commands.iter().enumerate() {
        mem.write_slice(command, GuestAddress(at(index))).unwrap();
        let answer = Buffer { addr: at(index) + 0xffff, len: 1, writable: true };
        let command = Buffer { addr: at(index), len: command.len() as u32, writable: false };
        driver.add(&[command, answer]).unwrap();
    }
    driver.publish();
    nic.start_queue(4, parts).unwrap();
    let begun = Instant::now();
    while driver.in_flight() > 0 {
        if driver.next_used().is_none() {
            assert!(begun.elapsed() < PATIENCE, "the control queue answers");
            std::thread::yield_now();
        }
    }
    nic.drain(4).unwrap();
    (0..commands.len()).map(|index| mem.read_obj(GuestAddress(at(index) + 0xffff)).unwrap()).collect()
}

/// A table of so many addresses.
fn table(first: u8, count: u32) -> Vec<u8> {
    let addresses = (0..count).flat_map(|i| [first, 0, 0, 0, (i >> 8) as u8, i as u8]);
    count.to_le_bytes().into_iter().chain(addresses).collect()
}

/// A NIC whose driver has said all that there is to say.
fn used_nic() -> NetDevice {
    let mut nic = nic(2);
    let features = nic.info().features;
    nic.ack_features(features).unwrap();
    let tables = [vec![1, 0], table(2, 1000), table(1, 24)].concat();
    let commands = [
        vec![0, 0, 0], // not promiscuous
        vec![0, 1, 1], // all multicast
        tables,
        vec![1, 1, 2, 0x11, 0x22, 0x33, 0x44, 0x55],
        vec![4, 0, 2, 0], // two pairs
    ];
    assert_eq!(command(&mut nic, &commands), [0; 5]);
    nic
}

#[test]
fn a_disk_goes_on_with_the_cache_mode_that_was_chosen() {
    for choice in [0, 1] {
        let mut from = disk(false);
        let features = from.info().features;
        from.ack_features(features).unwrap();
        from.write_config(32, &[choice]).unwrap();
        let state = from.save_state().unwrap();
        let mut to = disk(false);
        to.ack_features(features).unwrap();
        to.load_state(&state).unwrap();
        assert_eq!(config::<1>(&to, 32), [choice]);
        assert_eq!(to.save_state().unwrap(), state);
        to.reset();
        assert_eq!(config::<1>(&to, 32), [1], "a reset forgets it");
        let refused = disk(true).load_state(&state);
        assert_eq!(refused.is_err(), choice == 0, "a disk that can't be written to has no cache mode");
    }
    assert_eq!(disk(true).info().features & F_CONFIG_WCE, 0);
}

#[test]
fn a_nic_goes_on_with_all_that_its_driver_has_said() {
    let from = used_nic();
    let state = from.save_state().unwrap();
    assert!((6 * 1024..MAX_STATE).contains(&state.len()));
    let features = from.info().features;
    // Behind the features, and before them as well.
    for early in [false, true] {
        let mut to = nic(2);
        assert_ne!(to.save_state().unwrap(), state);
        if early {
            to.load_state(&state).unwrap();
            to.reset();
        }
        to.ack_features(features).unwrap();
        to.load_state(&state).unwrap();
        assert_eq!(config::<6>(&to, 0), [2, 0x11, 0x22, 0x33, 0x44, 0x55]);
        assert_eq!(to.save_state().unwrap(), state);
        assert_eq!(command(&mut to, &[vec![4, 0, 1, 0]]), [0], "and takes commands");
        assert_ne!(to.save_state().unwrap(), state);
    }
    let fresh = nic(2);
    let mut to = used_nic();
    to.load_state(&fresh.save_state().unwrap()).unwrap();
    assert_eq!(to.save_state().unwrap(), fresh.save_state().unwrap(), "nothing of before is left");
}

fn refuses(device: &mut dyn Device, state: &[u8], what: &str) {
    let before = device.save_state().unwrap();
    let refused = device.load_state(state).unwrap_err();
    assert!(matches!(refused, DeviceError::State { .. }), "{refused}");
    assert!(refused.to_string().contains(what), "{refused}: {what}");
    assert_eq!(device.save_state().unwrap(), before, "nothing was changed");
}

#[test]
fn pitfall_59_a_state_from_elsewhere_is_checked() {
    let (mut disk, mut nic) = (disk(false), nic(2));
    let features = nic.info().features;
    let (disks, nics) = (disk.save_state().unwrap(), used_nic().save_state().unwrap());
    for (without, what) in [(F_MQ, "more queue pairs than there are"), (F_GUEST_TSO4 | F_GUEST_ECN, "not negotiated")] {
        nic.ack_features(features & !without).unwrap();
        refuses(&mut nic, &nics, what);
        nic.reset();
    }
    nic.ack_features(features).unwrap();
    let device: [(&mut dyn Device, &Vec<u8>, &Vec<u8>); 2] = [(&mut disk, &disks, &nics), (&mut nic, &nics, &disks)];
    for (device, own, others) in device {
        refuses(device, others, "another kind");
        refuses(device, &[], "too early");
        for len in (0..own.len()).step_by(if own.len() > 100 { 97 } else { 1 }) {
            refuses(device, &own[..len], "too early");
        }
        refuses(device, &[own.as_slice(), &[0]].concat(), "behind its end");
        refuses(device, &vec![b'R'; MAX_STATE + 1], "longer than 64 KiB");
        refuses(device, &[&b"none"[..], &own[4..]].concat(), "not the state");
        let mut newer = own.clone();
        newer[8] += 1;
        refuses(device, &newer, "another version");
    }
    let changed = |at: usize, bytes: &[u8]| {
        let mut state = nics.clone();
        state[at..at + bytes.len()].copy_from_slice(bytes);
        state
    };
    // Behind 12 bytes of header: address, pairs, offloads, three flags, tables.
    refuses(&mut nic, &changed(12, &[3]), "multicast");
    refuses(&mut nic, &changed(18, &[3]), "more queue pairs than there are");
    refuses(&mut nic, &changed(20, &(1u64 << 63).to_le_bytes()), "not negotiated");
    (28..31).for_each(|flag| refuses(&mut nic, &changed(flag, &[2]), "neither on nor off"));
    refuses(&mut nic, &changed(31, &1025u32.to_le_bytes()), "longer table");
    refuses(&mut nic, &changed(31, &u32::MAX.to_le_bytes()), "longer table");
    refuses(&mut disk, &[&disks[..12], &[2]].concat(), "neither on nor off");
}
