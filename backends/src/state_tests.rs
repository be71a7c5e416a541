//! States from anywhere, for a disk and for a NIC.

use std::sync::{Mutex, PoisonError};

use bolero::TypeGenerator;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::*;
use crate::block::{BlockDevice, BlockOptions, StorageKind};
use crate::device::{Device, DeviceError};
use crate::io::reactor::{ReactorOptions, ReactorPool};
use crate::net::{NetDevice, NetOptions};

/// By which a driver takes frames unfinished.
const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// A NIC's state: valid fields for the most part, and then the damage done to it on its way.
#[derive(Clone, Debug, TypeGenerator)]
struct NicState {
    mac: [u8; 6],
    pairs: u16,
    offloads: u64,
    flags: [u8; 3],
    tables: [Vec<[u8; 6]>; 2],
    damage: Damage,
}

#[derive(Clone, Debug, TypeGenerator)]
struct Damage {
    bytes: Vec<(u16, u8)>,
    cut: u16,
    behind: Vec<u8>,
    /// How much of it has happened.
    kinds: u8,
}

impl Damage {
    fn to(&self, mut state: Vec<u8>) -> Vec<u8> {
        if self.kinds % 4 == 1 {
            let len = state.len();
            self.bytes.iter().take(4).for_each(|&(at, byte)| state[usize::from(at) % len] = byte);
        }
        if self.kinds / 4 % 8 == 1 {
            state.truncate(usize::from(self.cut) % state.len());
        }
        if self.kinds / 32 == 1 {
            state.extend(&self.behind);
        }
        state
    }
}

impl NicState {
    fn bytes(&self) -> Vec<u8> {
        let mut mac = self.mac;
        mac[0] &= !u8::from(!mac[1].is_multiple_of(8));
        let offloads = if self.offloads.is_multiple_of(8) { self.offloads } else { self.offloads & GUEST_OFFLOADS };
        let mut state = StateWriter::new(VIRTIO_ID_NET, 1);
        state.put(&mac);
        state.put(&(self.pairs % 4).to_le_bytes());
        state.put(&offloads.to_le_bytes());
        self.flags.iter().for_each(|flag| state.put(&[if flag % 16 == 15 { *flag } else { flag & 1 }]));
        for table in &self.tables {
            state.put(&(table.len() as u32).to_le_bytes());
            state.put(table.as_flattened());
        }
        self.damage.to(state.finish())
    }
}

fn pool() -> ReactorPool {
    ReactorPool::new(&ReactorOptions { count: 1, ..ReactorOptions::default() }).unwrap()
}

/// Loads arbitrary bytes into a device that serves a driver with these features. They become its state or change
/// nothing.
fn load(device: &Mutex<impl Device>, features: u64, state: &[u8]) {
    let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
    device.reset();
    let fresh = device.save_state().unwrap();
    if device.ack_features(features | 1 << VIRTIO_F_VERSION_1).is_err() {
        return;
    }
    let before = device.save_state().unwrap();
    match device.load_state(state) {
        Ok(()) => assert_eq!(device.save_state().unwrap(), state),
        Err(DeviceError::State { .. }) => assert_eq!(device.save_state().unwrap(), before),
        Err(other) => panic!("{other}"),
    }
    // Before a driver has come, loading only tests whether the state could be taken over.
    device.reset();
    let _ = device.load_state(state);
    device.reset();
    assert_eq!(device.save_state().unwrap(), fresh, "a reset forgets it");
}

#[test]
fn fuzz_nic_state() {
    let options = NetOptions { loopback: true, queues: 2, ..NetOptions::default() };
    let nic = NetDevice::open("nic", &options, &pool()).unwrap();
    let offered = nic.info().features;
    let nic = Mutex::new(nic);
    bolero::check!().with_type::<(NicState, u64, bool, Vec<u8>)>().for_each(|(state, refused, sound, raw)| {
        let features = if *sound { offered } else { offered & refused };
        // Mostly features that can be accepted together.
        let features = if features & 0xff == 0 { offered & !(1 << (refused % 64)) } else { features };
        let state = if raw.len() == 64 { raw.clone() } else { state.bytes() };
        load(&nic, features, &state);
    });
}

#[test]
fn fuzz_disk_state() {
    let null = BlockOptions { storage: StorageKind::Null, size: Some(1 << 20), ..BlockOptions::default() };
    let pool = pool();
    let disks = [false, true].map(|readonly| {
        let disk = BlockDevice::open("disk", &BlockOptions { readonly, ..null.clone() }, &pool).unwrap();
        (disk.info().features, Mutex::new(disk))
    });
    bolero::check!().with_type::<(u8, Damage, bool, u64)>().for_each(|(writeback, damage, readonly, features)| {
        let (offered, disk) = &disks[usize::from(*readonly)];
        let mut state = StateWriter::new(VIRTIO_ID_BLOCK, 1);
        state.put(&[if writeback % 4 == 3 { *writeback } else { writeback & 1 }]);
        load(disk, offered & features, &damage.to(state.finish()));
    });
}

/// A NIC that was reset and moved would else refuse a driver that accepts fewer offloads than the one before.
#[test]
fn a_reset_nic_has_no_offloads_of_the_driver_before() {
    let options = NetOptions { loopback: true, ..NetOptions::default() };
    let mut nic = NetDevice::open("nic", &options, &pool()).unwrap();
    let offloads = |nic: &NetDevice| {
        let state = nic.save_state().unwrap();
        u64::from_le_bytes(state[20..28].try_into().unwrap())
    };
    nic.ack_features(nic.info().features).unwrap();
    assert_ne!(offloads(&nic), 0);
    nic.reset();
    assert_eq!(offloads(&nic), 0);
    let state = nic.save_state().unwrap();
    nic.ack_features(1 << VIRTIO_F_VERSION_1).unwrap();
    nic.load_state(&state).unwrap();
}
